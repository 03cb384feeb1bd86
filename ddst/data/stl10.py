"""STL-10 in the binary form in which it is published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddst.data.files import shown
from ddst.data.image_set import DataError
from ddst.data.source import Pixels, Source, as_labels, resized_planes

_SIDE, _CLASSES = 96, 10
_VALUES = 3 * _SIDE * _SIDE
_UNLABELLED = "unlabeled_X.bin"
#: A folder with one of these is STL-10.
STL_10 = ("train_X.bin", "test_X.bin")


def stl10(path: Path, held_out: bool) -> Source | None:
    """The STL-10 that lies in a folder; None where none does.

    A folder with ``train_X.bin`` or ``test_X.bin`` is one. Read are ``train_X.bin`` and, where it lies there,
    ``unlabeled_X.bin`` after it, as usual for GANs: then there are no labels. Without that file, and for the test
    images, the labels of ``train_y.bin`` and ``test_y.bin`` are, from 0 on. The pixels of a plane are stored by
    columns.

    Raises:
        DataError: a file is missing; when it is read: it is damaged.
    """
    if not any((path / name).is_file() for name in STL_10):
        return None
    split = "test" if held_out else "train"
    names = [f"{split}_X.bin"]
    labelled = held_out or not (path / _UNLABELLED).is_file()
    labels_of = path / f"{split}_y.bin"
    names.append(labels_of.name if labelled else _UNLABELLED)
    for name in names:
        if not (path / name).is_file():
            raise DataError(f"data {shown(path)} is STL-10, without {name}: expected {' and '.join(names)} there")

    def read(resolution: int) -> Pixels:
        try:
            parts = [_planes(path / name) for name in names if name.endswith("_X.bin")]
            labels = _labels(labels_of, len(parts[0])) if labelled else None
        except OSError as error:
            raise DataError(f"cannot read STL-10: {shown(error.filename)}: {error.strerror}") from error
        return Pixels(resized_planes(parts, resolution), None if labels is None else as_labels(labels))

    classes = f", {_CLASSES} classes" if labelled else ", without labels"
    return Source(f"STL-10, binary {' and '.join(names)}{classes}", [path / name for name in names], read)


def _planes(file: Path) -> NDArray[np.uint8]:
    """`[N, 3, 96, 96]`, mapped: the unlabelled ones are 2.8 GB."""
    size = file.stat().st_size
    if not size or size % _VALUES:
        raise DataError(
            f"cannot read {shown(file)} as STL-10: it has {size:,} bytes, expected a multiple of {_VALUES:,}"
        )
    return np.memmap(file, np.uint8, "r").reshape(-1, 3, _SIDE, _SIDE).transpose(0, 1, 3, 2)


def _labels(file: Path, count: int) -> NDArray[np.int64]:
    labels = np.fromfile(file, np.uint8).astype(np.int64) - 1
    if len(labels) != count or labels.min() < 0 or labels.max() >= _CLASSES:
        raise DataError(f"cannot read {shown(file)} as STL-10: expected {count:,} bytes from 1 to {_CLASSES}")
    return labels
