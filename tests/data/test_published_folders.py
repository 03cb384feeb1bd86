"""STL-10 and TinyImageNet: which files count, orientation, labels, grey images; one line for what is missing."""

import numpy as np
import pytest
import torch

from ddst.data import DataError, load_images
from helpers.datasets import images, png, write, zipped


def stl_10(root, *, unlabelled=False, count=3):
    """Planes are stored by columns. Returns folder and images by split."""
    splits = {"train": images(count, 96), "test": images(2, 96, seed=1)}
    labels = {"train": [10, 1, 5][:count], "test": [2, 3]}
    if unlabelled:
        splits["unlabeled"] = images(2, 96, seed=2)
    files = {f"{name}_X.bin": planes.transpose(0, 1, 3, 2).tobytes() for name, planes in splits.items()}
    files |= {f"{name}_y.bin": bytes(classes) for name, classes in labels.items()}
    return write(root, {**files, "class_names.txt": "airplane\n", "fold_indices.txt": "0 1\n"}), splits


def test_stl_10_is_upright_with_labels_from_0(tmp_path):
    data, splits = stl_10(tmp_path)
    train, test = load_images(str(data), 96), load_images(str(data), 96, held_out=True)
    assert np.array_equal(train.stored, splits["train"]) and train.labels.tolist() == [9, 0, 4]
    assert np.array_equal(test.stored, splits["test"]) and test.labels.tolist() == [1, 2]
    assert train.took == "STL-10, binary train_X.bin and train_y.bin, 10 classes"
    assert load_images(str(data), 48).stored.shape == (3, 3, 48, 48)


def test_stl_10_takes_the_unlabelled_images_where_they_are(tmp_path):
    data, splits = stl_10(tmp_path, unlabelled=True)
    train = load_images(str(data), 96)
    assert np.array_equal(train.stored, np.concatenate([splits["train"], splits["unlabeled"]]))
    assert train.labels is None
    assert train.took == "STL-10, binary train_X.bin and unlabeled_X.bin, without labels"
    assert load_images(str(data), 96, held_out=True).labels.tolist() == [1, 2]


def test_wrong_stl_10_is_one_line(tmp_path):
    data, _ = stl_10(tmp_path)
    (data / "test_X.bin").write_bytes(bytes(27647))
    (data / "train_y.bin").write_bytes(bytes([1, 2, 11]))
    for held_out, message in (
        (False, r"train_y.bin .*expected 3 bytes from 1 to 10"),
        (True, "27,647 bytes, expected"),
    ):
        with pytest.raises(DataError, match=message):
            load_images(str(data), 96, held_out=held_out)
    (data / "train_y.bin").unlink()
    with pytest.raises(DataError, match=r"without train_y\.bin: expected train_X\.bin and train_y\.bin there"):
        load_images(str(data), 96)
    (data / "train_X.bin").unlink()
    with pytest.raises(DataError, match=r"without train_X\.bin"):
        load_images(str(data), 96)


GREY = np.full((8, 8), 90, np.uint8)
WNIDS = ["n03", "n01", "n02"]


def tiny(root):
    """Class i holds pictures of the grey value 40·i + j; n02 is stored in grey."""
    files = {"wnids.txt": "\n".join(WNIDS) + "\n", "words.txt": "n01\tgoldfish\n"}
    for i, wnid in enumerate(sorted(WNIDS)):
        for j in range(2):
            level = np.full((64, 64) if wnid == "n02" else (64, 64, 3), 40 * i + j, np.uint8)
            files[f"train/{wnid}/images/{wnid}_{j}.JPEG"] = png(level, "JPEG")
        files[f"train/{wnid}/{wnid}_boxes.txt"] = f"{wnid}_0.JPEG\t0\t0\t3\t3\n"
    for j in range(3):
        files[f"val/images/val_{j}.JPEG"] = png(np.full((64, 64, 3), 100 + j, np.uint8), "JPEG")
    files["val/val_annotations.txt"] = "".join(
        f"val_{j}.JPEG\t{wnid}\t0\t0\t62\t62\n" for j, wnid in enumerate(("n02", "n03", "n01"))
    )
    files["test/images/test_0.JPEG"] = png(np.zeros((64, 64), np.uint8), "JPEG")
    return write(root, files)


def test_tiny_imagenet_has_labels_in_sorted_order_and_grey_images(tmp_path):
    train = load_images(str(tiny(tmp_path)), 64)
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert train.stored.float().mean(dim=(1, 2, 3)).round().tolist() == [0, 1, 40, 41, 80, 81]
    assert torch.equal(train.stored[2, 0], train.stored[2, 2])
    assert train.took == "TinyImageNet train, 3 classes" and train.note == ""


def test_tiny_imagenets_validation_images_have_the_labels_of_their_list(tmp_path):
    held = load_images(str(tiny(tmp_path)), 64, held_out=True)
    assert held.labels.tolist() == [1, 2, 0]
    assert held.stored[:, 0, 5, 5].tolist() == [100, 101, 102]
    assert held.took == "TinyImageNet val, 3 classes"


