"""The weight gradient for sm_90a on the emulator (tests/cuda/hopper_weight_grad_library.cpp), called on CPU tensors."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddst import topology as tp
from ddst.ops.cuda import weight_grad as cwg
from ddst.ops.cuda.gather import dtype_code
from helpers.emulated_weight_grad import Arrays, Caught, Problem, shape_array

WARPS = 16  # kHopperWarps
_PIXELS = 64  # kTilePixels


class Plan(NamedTuple):
    band: tuple[int, int]
    tile: tuple[int, int, int]
    shares: int


class Sizes(NamedTuple):
    """Of a stage: columns of a patch, stages, bytes that are copied; bytes of shared memory."""

    patch_columns: int
    stages: int
    copied_bytes: int
    shared_bytes: int


class Stats(NamedTuple):
    mma: int
    ldmatrix: int
    bank_conflicts: int
    copies: int
    bytes_read: int
    waits: frozenset[str]


@dataclass(frozen=True)
class Options:
    """``seed``: order of warps, lanes and landings; ``delay``: copies land late; a place whose waits are left out."""

    seed: int = 0
    delay: bool = True
    drop_at: str = ""


class Norm(NamedTuple):
    """Mean ``[C_in]``, scale and shift ``[C_in]`` or ``[N, C_in]``, or no norm; slope of the leaky ReLU."""

    tables: tuple[Tensor, Tensor, Tensor] | None
    slope: float


def tiles() -> Iterator[tuple[int, int, int]]:
    """All tiles that the kernel knows: powers of two with a product of 64."""
    powers = [1 << i for i in range(_PIXELS.bit_length())]
    return (tile for tile in itertools.product(powers, repeat=3) if tile[0] * tile[1] * tile[2] == _PIXELS)


class Library:
    """The compiled emulation."""

    def __init__(self, file: Path) -> None:
        self._library = ctypes.CDLL(str(file))

    def refusal(self, geometry: cwg.Geometry, plan: Plan, itemsize: int = 2, fused: bool = False) -> str:
        message = ctypes.create_string_buffer(2000)
        self._library.refusal(_shape(geometry, 0, plan, 1), itemsize, fused, message, len(message))
        return message.value.decode()

    def sizes(self, geometry: cwg.Geometry, plan: Plan, fused: bool = False) -> Sizes:
        found = (ctypes.c_int * 4)()
        self._library.sizes(_shape(geometry, 0, plan, 1), fused, found)
        return Sizes(*found)

    def run(
        self, problem: Problem, plan: Plan, options: Options = Options(), norm: Norm | None = None
    ) -> tuple[Tensor, Stats]:
        """Gradient, by slots. `Caught` if the emulator reports anything; ``norm``: as a fused half block."""
        g = problem.geometry
        flat, (x, gy) = (g, [problem.x, problem.gy]) if norm else cwg.flattened(g, problem.x, problem.gy)
        for tensor in (gy, x):
            assert tensor.permute(0, 2, 3, 1).is_contiguous() and tensor.data_ptr() % 16 == 0
        grid = tp.grid(g.weight_shape, g.block)
        index = tp.split_topology(problem.slots.topology, *grid[:2])
        units = cwg.list_units(index, grid, g.block, plan.band, WARPS)
        slots = index.block_row.numel()
        got = torch.empty(slots, *g.block, dtype=x.dtype)
        operands = (gy, x, index.block_row, index.block_col, index.block_tap, units, got)
        tables = norm.tables if norm and norm.tables else (None, None, None)
        arrays = Arrays(
            *(t.data_ptr() for t in operands), units.numel(), *(None if t is None else t.data_ptr() for t in tables),
            norm is not None, 0 if tables[1] is None else tables[1].dim(), 0, 0, norm.slope if norm else 1.0,
        )  # fmt: skip
        stats, message = (ctypes.c_long * 5)(), ctypes.create_string_buffer(2000)
        places = ctypes.create_string_buffer(2000)
        failed = self._library.weight_grad(
            dtype_code(x.dtype, True), _shape(flat, slots, plan, units.shape[0]), ctypes.byref(arrays), options.seed,
            options.delay, options.drop_at.encode(), stats, places, len(places), message, len(message),
        )  # fmt: skip
        if failed:
            raise Caught(message.value.decode())
        return got, Stats(*stats, frozenset(places.value.decode().split()))


def _shape(geometry: cwg.Geometry, slots: int, plan: Plan, groups: int) -> ctypes.Array[ctypes.c_int]:
    return shape_array(geometry, slots, cwg.Plan(plan.band, plan.tile, groups, plan.shares), groups)
