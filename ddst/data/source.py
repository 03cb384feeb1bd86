"""A data set on disk that was recognised: which files it is made of, and how they become pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddst.data.files import ImageFiles
from ddst.data.pixels import resized


class Pixels(NamedTuple):
    """What the files of a data set hold.

    Attributes:
        stored: `[N, 3, resolution, resolution]` uint8.
        labels: `[N]` int64, or None.
        over_white: how many of the images were transparent anywhere.
    """

    stored: Tensor
    labels: Tensor | None
    over_white: int = 0


@dataclass(frozen=True)
class Source:
    """A data set of which no pixel is read yet.

    Attributes:
        took: one line: its form, and what of it is read.
        files: everything that images and labels are read from.
        read: resolution -> pixels; raises :class:`ddst.data.DataError`.
        left_out: what lies there and is not read.
    """

    took: str
    files: Sequence[Path]
    read: Callable[[int], Pixels]
    left_out: ImageFiles = field(default_factory=ImageFiles)


def resized_planes(parts: Sequence[NDArray[np.uint8]], resolution: int) -> Tensor:
    """Arrays `[N, 3, side, side]`, one after the other, at `resolution`, resized as image files are."""
    stored = torch.empty(sum(map(len, parts)), 3, resolution, resolution, dtype=torch.uint8)
    into, start = stored.numpy(), 0
    for planes in parts:
        if planes.shape[-1] == resolution:
            into[start : start + len(planes)] = planes
        else:
            for i, image in enumerate(planes, start):
                picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
                into[i] = resized(picture, resolution).transpose(2, 0, 1)
        start += len(planes)
    return stored


def as_labels(labels: Any) -> Tensor:
    """Whole numbers as an int64 tensor of its own memory."""
    return torch.tensor(np.asarray(labels, dtype=np.int64))


def listed(names: Sequence[str]) -> str:
    """The first and the last name where there are many.

    >>> listed(["a", "b", "c"])
    'a to c'
    """
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