@pytest.mark.parametrize(
    "name, contents, message",
    [
        ("wnids.txt", "", r"wnids\.txt is damaged: expected a line like n01443537 for each class, got none"),
        ("wnids.txt", "n01\n../../etc\n", r"wnids\.txt is damaged: .* got \.\./\.\./etc"),
        ("wnids.txt", "n01\nn07\n", r"train/n07/images: No such file or directory; expected image files there"),
        (
            "val/val_annotations.txt",
            "val_0.JPEG\tn09\t1\n",
            r"line 1: expected the name of an image, a tab and its wnid",
        ),
        ("val/val_annotations.txt", "val_0.JPEG\n", r"line 1: expected"),
        ("val/val_annotations.txt", "val_0.JPEG\tn01\nval_0.JPEG\tn02\n", r"line 2: expected"),
        ("val/val_annotations.txt", "val_0.JPEG\tn01\n", r"it has no line for val_1\.JPEG"),
        ("val/images/val_1.JPEG", None, r"is TinyImageNet, without val/images/val_1\.JPEG"),
        (
            "val/val_annotations.txt",
            None,
            r"cannot be read: .*val_annotations\.txt: No such file or directory; expected lines there, each the name",
        ),
    ],
)
def test_wrong_tiny_imagenet_is_one_line(tmp_path, name, contents, message):
    data = tiny(tmp_path)
    if contents is None:
        (data / name).unlink()
    else:
        (data / name).write_text(contents)
    with pytest.raises(DataError, match=message) as caught:
        load_images(str(data), 16, held_out=name.startswith("val"))
    assert "\n" not in str(caught.value)


def test_tiny_imagenet_without_its_classes_is_named_by_its_other_list(tmp_path):
    data = tiny(tmp_path / "set")
    (data / "wnids.txt").unlink()
    files = {f"t/{f.relative_to(data).as_posix()}": f.read_bytes() for f in data.rglob("*") if f.is_file()}
    for path in (data, zipped(tmp_path / "tiny.zip", files)):
        with pytest.raises(DataError, match=r"^TinyImageNet cannot be read: .*wnids\.txt.*: No such .*a wnid like n0"):
            load_images(str(path), 16)


def test_data_sets_that_lie_deeper_are_named_with_where(tmp_path):
    """As image files TinyImageNet would be of one class, training and validation images together."""
    tiny(tmp_path / "set/more/tiny-imagenet-200")
    batch = {"data_batch_2": b"", "batches.meta": b""}
    write(tmp_path / "cifar/cifar-10-batches-py", batch)
    write(tmp_path / "several", {"cifar/test.bin": b"", "cifar/fine_label_names.txt": b"", "cats/a.png": png(GREY)})
    stl_10(tmp_path / "several/stl10_binary")
    tiny(tmp_path / "several/tiny")
    packed = zipped(tmp_path / "cifar.zip", batch)
    for data, message in (
        ("set", "set holds TinyImageNet in more/tiny-imagenet-200: give that folder"),
        ("cifar", "cifar holds CIFAR-10, python batches in cifar-10-batches-py: give that folder"),
        (
            "several",
            "several holds CIFAR-100, binary in cifar, STL-10 in stl10_binary, TinyImageNet in tiny: "
            "give one of these folders",
        ),
        (packed.name, "cifar.zip holds CIFAR-10, python batches: unpack it and give that folder"),
    ):
        for held_out in (False, True):
            with pytest.raises(DataError) as caught:
                load_images(str(tmp_path / data), 16, held_out=held_out)
            assert str(caught.value).endswith(message)
    # What a list labels.
    write(tmp_path / "several", {"dataset.json": '{"labels": null}'})
    assert len(load_images(str(tmp_path / "several"), 16)) == 11


@pytest.mark.parametrize("root", ["", "tiny-imagenet-200/"])
def test_tiny_imagenets_zip_is_its_folder(tmp_path, root):
    data = tiny(tmp_path / "set")
    files = {root + file.relative_to(data).as_posix(): file.read_bytes() for file in data.rglob("*") if file.is_file()}
    packed = zipped(tmp_path / "tiny.zip", files)
    for held_out in (False, True):
        a, b = (load_images(str(path), 64, held_out=held_out) for path in (data, packed))
        assert a.fingerprint() == b.fingerprint() and a.labels.tolist() == b.labels.tolist()
        assert b.took == f"{a.took}, in a zip" and b.note == ""


@pytest.mark.parametrize(
    "gone, message",
    [
        ("train/n01/", r"t/train/n01/images in .*tiny\.zip: No such file or directory; expected image files there"),
        ("val/images/val_1.JPEG", r"tiny\.zip is TinyImageNet, without val/images/val_1\.JPEG"),
        (
            "val/val_annotations.txt",
            r"t/val/val_annotations\.txt in .*tiny\.zip: No such file or directory; expected lines",
        ),
    ],
)
def test_a_wrong_zip_of_tiny_imagenet_is_one_line(tmp_path, gone, message):
    data = tiny(tmp_path / "set")
    names = (file.relative_to(data).as_posix() for file in data.rglob("*") if file.is_file())
    packed = zipped(
        tmp_path / "tiny.zip", {f"t/{name}": (data / name).read_bytes() for name in names if not name.startswith(gone)}
    )
    with pytest.raises(DataError, match=message) as caught:
        load_images(str(packed), 16, held_out=gone.startswith("val"))
    assert "\n" not in str(caught.value)
