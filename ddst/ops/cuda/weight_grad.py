"""The weight gradient by CUDA C++ (``csrc/cuda/weight_grad.cuh``): what each group of threads works on, the calls.

`plan` chooses the sizes from what the host knows; the groups (:mod:`.weight_grad_units`) are made on the device without
waiting for it. On devices of compute capability 9.0 the kernel of :mod:`.hopper_weight_grad` runs where it can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ... import topology as tp
from ..precision import tf32_allowed
from . import hopper, hopper_weight_grad, kept_lists
from .gather import Fused
from .weight_grad_units import WARPS, Geometry, Plan, Units, list_units, most_groups, parts_of

__all__ = ["WARPS", "Geometry", "Plan", "list_units", "most_groups", "parts_of"]
_SIDES = (16, 32, 64)  # of blocks
# Assumptions about the device, until measured: bytes from L2 and multiplications per clock and multiprocessor, clocks
# that a tile costs besides; how much longer a multiplication takes than one of 16-bit numbers.
_L2_BYTES, _PRODUCTS, _TILE_CLOCKS = 24, 700, 100
_COST_16, _COST_TF32, _COST_FLOAT32 = 1, 2, 6
_PIXELS = 64  # of a tile


class Device(NamedTuple):
    """What a plan depends on: multiprocessors, bytes of shared memory that a CTA may have, compute capability."""

    multiprocessors: int
    shared_bytes: int
    capability: tuple[int, int] = (8, 0)


def _reach(geometry: Geometry, tile: tuple[int, int, int]) -> tuple[int, int]:
    """Height and width of the input patch that the taps of a tile's output pixels read."""
    height, width = (
        (tile[1 + i] - 1) * geometry.stride[i] + (geometry.weight_shape[2 + i] - 1) * geometry.dilation[i] + 1
        for i in (0, 1)
    )
    return height, width


def patch_pixels(geometry: Geometry, tile: tuple[int, int, int]) -> int:
    """Input pixels that the taps of a tile's output pixels read."""
    height, width = _reach(geometry, tile)
    return tile[0] * height * width


