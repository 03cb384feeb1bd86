"""CIFAR in both published forms gives the same pixels and labels; what python batches name is never run."""

import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddst.data import DataError, load_images
from ddst.data.pickled import BatchReader
from ddst.data.pixels import resized
from helpers.datasets import CIFAR_10, binary_batch, by_python_2, by_python_3, images, python_batch, write

FORMS = ["python 2", "python 3", "binary"]


def cifar_10(root, form, planes, labels, train=CIFAR_10, test="test_batch"):
    """The images, shared out over the five batches; the last of them are the test images."""
    parts = zip([*train, test], np.array_split(planes, 6), np.array_split(labels, 6), strict=True)
    if form == "binary":
        return write(root, {f"{name}.bin": binary_batch(part, classes) for name, part, classes in parts})
    pickled = by_python_2 if form == "python 2" else by_python_3
    return write(root, {name: pickled(python_batch(part, classes.tolist())) for name, part, classes in parts})


def cifar_100(root, form, planes, fine):
    coarse, parts = [label // 5 for label in fine], (("train", slice(0, 4)), ("test", slice(4, None)))
    if form == "binary":
        return write(root, {f"{n}.bin": binary_batch(planes[s], coarse[s], fine[s]) for n, s in parts})
    pickled = by_python_2 if form == "python 2" else by_python_3
    files = {
        name: pickled({**python_batch(planes[s], fine[s], "fine_labels"), "coarse_labels": coarse[s]})
        for name, s in parts
    }
    return write(root, {**files, "meta": b"whatever"})


@pytest.mark.parametrize("form", FORMS)
def test_cifar_10_is_its_images_and_labels_in_order(tmp_path, form):
    planes, labels = images(12), np.arange(12) % 10
    data = cifar_10(tmp_path, form, planes, labels)
    train, test = load_images(str(data), 32), load_images(str(data), 32, held_out=True)
    assert np.array_equal(train.stored, planes[:10])
    assert train.labels.tolist() == labels[:10].tolist() and train.labels.dtype == torch.int64
    assert np.array_equal(test.stored, planes[10:]) and test.labels.tolist() == [0, 1]
    assert train.took.startswith("CIFAR-10, ") and train.took.endswith("10 classes") and train.note == ""


@pytest.mark.parametrize("named", [str.encode, str])
@pytest.mark.parametrize("protocol", range(2, 5))
def test_batches_that_were_pickled_again_are_read(tmp_path, named, protocol):
    """By NumPy 2, which calls its module `numpy._core`, after Python 3 had read their names as bytes or as texts."""
    planes, labels = images(6), [3, 1, 4, 1, 5, 9]
    for i, name in enumerate([*CIFAR_10, "test_batch"]):
        batch = python_batch(planes[i : i + 1], labels[i : i + 1])
        write(tmp_path, {name: pickle.dumps({named(key): value for key, value in batch.items()}, protocol)})
    read = load_images(str(tmp_path), 32)
    assert np.array_equal(read.stored, planes[:5]) and read.labels.tolist() == labels[:5]


@pytest.mark.parametrize("form", FORMS)
def test_cifar_100_has_its_fine_labels(tmp_path, form):
    planes, fine = images(6), [99, 0, 42, 17, 5, 98]
    data = cifar_100(tmp_path, form, planes, fine)
    train, test = load_images(str(data), 32), load_images(str(data), 32, held_out=True)
    assert np.array_equal(train.stored, planes[:4]) and train.labels.tolist() == fine[:4]
    assert np.array_equal(test.stored, planes[4:]) and test.labels.tolist() == fine[4:]
    assert train.took.startswith("CIFAR-100, ") and train.took.endswith("100 classes")


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(1, 3), st.sampled_from([8, 32, 48]), st.sampled_from("CF"))
def test_both_forms_are_the_same_pixels_and_labels(tmp_path_factory, seed, each, side, order):
    root, rng = tmp_path_factory.mktemp("cifar"), np.random.default_rng(seed)
    planes, labels = images(6 * each, seed=seed), rng.integers(0, 10, 6 * each)
    a = load_images(str(cifar_10(root / "binary", "binary", planes, labels)), side)
    batches = zip([*CIFAR_10, "test_batch"], np.split(planes, 6), np.split(labels, 6), strict=True)
    files = {n: by_python_2(python_batch(part, classes.tolist(), order=order)) for n, part, classes in batches}
    b = load_images(str(write(root / "python", files)), side)
    assert torch.equal(a.stored, b.stored) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("side", [16, 48])
