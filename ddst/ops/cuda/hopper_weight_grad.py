"""The weight gradient's kernel for sm_90a (``csrc/cuda/hopper_weight_grad.cuh``): what it takes, and how it is run.

As in `weight_grad`, a group of units of one band is a CTA's, and tiles of pixels are dealt to shares. Here a CTA has
sixteen warps and a multiprocessor for itself, and a tile is a box of 64 pixels whose sides are powers of two.

**The model.** A CTA's time for a tile is the longest of three, in clocks: instructions issued, by four schedulers;
reads of shared memory; bytes from L2. What they are made of was counted in machine code (``python -m ddst.benchmarks
hopper-counts``); the rates are assumptions about an H200, until measured. Of all bands and tiles that fit, the one
with the least time in all is taken, the partial sums' traffic included. By these counts it issues a quarter of what
the kernel for every architecture does, at any density: it runs wherever it can.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ... import topology as tp
from . import hopper
from .gather_problem import Device
from .weight_grad_units import Geometry, Plan, most_groups, parts_of

WARPS, TILE_PIXELS = 16, 64  # kHopperWarps, kTilePixels
_ACCUMULATOR_BYTES = WARPS * 32 * 64 * 4  # partial sums of a CTA
#: Slots: of a unit and tile (four steps of 16 pixels), of a warp and tile besides, of a tile's copies.
_UNIT_SLOTS, _WARP_SLOTS, _COPY_SLOTS = 27, 30, 250
#: Clocks of shared memory for a unit's reads of one tile, 16 x 16 parts of a unit counted singly.
_UNIT_READS = 16
_L2_BYTES = 24  # a clock and multiprocessor


class Facts(NamedTuple):
    """Of a plan, from the kernel's own sizes."""

    tiles: int
    stages: int
    copied_bytes: int
    shared_bytes: int


def tiles() -> list[tuple[int, int, int]]:
    """Images, rows and columns of every tile that the kernel knows.

    >>> len(tiles()), tiles()[0]
    (28, (1, 1, 64))
    """
    powers = [1 << i for i in range(TILE_PIXELS.bit_length())]
    return [(n, h, w) for n, h, w in itertools.product(powers, repeat=3) if n * h * w == TILE_PIXELS]


def facts(
    geometry: Geometry, band: tuple[int, int], tile: tuple[int, int, int], itemsize: int, fused: bool
) -> tuple[Facts | None, str]:
    """``(the kernel's sizes, "")``, or ``(None, why it does not take this)``."""
    fields = (
        geometry.images, *geometry.input_size, geometry.weight_shape[1], *geometry.output_size,
        geometry.weight_shape[0], *geometry.weight_shape[2:], *geometry.stride, *geometry.padding, *geometry.dilation,
        *geometry.block, 1, *band, *tile, 1, 1,
    )  # fmt: skip
    found, message = (ctypes.c_int32 * 4)(), ctypes.create_string_buffer(256)
    hopper.library().ddst_cuda_hopper_weight_grad_plan(
        (ctypes.c_int32 * len(fields))(*fields), itemsize, ctypes.c_bool(fused), found, message, len(message)
    )
    why = message.value.decode()
    return (None, why) if why else (Facts(*found), "")


def refusal(geometry: Geometry, dtype: torch.dtype, capability: tuple[int, int], *, fused: bool, halved: bool) -> str:
    """Why the kernel does not run this, "" if it does.

    >>> geometry = Geometry(1, (8, 8), (8, 8), (64, 64, 3, 3), (16, 16), (1, 1), (1, 1), (1, 1))
    >>> refusal(geometry, torch.bfloat16, (10, 0), fused=False, halved=False)
    'needs compute capability 9.0, got 10.0'
    """
    why = hopper.device_refusal(dtype, capability)
    if why:
        return why
    if halved:
        return "a fused half block whose operands have half the sides: copies cannot repeat pixels"
    return _refusal(geometry, dtype.itemsize, fused)


