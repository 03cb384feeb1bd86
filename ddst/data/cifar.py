"""CIFAR-10 and CIFAR-100 in both forms in which they are published."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddst.data.files import shown
from ddst.data.image_set import DataError
from ddst.data.pickled import Array, read_batch
from ddst.data.source import Pixels, Source, as_labels, listed, resized_planes

_SIDE = 32
_VALUES = 3 * _SIDE * _SIDE  # of an image: all of red, all of green, all of blue, row by row

Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]


def _binary(head: int) -> Callable[[Path], Batch]:
    """A reader of records of `head` bytes of labels, of which the last one counts, and the values of an image."""

    def read(file: Path) -> Batch:
        data = np.fromfile(file, np.uint8)
        if not data.size or data.size % (head + _VALUES):
            raise ValueError(f"it has {data.size:,} bytes, expected a multiple of {head + _VALUES:,}, a record each")
        records = data.reshape(-1, head + _VALUES)
        return records[:, head:], records[:, head - 1].astype(np.int64)

    return read


def _pickled(key: bytes) -> Callable[[Path], Batch]:
    """A reader of pickled dicts with the images in ``data`` and their labels in `key`."""

    def read(file: Path) -> Batch:
        contents = file.read_bytes()
        try:
            batch = read_batch(contents)
        except Exception as error:  # A damaged pickle makes its reader raise many types, the same to the user.
            why = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{why}; expected the whole pickled dict, as published") from error
        names = (b"data", key)
        held = batch if isinstance(batch, dict) else {}
        # Names are texts where somebody read them as such and pickled them again.
        data, labels = (held.get(name, held.get(name.decode())) for name in names)
        if not isinstance(data, Array) or not isinstance(labels, list) or any(type(i) is not int for i in labels):
            raise ValueError(f"expected a dict with an array 'data' and a list of whole numbers '{key.decode()}'")
        values = data.bytes_array()
        if values.shape != (len(labels), _VALUES) or not labels:
            raise ValueError(f"'data' has shape {values.shape} beside {len(labels)} labels, expected [N, {_VALUES:,}]")
        return values, np.array(labels, dtype=np.int64)

    return read


@dataclass(frozen=True)
class _Form:
    """One of the published forms; a folder is of it where at least `enough` of all its files lie there."""

    name: str
    train: Sequence[str]
    test: str
    more: Sequence[str]
    enough: int
    classes: int
    read: Callable[[Path], Batch]


_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
_FORMS = (
    _Form("CIFAR-10, python batches", _BATCHES, "test_batch", (), 1, 10, _pickled(b"labels")),
    _Form("CIFAR-10, binary", [f"{name}.bin" for name in _BATCHES], "test_batch.bin", (), 1, 10, _binary(1)),
    # Names so common that one of them says nothing.
    _Form("CIFAR-100, python batches", ["train"], "test", ["meta"], 2, 100, _pickled(b"fine_labels")),
    _Form("CIFAR-100, binary", ["train.bin"], "test.bin", ["fine_label_names.txt"], 2, 100, _binary(2)),
)


def cifar(path: Path, held_out: bool) -> Source | None:
    """The CIFAR that lies in a folder, with its (fine) labels; None where none does.

    A folder holds the files of one form under the names in the published archives: ``data_batch_1`` to
    ``data_batch_5`` and ``test_batch``, with or without ``.bin``; or ``train`` and ``test``, likewise (of these two,
    or one of them and ``meta`` or ``fine_label_names.txt``). Python batches are read by
    ``ddst.data.pickled.BatchReader``, which runs nothing of what they name.

    Raises:
        DataError: a file is missing; when it is read: it is damaged.
    """
    form = _form(lambda name: (path / name).is_file())
    return None if form is None else _source(form, path, [form.test] if held_out else form.train)


def cifar_of(names: Container[str]) -> str:
    """The CIFAR that files of these names in one folder are; "" if none.

    >>> cifar_of({"data_batch_2", "readme.html"}), cifar_of({"train", "readme.html"})
    ('CIFAR-10, python batches', '')
    """
    form = _form(names.__contains__)
    return "" if form is None else form.name


def _form(there: Callable[[str], bool]) -> _Form | None:
    return next((f for f in _FORMS if sum(map(there, (*f.train, f.test, *f.more))) >= f.enough), None)


def _source(form: _Form, path: Path, names: Sequence[str]) -> Source:
    for name in names:
        if not (path / name).is_file():
            raise DataError(f"data {shown(path)} is {form.name}, without {name}: expected {listed(names)} there")

    def read(resolution: int) -> Pixels:
        batches = [_batch(form, path / name) for name in names]
        planes = [values.reshape(-1, 3, _SIDE, _SIDE) for values, _ in batches]
        return Pixels(resized_planes(planes, resolution), as_labels(np.concatenate([labels for _, labels in batches])))

    return Source(f"{form.name} {listed(names)}, {form.classes} classes", [path / name for name in names], read)


def _batch(form: _Form, file: Path) -> Batch:
    try:
        values, labels = form.read(file)
        if labels.min() < 0 or labels.max() >= form.classes:
            raise ValueError(f"it has labels from {labels.min()} to {labels.max()}, expected 0 to {form.classes - 1}")
    except (ValueError, TypeError, OverflowError, OSError) as error:
        why = shown(" ".join(str(error).split()))
        raise DataError(f"cannot read {shown(file)} as {form.name}: {why}") from error
    return values, labels
