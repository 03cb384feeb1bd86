"""Mean and variance of every channel, from tiles of pixels whose moments are merged, so that nothing cancels.

A tile has its mean and its sum of squared differences from that mean; they are merged by the formula of Chan, Golub and
LeVeque, differences being taken from the mean so far. Always in the same order: the same bits at every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, native

_PIXELS, _CHANNELS = 128, 64


@triton.jit
def store_moments(v, live, partial, row, c, C):
    """Writes mean and squared differences of the live pixels of a tile, ``[pixels, channels]``, as row ``row``."""
    count = tl.maximum(tl.sum(live.to(tl.int32), axis=0), 1).to(tl.float32)
    v = tl.where(live[:, None], v, 0.0)
    mean = tl.sum(v, axis=0) / count
    away = tl.where(live[:, None], v - mean[None, :], 0.0)
    at = partial + tl.cast(row, tl.int64) * 2 * C + c
    tl.store(at, mean, mask=c < C)
    tl.store(at + C, tl.sum(away * away, axis=0), mask=c < C)


@triton.jit(do_not_specialize=["pixels", "C"])
def tile_moments_kernel(x, partial, pixels, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Program (t, b): tile t of the pixels, the b-th channels."""
    m = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live = m < pixels
    at = m.to(tl.int64)[:, None] * C + c[None, :]
    v = tl.load(x + at, mask=live[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    store_moments(v, live, partial, tl.program_id(0), c, C)


@triton.jit(do_not_specialize=["tiles", "length", "pixels", "C"])
def merge_kernel(partial, moments, tiles, length, pixels, C, TILES: tl.constexpr, CHANNELS: tl.constexpr):
    """The moments of ``pixels`` pixels from those of tiles of ``length`` each, the last may have fewer."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    have = c < C
    mean = tl.load(partial + c, mask=have, other=0.0)
    squared = tl.zeros((CHANNELS,), dtype=tl.float32)
    before = tl.program_id(0) * 0
    for first in tl.range(0, tiles, TILES):
        t = first + tl.arange(0, TILES)
        ok = (t < tiles)[:, None] & have[None, :]
        count = tl.where(t < tiles, tl.minimum(pixels - t * length, length), 0)
        at = partial + t.to(tl.int64)[:, None] * 2 * C + c[None, :]
        away = tl.where(ok, tl.load(at, mask=ok, other=0.0) - mean[None, :], 0.0)
        weighted = away * count.to(tl.float32)[:, None]
        added = tl.sum(weighted, axis=0)
        before += tl.sum(count, axis=0)
        step = added / before.to(tl.float32)
        within = tl.sum(tl.load(at + C, mask=ok, other=0.0), axis=0)
        squared += within + tl.sum(weighted * away, axis=0) - added * step
        mean += step
    tl.store(moments + c, mean, mask=have)
    tl.store(moments + C + c, squared / pixels, mask=have)


def partial_moments(like: Tensor, tiles: int, channels: int) -> Tensor:
    """Room for the moments of tiles."""
    return torch.empty(tiles, 2, channels, dtype=torch.float32, device=like.device)


def merge_launch(tiles: int, length: int, pixels: int, channels: int) -> Launch:
    constants = {"TILES": 128, "CHANNELS": 16}
    return Launch(merge_kernel, (-(-channels // 16),), (tiles, length, pixels, channels), constants, 4, 1)


def tile_launch(pixels: int, channels: int) -> Launch:
    grid = (-(-pixels // _PIXELS), -(-channels // _CHANNELS))
    return Launch(tile_moments_kernel, grid, (pixels, channels), {"PIXELS": _PIXELS, "CHANNELS": _CHANNELS}, 4, 1)


def merged(partial: Tensor, length: int, pixels: int) -> Tensor:
    """``[2, C]`` of ``pixels`` pixels, from :func:`partial_moments` of tiles of ``length``."""
    tiles, _, channels = partial.shape
    moments = partial.new_empty(2, channels)
    merge_launch(tiles, length, pixels, channels)(partial, moments)
    return moments


def channel_moments(input: Tensor) -> Tensor:
    """``[2, C]``, float32: mean and ``1/n Σ (x − mean)²`` of every channel of ``[N, C, H, W]``; NaN of no pixels.

    Args:
        input: float32, float16 or bfloat16; channels_last memory is read as it is, anything else copied.
    """
    channels, pixels = input.shape[1], input.shape[0] * input.shape[2] * input.shape[3]
    if input.numel() == 0:
        return torch.full((2, channels), float("nan"), dtype=torch.float32, device=input.device)
    if pixels > 2**31 - 256:
        raise ValueError(f"the Triton kernels count pixels in int32, got an input of the shape {tuple(input.shape)}")
    launch = tile_launch(pixels, channels)
    partial = partial_moments(input, launch.grid[0], channels)
    launch(native(input), partial)
    return merged(partial, _PIXELS, pixels)