@lru_cache(maxsize=1024)
def _refusal(geometry: Geometry, itemsize: int, fused: bool) -> str:
    """That of the first tile, where all are refused."""
    reasons = [facts(geometry, (1, 1), tile, itemsize, fused)[1] for tile in tiles()]
    return "" if "" in reasons else reasons[0]


def supports(
    device: Device,
    dtype: torch.dtype,
    weight_shape: Sequence[int],
    block: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> tuple[bool, str]:
    """``(ok, reason)``: whether it runs the weight gradient of a layer, and if not why, whatever the size."""
    rows, columns = (1, 1) if len(weight_shape) == 2 else (weight_shape[2], weight_shape[3])
    shape = (weight_shape[0], weight_shape[1], rows, columns)
    pairs = ((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]))
    geometry = Geometry(1, (64, 64), (8, 8), shape, (block[0], block[1]), *pairs)
    why = refusal(geometry, dtype, device.capability, fused=False, halved=False)
    return not why, why


def expected_groups(geometry: Geometry, density: float, band: tuple[int, int]) -> int:
    """Groups with work, some bands holding more than others."""
    rows, cols, taps = tp.grid(geometry.weight_shape, geometry.block)
    parts, per_warp = parts_of(geometry.block)
    units = min(band[0], rows) * min(band[1], cols) * taps * density * parts
    in_band = max(1, -(-int(units * 1.15) // (WARPS * per_warp)))
    return in_band * -(-rows // band[0]) * -(-cols // band[1])


@lru_cache(maxsize=1024)
def _band_and_tile(
    geometry: Geometry, density: float, itemsize: int, multiprocessors: int, shared_bytes: int, fused: bool
) -> tuple[tuple[int, int], tuple[int, int, int], int] | None:
    """``(band, tile, shares)`` of least estimated time; None if nothing fits."""
    rows, cols, taps = tp.grid(geometry.weight_shape, geometry.block)
    parts, _ = parts_of(geometry.block)
    squares = geometry.block[0] * geometry.block[1] // parts // 256  # 16 x 16 parts of a unit
    best = None
    bands = itertools.product(
        range(1, min(rows, 256 // geometry.block[0]) + 1), range(1, min(cols, 256 // geometry.block[1]) + 1)
    )
    for band, tile in itertools.product(bands, tiles()):
        sizes, _ = facts(geometry, band, tile, itemsize, fused)
        if sizes is None or sizes.shared_bytes > shared_bytes:
            continue
        groups = expected_groups(geometry, density, band)
        shares = max(1, min(multiprocessors // groups, sizes.tiles))
        units = rows * cols * taps * density * parts / groups
        issue = (units * _UNIT_SLOTS * squares + WARPS * _WARP_SLOTS + _COPY_SLOTS) / 4
        tile_clocks = max(issue, units * _UNIT_READS * squares, sizes.copied_bytes / _L2_BYTES)
        waves = -(-groups * shares // multiprocessors)
        sums = 2 * groups * shares * _ACCUMULATOR_BYTES / (_L2_BYTES * multiprocessors)  # written, read
        clocks = waves * -(-sizes.tiles // shares) * tile_clocks + sums
        if best is None or clocks < best[0]:
            best = (clocks, band, tile, shares)
    return None if best is None else best[1:]


def plan(
    geometry: Geometry, slots: int, itemsize: int, multiprocessors: int, shared_bytes: int, *, fused: bool = False
) -> Plan | None:
    """How to run it, None where nothing fits; for a density rounded as `weight_grad.plan` does it."""
    rows, cols, taps = tp.grid(geometry.weight_shape, geometry.block)
    density = 2 ** (round(4 * math.log2(max(slots, 1) / (rows * cols * taps))) / 4)
    choice = _band_and_tile(geometry, density, itemsize, multiprocessors, shared_bytes, fused)
    if choice is None:
        return None
    band, tile, shares = choice
    bands = -(-rows // band[0]) * -(-cols // band[1])
    return Plan(band, tile, most_groups(slots, bands, geometry.block, WARPS), shares)
