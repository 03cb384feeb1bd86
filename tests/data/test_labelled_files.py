"""Labels of image files: class folders, and StyleGAN's dataset.json in a folder or a zip."""

import numpy as np
import pytest

from ddst.data import DataError, load_images
from helpers.datasets import png, write, zipped

LEVELS = [10, 60, 110, 160]
PNGS = [png(np.full((8, 8, 3), level, np.uint8)) for level in LEVELS]
NAMES = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00000002.png", "00001/img00000003.png"]
FILES = dict(zip(NAMES, PNGS, strict=True))
LABELS = [[name, label] for name, label in zip(NAMES, [3, 0, 0, 7], strict=True)]


def levels(images):
    return images.stored[:, 0, 0, 0].tolist()


def test_class_folders_are_numbered_by_name(tmp_path):
    data = write(
        tmp_path, {"dog/b.png": PNGS[0], "cat/deep/a.png": PNGS[1], "ant/z.png": PNGS[2], "dog/a.png": PNGS[3]}
    )
    images = load_images(str(data), 8)
    assert levels(images) == [LEVELS[i] for i in (2, 1, 3, 0)]
    assert images.labels.tolist() == [0, 1, 2, 2]
    assert images.took == "folder of image files, 3 class folders, ant to dog"


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["a.png", "b.png"], ""),
        (["x/a.png", "b.png"], ""),
        (["x/y/a.png", "x/z/b.png"], " (all in one folder, x, which makes no classes)"),
    ],
)
def test_no_labels_where_folders_are_no_classes(tmp_path, names, why):
    images = load_images(str(write(tmp_path, dict(zip(names, PNGS, strict=False)))), 8)
    assert images.labels is None
    assert images.took == f"folder of image files, without labels{why}"


def test_stylegans_zip_is_its_images_and_labels(tmp_path):
    extra = {"readme.txt": b"x", "__MACOSX/._a.png": b"x", "00000/.hidden.png": b"x"}
    images = load_images(str(zipped(tmp_path / "set.ZIP", {**FILES, **extra}, LABELS[::-1])), 8)
    assert levels(images) == LEVELS and images.labels.tolist() == [1, 0, 0, 2]
    assert images.took == "zip of image files, 3 classes by dataset.json (its 0, 3, 7 from 0 on)"
    assert images.left_out == {"hidden": 2, ".txt": 1}


def test_labels_from_0_on_keep_their_numbers(tmp_path):
    labels = [[name, label] for name, label in zip(NAMES, [2, 0, 1, 1], strict=True)]
    images = load_images(str(zipped(tmp_path / "a.zip", FILES, labels)), 8)
    assert images.labels.tolist() == [2, 0, 1, 1]
    assert images.took == "zip of image files, 3 classes by dataset.json"


@pytest.mark.parametrize("root", ["", "set/"])
def test_splits_are_no_classes(tmp_path, root):
    files = {
        f"{root}train/cat/a.png": PNGS[0],
        f"{root}train/dog/b.png": PNGS[1],
        f"{root}Val/cat/c.png": PNGS[2],
        f"{root}more/d.png": PNGS[3],
    }
    folder, packed = write(tmp_path / "files", files), zipped(tmp_path / "a.zip", files)
    for data, where, advice in ((folder, "data folder", ""), (packed, "zip", "unpack it and ")):
        splits = f"{root}Val, {root}train, which are no classes: {advice}give one of them$"
        with pytest.raises(DataError, match=rf"^{where} .* holds the splits {splits}"):
            load_images(str(data), 8)
    assert load_images(str(folder / root / "train"), 8).labels.tolist() == [0, 1]
    write(folder, {"others/e.png": PNGS[0]})  # beside them
    with pytest.raises(DataError, match=f"holds the splits {root}Val, {root}train, which"):
        load_images(str(folder), 8)
    # Somebody's classes, and what a list labels.
    assert (
        load_images(str(write(tmp_path / "toys", {"train/a.png": PNGS[0], "bus/b.png": PNGS[1]})), 8).labels.max() == 1
    )
    listed = zipped(tmp_path / "listed.zip", files, [[name, i] for i, name in enumerate(files)])
    assert load_images(str(listed), 8).labels.max() == 3


