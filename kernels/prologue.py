"""Device functions of the fused half block, and the tables of its norm.

The norm of a pixel's channels is ``z = (x − mean) · scale + shift``: the difference comes first, so that nothing
cancels where the mean is large. mean is float32 ``[C]``; scale and shift are float32 ``[C]`` or ``[N, C]``. NORM says
how a tile of pixels finds its own: 0 there is no norm, 1 per channel, 2 per sample and channel where all its pixels are
of one sample, whose row was found beforehand, 3 per sample and channel, looked up for every pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import native_rows
from .tile import pixels


class Tables(NamedTuple):
    """What kernels read of a norm; kind: 0 none, 1 per channel, 2 per sample and channel."""

    kind: int
    mean: Tensor
    scale: Tensor
    shift: Tensor

    @staticmethod
    def of(
        like: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float
    ) -> Tables:
        """The tables of a norm; without one, ``like`` in their places, which no kernel reads."""
        if mean is None or var is None:
            return Tables(0, like, like, like)
        scale = torch.rsqrt(var.float() + eps)
        shift = torch.zeros_like(scale)
        if gamma is not None and beta is not None:
            scale, shift = scale * gamma, beta.float()
        return Tables(scale.dim(), native_rows(mean.float()), native_rows(scale), native_rows(shift))


@triton.jit
def means(channel, have, mean, NORM: tl.constexpr):
    """What is taken from channels, ``[1, channels]``."""
    if NORM == 0:
        return 0.0
    else:
        return tl.load(mean + channel, mask=have, other=0.0)[None, :]


@triton.jit
def factors(n, channel, have, live, C, scale, shift, NORM: tl.constexpr):
    """scale and shift of channels of pixels of the samples n, to be broadcast to ``[pixels, channels]``."""
    if NORM == 0:
        return 1.0, 0.0
    elif NORM < 3:
        return (
            tl.load(scale + channel, mask=have, other=0.0)[None, :],
            tl.load(shift + channel, mask=have, other=0.0)[None, :],
        )
    else:
        at = n[:, None] * C + channel[None, :]
        ok = live[:, None] & have[None, :]
        return tl.load(scale + at, mask=ok, other=0.0), tl.load(shift + at, mask=ok, other=0.0)


@triton.jit
def row_of_sample(table, n, C, NORM: tl.constexpr):
    """Where a tile of pixels of sample n begins to read a table."""
    if NORM == 2:
        table += tl.cast(n, tl.int64) * C
    return table


@triton.jit
def leaky(z, by, SLOPE: tl.constexpr):
    """``by`` where z is above zero, SLOPE times that elsewhere; a NaN in ``by`` stays."""
    if SLOPE == 1.0:
        return by
    elif SLOPE == 0.0:
        return tl.where(z <= 0.0, 0.0, by)
    else:
        return tl.where(z > 0.0, by, by * SLOPE)


@triton.jit
def activated(x, ok, mean, scale, shift, NORM: tl.constexpr, SLOPE: tl.constexpr):
    """What a convolution multiplies for the stored x: normalized, activated, zero where it is not ok."""
    z = x.to(tl.float32)
    if NORM > 0:
        z = (z - mean) * scale + shift
    return tl.where(ok, leaky(z, z, SLOPE), 0.0).to(x.dtype)


@triton.jit
def squares(first, COUNT: tl.constexpr, height, width, total, SIDE: tl.constexpr):
    """As :func:`.tile.pixels`; with SIDE = 2 in an image of twice the sides, four at a time: those of one pixel of
    ``height`` × ``width``, of which there are ``total``.
    """
    if SIDE == 1:
        return pixels(first, COUNT, height, width, total)
    else:
        m = first + tl.arange(0, COUNT)
        t = m // 4 // width
        n = t // height
        return n, (t - n * height) * 2 + m % 4 // 2, (m // 4 - t * width) * 2 + m % 2, m // 4 < total


@triton.jit
def square_sums(acc, SIDE: tl.constexpr):
    """Sums over the pixels that belong together in :func:`squares`."""
    if SIDE == 1:
        return acc
    else:
        return tl.sum(tl.reshape(acc, (acc.shape[0] // 4, 4, acc.shape[1])), axis=1)


def kind_for_tiles(kind: int, pixels: int, tile: int) -> int:
    """NORM for tiles of so many pixels of images of so many."""
    return 3 if kind == 2 and pixels % tile != 0 else kind
