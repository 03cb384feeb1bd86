"""Seeded coloured shapes, ten classes: a colour data set that needs no file, the same bytes on every platform."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from ddst.data.image_set import ImageSet

COUNT = 2000
SEED = 0
_UNIT = 4096  # Lengths are whole numbers of which a picture's side has so many, at every resolution.
_SAMPLES = 4  # Points along each side of a pixel, at which a shape is looked up.

Ints = NDArray[np.int64]


def _disc(x: Ints, y: Ints, r: Ints) -> NDArray[np.bool_]:
    return x * x + y * y <= r * r


def _square(x: Ints, y: Ints, r: Ints) -> NDArray[np.bool_]:
    return np.maximum(abs(x), abs(y)) <= r * 7 // 8


def _plus(x: Ints, y: Ints, r: Ints) -> NDArray[np.bool_]:
    return (np.minimum(abs(x), abs(y)) <= r // 4) & (np.maximum(abs(x), abs(y)) <= r)


#: Class by class: which points belong to the shape, by their place relative to its centre (y downwards) and its radius.
SHAPES: dict[str, Callable[[Ints, Ints, Ints], NDArray[np.bool_]]] = {
    "disc": _disc,
    "ring": lambda x, y, r: _disc(x, y, r) & ~_disc(x, y, r * 5 // 8),
    "square": _square,
    "frame": lambda x, y, r: _square(x, y, r) & ~_square(x, y, r * 5 // 8),
    "diamond": lambda x, y, r: abs(x) + abs(y) <= r,
    "triangle": lambda x, y, r: (4 * y <= 3 * r) & (2 * abs(x) <= y + r),
    "plus": _plus,
    "cross": lambda x, y, r: _plus((x + y) * 3 // 4, (x - y) * 3 // 4, r),
    "stripes": lambda x, y, r: _square(x, y, r) & ((y + r) * 4 // r % 2 == 1),
    "half disc": lambda x, y, r: _disc(x, y, r) & (y >= 0),
}


def shapes(resolution: int, count: int = COUNT, seed: int = SEED) -> ImageSet:
    """pixel = (a · fore + (16 − a) · back) / 16, a of 16 points of the pixel lying within a shape.

    Each picture shows one shape on one ground. Drawn uniformly: the centre within an eighth of the side from the
    middle, the radius from a fifth to three eighths of the side, the shape's colour, and the ground's, which differs
    from it by at least 64 of 255 in each channel before the light, which makes the ground up to 40 brighter or
    darker from top to bottom.

    Args:
        resolution: side in pixels. Pictures are drawn, not resized, so the same set exists at every one.
        count: pictures; class `i % 10` of picture `i`, in the order of `SHAPES`.
        seed: of all draws.

    Returns:
        `count` pictures of three channels, uint8, with labels.

    Numerics: whole numbers only, drawn by numpy's `RandomState`, whose streams are frozen: the same bytes everywhere.

    Cost: half a second at 32.

    Example:
        >>> pictures = shapes(8, count=10)
        >>> pictures.stored.shape, pictures.labels.tolist()
        (torch.Size([10, 3, 8, 8]), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    random = np.random.RandomState(seed)

    def drawn(low: int, high: int, *columns: int) -> Ints:
        return random.randint(low, high + 1, size=(count, *columns), dtype=np.int64)

    middle, eighth = _UNIT // 2, _UNIT // 8
    centre_x, centre_y = drawn(middle - eighth, middle + eighth), drawn(middle - eighth, middle + eighth)
    radius = drawn(_UNIT // 5, _UNIT * 3 // 8)
    fore = drawn(0, 255, 3)
    back = (fore + drawn(64, 192, 3)) % 256
    light = drawn(-40, 40)
    points = (2 * np.arange(resolution * _SAMPLES, dtype=np.int64) + 1) * _UNIT // (2 * resolution * _SAMPLES)
    rows = 2 * np.arange(resolution, dtype=np.int64) + 1 - resolution
    ground = back[:, :, None] + light[:, None, None] * rows // resolution
    ground = np.clip(ground, 0, 255)[:, :, :, None]
    stored = np.empty((count, 3, resolution, resolution), dtype=np.uint8)
    for label, shape in enumerate(SHAPES.values()):
        chosen = slice(label, None, len(SHAPES))
        x = points[None, None, :] - centre_x[chosen, None, None]
        y = points[None, :, None] - centre_y[chosen, None, None]
        inside = shape(x, y, radius[chosen, None, None])
        parts = inside.reshape(-1, resolution, _SAMPLES, resolution, _SAMPLES).sum(axis=(2, 4), dtype=np.int64)
        a, whole = parts[:, None], _SAMPLES * _SAMPLES
        colours = a * fore[chosen, :, None, None] + (whole - a) * ground[chosen] + whole // 2
        stored[chosen] = colours // whole
    labels = torch.arange(count) % len(SHAPES)
    return ImageSet("shapes", torch.from_numpy(stored), 255.0, labels, took="coloured shapes drawn here, 10 classes")