def test_names_in_a_zip_are_as_they_are(tmp_path):
    packed = zipped(tmp_path / "a.zip", {"a//b.png": PNGS[0], "a/b.png": PNGS[1]})
    assert levels(load_images(str(packed), 8)) == LEVELS[:2]


def test_a_zip_without_labels(tmp_path):
    for name, labels in (("null.zip", None), ("none.zip", ...)):
        images = load_images(str(zipped(tmp_path / name, FILES, labels)), 8)
        assert levels(images) == LEVELS and images.labels is None
        assert "without labels" in images.took and images.note == ""


def test_a_zip_and_its_folder_are_the_same(tmp_path):
    a = load_images(str(zipped(tmp_path / "a.zip", FILES, LABELS)), 6)
    listed = '{"labels": [' + ", ".join(f'["{name}", {label}]' for name, label in LABELS) + "]}"
    b = load_images(str(write(tmp_path / "b", {**FILES, "dataset.json": listed})), 6)
    assert a.fingerprint() == b.fingerprint() and a.labels.tolist() == b.labels.tolist()
    assert b.note == "" and b.left_out == {}


@pytest.mark.parametrize(
    "labels, message",
    [
        ("{", r"dataset\.json in .*a\.zip is damaged: expected \{\"labels\": "),
        ("[1]", r"is damaged: expected"),
        ('{"classes": []}', r"is damaged: expected"),
        ("[" * 100_000, r"is damaged: expected"),
        ([1, 2], r"is damaged: expected"),
        (LABELS[:3], r"must give 00001/img00000003\.png a class, a whole number from 0 on, got none"),
        ([*LABELS[:3], [NAMES[3], [0.5, 1.0]]], r"from 0 on, got \[0\.5, 1\.0\]"),
        ([*LABELS[:3], [NAMES[3], True]], r"from 0 on, got True"),
        ([*LABELS[:3], [NAMES[3], -1]], r"from 0 on, got -1"),
    ],
)
def test_a_wrong_list_of_labels_is_one_line(tmp_path, labels, message):
    with pytest.raises(DataError, match=message) as caught:
        load_images(str(zipped(tmp_path / "a.zip", FILES, labels)), 8)
    assert "\n" not in str(caught.value)


def test_wrong_zips_are_one_line(tmp_path):
    good = zipped(tmp_path / "good.zip", FILES).read_bytes()
    flipped = bytearray(good)
    flipped[good.index(b"IDAT") + 6] ^= 0xFF
    empty = zipped(tmp_path / "empty.zip", {"a.txt": b"x"}).read_bytes()
    text = zipped(tmp_path / "text.zip", {"a.png": b"no image"}).read_bytes()
    for contents, message in (
        (good[: len(good) // 2], r"cannot read .*bad\.zip as a zip of images"),
        (b"", r"cannot read .*bad\.zip as a zip of images"),
        (bytes(flipped), r"cannot read image 00000/img00000000\.png in .*bad\.zip: .*CRC.*; expected a whole "),
        (empty, r"bad\.zip holds no image file \(.*\); there is: 1 \.txt \(a\.txt\)"),
        (
            text,
            r"cannot read image a\.png in .*bad\.zip: cannot identify image file .*; expected a whole AVIF, .* or WEBP",
        ),
    ):
        (tmp_path / "bad.zip").write_bytes(contents)
        with pytest.raises(DataError, match=message) as caught:
            load_images(str(tmp_path / "bad.zip"), 8)
        assert "\n" not in str(caught.value)


def test_a_picture_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ddst.data.folders._LARGEST_MEMBER", len(PNGS[0]) - 1)
    with pytest.raises(DataError, match=r"unpacked it has \d+ bytes, expected at most"):
        load_images(str(zipped(tmp_path / "a.zip", FILES)), 8)


def test_only_published_splits_are_set_aside(tmp_path):
    for data in ("digits", write(tmp_path / "files", FILES), zipped(tmp_path / "a.zip", FILES)):
        with pytest.raises(DataError, match=r"sets no images aside, only CIFAR, STL-10 and TinyImageNet do"):
            load_images(str(data), 8, held_out=True)