def test_its_resizer_is_the_one_of_image_files(tmp_path, side):
    planes = images(6)
    data = cifar_10(tmp_path / "cifar", "binary", planes, np.zeros(6, np.int64))
    folder = tmp_path / "files"
    folder.mkdir()
    for i, image in enumerate(planes[:5]):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i}.png")
    stored = load_images(str(data), side).stored
    assert torch.equal(stored, load_images(str(folder), side).stored)
    first = resized(Image.fromarray(planes[0].transpose(1, 2, 0)), side)
    assert np.array_equal(stored[0].permute(1, 2, 0), first)


@pytest.mark.parametrize("form, name", [("binary", "data_batch_3.bin"), ("python 2", "data_batch_3")])
def test_a_missing_batch_is_named_with_what_is_expected(tmp_path, form, name):
    data = cifar_10(tmp_path, form, images(6), np.zeros(6, np.int64))
    (data / name).unlink()
    with pytest.raises(DataError, match=rf"is CIFAR-10, .*, without {name}: expected data_batch_1\S* to data_batch_5"):
        load_images(str(data), 32)
    (data / name.replace("data_batch_3", "test_batch")).unlink()
    with pytest.raises(DataError, match=r"without test_batch"):
        load_images(str(data), 32, held_out=True)


def test_a_missing_cifar_100_is_named(tmp_path):
    write(tmp_path, {"test": b"", "meta": b""})
    with pytest.raises(DataError, match=r"is CIFAR-100, python batches, without train: expected train there"):
        load_images(str(tmp_path), 32)


def damaged_python(change):
    batch = python_batch(images(2), [1, 2])
    return by_python_2({**batch, **change})


@pytest.mark.parametrize(
    "name, contents, message",
    [
        ("data_batch_2.bin", b"", r"it has 0 bytes, expected a multiple of 3,073"),
        ("data_batch_2.bin", bytes(3072), r"it has 3,072 bytes, expected a multiple of 3,073"),
        ("data_batch_2.bin", b"\x0a" + bytes(3072), r"it has labels from 10 to 10, expected 0 to 9"),
        ("data_batch_2", b"", r"exhausted|EOF|[Rr]an out"),
        ("data_batch_2", b"\x80\x02}r\xff\xff\xff\x3f.", r"it counts 1,073,741,823 objects after 2 instructions"),
        (
            "data_batch_2",
            by_python_2(python_batch(images(2), [1, 2]))[:4000],
            r"only.*; expected the whole pickled dict, as published",
        ),
        ("data_batch_2", damaged_python({"labels": [1]}), r"shape \(2, 3072\) beside 1 labels, expected \[N, 3,072\]"),
        ("data_batch_2", damaged_python({"labels": [1, -1]}), r"labels from -1 to 1, expected 0 to 9"),
        ("data_batch_2", damaged_python({"data": b"text"}), r"expected a dict with an array 'data' and a list"),
        ("data_batch_2", damaged_python({"labels": b"ab"}), r"expected a dict with an array 'data' and a list"),
        ("data_batch_2", pickle.dumps([1, 2], 2), r"expected a dict with an array 'data' and a list"),
        ("data_batch_2", by_python_3(python_batch(images(2).astype(np.int16), [1, 2])), r"not one of bytes"),
        (
            "data_batch_2",
            by_python_2(python_batch(images(2), [1, 2])).replace(b"(K\x01J\x02\0\0\0", b"(K\x01J\xff\0\0\0"),
            r"cannot reshape",
        ),
    ],
)
def test_damaged_batches_are_one_line_that_names_the_file(tmp_path, name, contents, message):
    data = cifar_10(tmp_path, "binary" if name.endswith("bin") else "python 2", images(6), np.zeros(6, np.int64))
    (data / name).write_bytes(contents)
    with pytest.raises(DataError, match=message) as caught:
        load_images(str(data), 32)
    assert str(data / name) in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=150)