def shared_bytes(geometry: Geometry, band: tuple[int, int], tile: tuple[int, int, int], itemsize: int) -> int:
    """Shared memory of a CTA: the twin of ``weight_grad_sizes`` in csrc/cuda/weight_grad_shape.hpp."""
    pixels, patch = -(-tile[0] * tile[1] * tile[2] // 16) * 16, patch_pixels(geometry, tile)
    tables = -(-(patch + 2 * pixels) * 4 // 128) * 128
    grad, input = (band[i] * geometry.block[i] + 8 for i in (0, 1))
    return tables + 2 * (pixels * grad + patch * input) * itemsize


def _fits(geometry: Geometry, band: tuple[int, int], tile: tuple[int, int, int], itemsize: int, limit: int) -> bool:
    return max(_reach(geometry, tile)) <= 1024 and shared_bytes(geometry, band, tile, itemsize) <= limit


def refusal(geometry: Geometry, itemsize: int, shared_limit: int) -> str:
    """Why the kernel cannot run this, whatever the images' size, on a device with so much shared memory for a CTA.

    >>> geometry = Geometry(1, (9, 9), (9, 9), (64, 64, 3, 3), (16, 8), (1, 1), (1, 1), (1, 1))
    >>> refusal(geometry, 2, 99 * 1024)
    'block must have sides of 16, 32 or 64, got 16 x 8'
    """
    if not set(geometry.block) <= set(_SIDES):
        return f"block must have sides of 16, 32 or 64, got {geometry.block[0]} x {geometry.block[1]}"
    if not _fits(geometry, (1, 1), (1, 1, 1), itemsize, shared_limit):
        return (
            f"the CUDA weight gradient of a kernel of {list(geometry.weight_shape[2:])} with dilation "
            f"{list(geometry.dilation)} needs more than the {shared_limit} bytes of shared memory of a CTA"
        )
    return ""


def _tiles(geometry: Geometry) -> list[tuple[int, int, int]]:
    """Tiles worth a try, of at most `_PIXELS` pixels: of several images only where it holds each of them whole."""
    height, width = geometry.output_size

    def cuts(size: int) -> list[int]:
        return sorted({-(-size // n) for n in (*range(1, 9), 16, 32, 64)} | {n for n in (1, 2, 4, 8, 16) if n <= size})

    def images(h: int, w: int) -> list[int]:
        most = max(1, min(_PIXELS // (h * w), geometry.images)) if (h, w) == (height, width) else 1
        return sorted({most, -(-most // 2), -(-most // 4)})

    sizes = [(h, w) for h in cuts(height) for w in cuts(width) if h * w <= _PIXELS]
    return [(n, h, w) for h, w in sizes for n in images(h, w)]


def _tile_count(geometry: Geometry, tile: tuple[int, int, int]) -> int:
    height, width = geometry.output_size
    return -(-geometry.images // tile[0]) * -(-height // tile[1]) * -(-width // tile[2])


def _expected_groups(geometry: Geometry, density: float, band: tuple[int, int]) -> int:
    rows, cols, taps = tp.grid(geometry.weight_shape, geometry.block)
    parts, per_warp = parts_of(geometry.block)
    units = min(band[0], rows) * min(band[1], cols) * taps * density * parts
    in_band = max(1, -(-int(units * 1.15) // (WARPS * per_warp)))  # some bands hold more than others
    return in_band * -(-rows // band[0]) * -(-cols // band[1])


@lru_cache(maxsize=1024)
def _band_and_tile(
    geometry: Geometry, density: float, itemsize: int, cost: int, shared_limit: int
) -> tuple[tuple[int, int], tuple[int, int, int]] | None:
    """Those of least estimated time: a tile's bytes from L2 or its multiplications, and a constant for each group.

    Two CTAs share a multiprocessor if any choice allows that, but for full float32, whose registers leave room for one.
    None if nothing fits.
    """
    block = geometry.block
    rows, cols, taps = tp.grid(geometry.weight_shape, block)
    products = rows * cols * taps * density * block[0] * block[1] * cost  # per pixel
    bands = [(i, j) for i in range(1, min(rows, 128 // block[0]) + 1) for j in range(1, min(cols, 128 // block[1]) + 1)]
    tiles = [
        (tile, _tile_count(geometry, tile), -(-math.prod(tile) // 16) * 16, patch_pixels(geometry, tile))
        for tile in _tiles(geometry)
    ]
    for limit in (shared_limit // 2 - 1024, shared_limit) if _ctas(cost) == 2 else (shared_limit,):
        best = None
        for band in bands:
            groups = _expected_groups(geometry, density, band)
            for tile, count, pixels, patch in tiles:
                if not _fits(geometry, band, tile, itemsize, limit):
                    continue
                staged = (pixels * band[0] * block[0] + patch * band[1] * block[1]) * itemsize
                clocks = count * (
                    groups * _TILE_CLOCKS + max(groups * staged / _L2_BYTES, pixels * products / _PRODUCTS)
                )
                if best is None or clocks < best[0]:
                    best = (clocks, band, tile)
        if best is not None:
            return best[1:]
    return None


def _ctas(cost: int) -> int:
    """CTAs that a multiprocessor has registers for, as launch bounds in csrc/cuda/weight_grad.cuh say."""
    return 1 if cost == _COST_FLOAT32 else 2


def plan(geometry: Geometry, slots: int, itemsize: int, device: Device, *, allow_tf32: bool = True) -> Plan:
    """How to run it: as many CTAs with work as the device's multiprocessors take, where there are enough tiles.

    The choice is made for a density, as if every slot held a block, rounded to a quarter of an octave: once, so that a
    slowly changing number of slots costs no new search.

    Raises:
        ValueError: `refusal` has a reason.
    """
    rows, cols, taps = tp.grid(geometry.weight_shape, geometry.block)
    density = 2 ** (round(4 * math.log2(max(slots, 1) / (rows * cols * taps))) / 4)
    cost = _COST_16 if itemsize == 2 else _COST_TF32 if allow_tf32 else _COST_FLOAT32
    choice = _band_and_tile(geometry, density, itemsize, cost, device.shared_bytes)
    if choice is None:
        raise ValueError(f"{refusal(geometry, itemsize, device.shared_bytes)}: use backend 'triton'")
    band, tile = choice
    groups = most_groups(slots, -(-rows // band[0]) * -(-cols // band[1]), geometry.block)
    shares = _ctas(cost) * device.multiprocessors // _expected_groups(geometry, density, band)
    return Plan(band, tile, groups, max(1, min(shares, _tile_count(geometry, tile))))


def flattened(geometry: Geometry, *tensors: Tensor) -> tuple[Geometry, list[Tensor]]:
    """A 1 × 1 convolution without stride and padding as one of a single row of pixels; others unchanged.

    The tensors, ``[N, C, H, W]`` in channels_last memory, become views ``[1, C, 1, N · H · W]``.
    """
    pointwise = geometry.weight_shape[2:] == (1, 1) and geometry.stride == (1, 1) and geometry.padding == (0, 0)
    if not pointwise:
        return geometry, list(tensors)
    pixels = geometry.images * geometry.output_size[0] * geometry.output_size[1]
    views = [t.permute(0, 2, 3, 1).reshape(pixels, t.shape[1]).t()[None, :, None, :] for t in tensors]
    return geometry._replace(images=1, input_size=(1, pixels), output_size=(1, pixels)), views


def _dense_channels_last(tensor: Tensor) -> Tensor:
    """The tensor in dense channels_last memory that begins at a multiple of 16 bytes, copied only where it is not."""
    dense = tensor.contiguous(memory_format=torch.channels_last)
    return dense if dense.data_ptr() % 16 == 0 else dense.clone(memory_format=torch.channels_last)


@lru_cache(maxsize=64)
def _device(index: int) -> Device:
    facts = torch.cuda.get_device_properties(index)
    shared = facts.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Device(facts.multi_processor_count, shared, (facts.major, facts.minor))


def _hopper_plan(geometry: Geometry, slots: int, dtype: torch.dtype, device: Device, half: Fused | None) -> Plan | None:
    """How the kernel for sm_90a runs it, None where the one for every architecture does."""
    fused, halved = half is not None, half is not None and (half.upsample, half.pool) != (1, 1)
    if hopper.is_general() or hopper_weight_grad.refusal(
        geometry, dtype, device.capability, fused=fused, halved=halved
    ):
        return None
    return hopper_weight_grad.plan(
        geometry, slots, dtype.itemsize, device.multiprocessors, device.shared_bytes, fused=fused
    )


def conv2d_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    topology: Tensor,
    weight_shape: Sequence[int],
    block: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    linear: bool = False,
    fused: Fused | None = None,
) -> Tensor:
    """``∂L/∂values[slot, i, j] = Σ_{n, y, x} grad_output[n, row · b_out + i, y, x] · input[n, col · b_in + j, y′, x′]``

    with ``y′ = y · stride + kh · dilation - padding``, of the active blocks of a convolution's weight; exactly zero in
    the part of a block outside of it, and in free slots.

    Args:
        grad_output: ``[N, C_out, H_out, W_out]``; input: ``[N, C_in, H, W]``, on one CUDA device, of one dtype:
            bfloat16, float16 or float32. Other memory than channels_last is copied.
        topology: int32 vector (:mod:`ddst.topology`); block: one that `refusal` accepts.
        linear: as for `ddst.ops.cuda.gather.conv2d`.
        fused: where it is that of a fused half block, of whose convolution the stored operands may have half the sides.

    Returns:
        ``[slots, b_out, b_in]`` in their dtype.

    Raises:
        ValueError: an argument does not fit; `refusal` tells beforehand.

    Numerics: sums in float32, in an order that depends on shapes, mask and device alone: the same call, the same bits.
    float32 is multiplied as `ddst.ops.cuda.gather.conv2d` says. A NaN or infinity in a pixel may reach every tap of its
    channel.
    """
    half = fused or Fused(None, None, 1.0, 1, 1)
    size = [side * half.upsample for side in input.shape[2:]]
    out = [(size[i] + 2 * padding[i] - dilation[i] * (weight_shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    geometry = Geometry(
        input.shape[0], (size[0], size[1]), (out[0], out[1]),
        (weight_shape[0], weight_shape[1], weight_shape[2], weight_shape[3]), (block[0], block[1]),
        (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]),
    )  # fmt: skip
    grid = tp.grid(weight_shape, geometry.block)
    index = tp.split_topology(topology, *grid[:2])
    slots = index.block_row.numel()
    if slots == 0 or input.numel() == 0 or grad_output.numel() == 0:
        return input.new_zeros(slots, *block)
    flat, (gy, x) = geometry, [_dense_channels_last(t) for t in (grad_output, input)]
    if fused is None:
        flat, (gy, x) = flattened(geometry, gy, x)
    allow_tf32 = tf32_allowed(linear=linear)
    device = _device(x.device.index)
    special = _hopper_plan(flat, slots, x.dtype, device, fused)
    chosen = special or plan(flat, slots, x.element_size(), device, allow_tf32=allow_tf32)
    warps = hopper_weight_grad.WARPS if special else WARPS
    operator = torch.ops.ddst_cuda.hopper_weight_grad if special else torch.ops.ddst_cuda.conv2d_weight_grad
    units = kept_lists.kept(topology, Units(grid, geometry.block, chosen.band, warps))
    return operator(
        gy, x, index.block_row, index.block_col, index.block_tap, units.view(-1), list(weight_shape), list(block),
        list(stride), list(padding), list(dilation), list(chosen.band), list(chosen.tile), chosen.shares,
        allow_tf32, fused is not None, *(half.norm or (None, None, None)), half.slope, half.upsample, half.pool,
    )  # fmt: skip


def linear_weight_grad(
    grad_output: Tensor, input: Tensor, topology: Tensor, weight_shape: Sequence[int], block: Sequence[int]
) -> Tensor:
    """`conv2d_weight_grad` of a linear layer: ``grad_output [B, out]``, ``input [B, in]``."""
    gy, x = grad_output[:, :, None, None], input[:, :, None, None]
    shape, one = (*weight_shape, 1, 1), (1, 1)
    return conv2d_weight_grad(gy, x, topology, shape, block, one, (0, 0), one, linear=True)