@given(st.data())
def test_bits_that_flipped_are_read_or_refused_by_name(tmp_path_factory, data):
    """Anywhere, but mostly where the instructions are."""
    batch = bytearray(by_python_2(python_batch(images(1), [1])))
    pixels = batch.index(images(1).tobytes())
    places = st.one_of(*[st.integers(0, pixels - 1)] * 3, st.integers(pixels, len(batch) - 1))
    for place in data.draw(st.lists(places, min_size=1, max_size=3)):
        batch[place] ^= 1 << data.draw(st.integers(0, 7))
    root = tmp_path_factory.mktemp("cifar")
    write(root, {name: by_python_2(python_batch(images(1), [1])) for name in CIFAR_10} | {"data_batch_4": bytes(batch)})
    try:
        said = str(tuple(load_images(str(root), 32).stored.shape))
    except DataError as error:
        said = str(error)
    assert said == "(5, 3, 32, 32)" or said.startswith(f"cannot read {root}/data_batch_4 as CIFAR-10, python batches: ")
    assert "\n" not in said


class Foreign:
    """Harmless, and none of CIFAR's."""

    made = 0

    def __init__(self):
        type(self).made += 1

    def __reduce__(self):
        return Foreign, ()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_foreign_class_is_refused_and_not_made(tmp_path, protocol):
    contents = pickle.dumps({b"data": Foreign(), b"labels": [1]}, protocol)
    before = Foreign.made
    pickle.loads(contents)
    assert Foreign.made == before + 1  # What an ordinary reader does.
    data = cifar_10(tmp_path, "python 2", images(6), np.zeros(6, np.int64))
    (data / "data_batch_1").write_bytes(contents)
    with pytest.raises(DataError, match=r"data_batch_1 as CIFAR-10, .*: it names .*Foreign, which no CIFAR batch does"):
        load_images(str(data), 32)
    assert Foreign.made == before + 1


@pytest.mark.parametrize(
    "name",
    [
        "builtins\neval",
        "os\nsystem",
        "numpy\nload",
        "_codecs\ndecode",
        "numpy.core.multiarray\nscalar",
        "numpy._core.multiarray\nscalar",
        "numpy._core.multiarray\n_reconstruct.__globals__",
    ],
)
def test_nothing_but_the_four_names_is_admitted(name):
    with pytest.raises(pickle.UnpicklingError, match="which no CIFAR batch does"):
        BatchReader(io.BytesIO(b"\x80\x02c" + name.encode() + b"\n.")).load()


def test_outside_objects_and_other_encodings_are_refused():
    with pytest.raises(pickle.UnpicklingError, match="outside the file"):
        BatchReader(io.BytesIO(b"\x80\x02K\x01Q.")).load()
    with pytest.raises(pickle.UnpicklingError, match="another encoding than latin1"):
        BatchReader(io.BytesIO(b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0zlib\x86R.")).load()


def test_numpy_is_not_handed_what_the_file_says():
    """It would believe the state of an array of objects; here that stays what stands in the file."""
    read = BatchReader(io.BytesIO(by_python_3({"data": np.array([["text"]], dtype=object)}))).load()
    with pytest.raises(ValueError, match="not one of bytes"):
        read[b"data"].bytes_array()
