"""The CUDA weight gradient on the emulator (tests/cuda/weight_grad_library.cpp), called on CPU tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddst import topology as tp
from ddst.ops.cuda import weight_grad as cwg
from ddst.ops.cuda.gather import dtype_code
from helpers.slots import Slots, scatter

BLOCKS = [(rows, cols) for rows in (16, 32, 64) for cols in (16, 32, 64)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICE = cwg.Device(multiprocessors=4, shared_bytes=227 * 1024)


class Stats(NamedTuple):
    mma: int
    bank_conflicts: int
    barriers: int


class Caught(AssertionError):
    """The emulator found something."""


@dataclass(frozen=True)
class Options:
    """``seed``: order of warps and lanes; ``delay_copies``: copies land at the wait; a barrier or wait to leave out."""

    seed: int = 0
    delay_copies: bool = True
    drop_barrier: int = -1
    drop_wait: int = -1


class Arrays(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("gy", "x", "block_row", "block_col", "block_tap", "units", "values_grad")),
        ("units_count", ctypes.c_int64), *((n, ctypes.c_void_p) for n in ("mean", "scale", "shift")),
        *((n, ctypes.c_int) for n in ("fused", "norm", "x_halved", "gy_halved")), ("slope", ctypes.c_float),
    ]  # fmt: skip


def shape_array(geometry: cwg.Geometry, slots: int, plan: cwg.Plan, groups: int) -> ctypes.Array[ctypes.c_int]:
    """``WeightGradShape`` of csrc/cuda/weight_grad_shape.hpp, whose fields are ints only."""
    g = geometry
    fields = [
        g.images, *g.input_size, g.weight_shape[1], *g.output_size, g.weight_shape[0], *g.weight_shape[2:],
        *g.stride, *g.padding, *g.dilation, *g.block, slots, *plan.band, *plan.tile, groups, plan.shares,
    ]  # fmt: skip
    return (ctypes.c_int * len(fields))(*fields)


@dataclass
class Problem:
    """Operands of a weight gradient, channels_last, and what is active; whether float32 is multiplied in TF32.

    Its blocks lie in random slots, some of which are free.
    """

    geometry: cwg.Geometry
    mask: Tensor
    x: Tensor
    gy: Tensor
    allow_tf32: bool = True

    @classmethod
    def random(
        cls, dtype: torch.dtype, images: int, size: Sequence[int], weight_shape: Sequence[int], block: tuple[int, int],
        stride: Sequence[int] = (1, 1), padding: Sequence[int] = (1, 1), dilation: Sequence[int] = (1, 1),
        density: float = 0.5, seed: int = 0, allow_tf32: bool = True,
    ) -> Problem:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        out = [
            (size[i] + 2 * padding[i] - dilation[i] * (weight_shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
        ]
        geometry = cwg.Geometry(
            images, tuple(size), tuple(out), tuple(weight_shape), block, tuple(stride), tuple(padding), tuple(dilation)
        )  # fmt: skip
        mask = torch.rand(tp.mask_shape(weight_shape, block), generator=generator) < density

        def operand(channels: int, height: int, width: int) -> Tensor:
            tensor = torch.empty(images, channels, height, width).uniform_(-1, 1, generator=generator)
            return tensor.to(dtype, memory_format=torch.channels_last)

        return cls(geometry, mask, operand(weight_shape[1], *size), operand(weight_shape[0], *out), allow_tf32)

    @cached_property
    def slots(self) -> Slots:
        return scatter(self.mask, free=5)

    @property
    def is_tf32(self) -> bool:
        return self.x.dtype == torch.float32 and self.allow_tf32

    def reference(self) -> tuple[Tensor, Tensor]:
        """Packed gradient in float64 of the operands as the kernel rounds them, and that of their magnitudes."""
        g = self.geometry

        def gradient(x: Tensor, gy: Tensor) -> Tensor:
            window = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation}
            return tp.pack(torch.nn.grad.conv2d_weight(x, g.weight_shape, gy, **window), self.mask, g.block)

        x, gy = ((_as_tf32(t) if self.is_tf32 else t).double() for t in (self.x, self.gy))
        return gradient(x, gy), gradient(x.abs(), gy.abs())

    def error(self, got: Tensor, *reference: Tensor) -> float:
        """Largest error over what rounding of the result and sums in float32 explain: at most 1 is right."""
        want, magnitude = reference or self.reference()
        allowed = want.abs() * torch.finfo(got.dtype).eps / 2 + magnitude * 2.0**-20
        self.slots.check_free(got)
        got = got[self.slots.of_block]
        inside = tp.inside(self.mask, self.geometry.weight_shape, self.geometry.block)
        if not bool((got[~inside] == 0).all()):
            return float("inf")
        ratio = ((got.double() - want).abs() / allowed.clamp(min=1e-30))[inside]
        return float(ratio.nan_to_num(nan=float("inf")).max()) if ratio.numel() else 0.0


def _as_tf32(tensor: Tensor) -> Tensor:
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)  # tf32, ties away from zero


class Library:
    """The compiled emulation; stands for ``torch.ops.ddst_cuda`` on CPU tensors.

    Attributes:
        options: of the next calls; stats: of the last one.
    """

    def __init__(self, file: Path) -> None:
        self._library = ctypes.CDLL(str(file))
        self._library.shared_bytes.restype = ctypes.c_int64
        self.options, self.stats = Options(), Stats(0, 0, 0)

    def shared_bytes(self, geometry: cwg.Geometry, plan: cwg.Plan, itemsize: int) -> int:
        return self._library.shared_bytes(shape_array(geometry, 0, plan, 1), itemsize)

    def group_units(self, geometry: cwg.Geometry, plan: cwg.Plan) -> int:
        return self._library.group_units(shape_array(geometry, 0, plan, 1))

    def conv2d_weight_grad(
        self, grad_output: Tensor, input: Tensor, block_row: Tensor, block_col: Tensor, block_tap: Tensor,
        units: Tensor, weight_shape: list[int], block: list[int], stride: list[int], padding: list[int],
        dilation: list[int], band: list[int], tile: list[int], shares: int, allow_tf32: bool, fused: bool = False,
        mean: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None, slope: float = 1.0,
        upsample: int = 1, pool: int = 1,
    ) -> Tensor:  # fmt: skip
        """`Caught` if the emulator reports anything."""
        for tensor in (grad_output, input):
            assert tensor.permute(0, 2, 3, 1).is_contiguous() and tensor.data_ptr() % 16 == 0
        size = [side * upsample for side in input.shape[2:]]
        out = [
            (size[i] + 2 * padding[i] - dilation[i] * (weight_shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
        ]
        assert list(grad_output.shape[2:]) == [side // pool for side in out]
        sizes = (tuple(size), tuple(out), tuple(weight_shape), tuple(block))
        geometry = cwg.Geometry(input.shape[0], *sizes, tuple(stride), tuple(padding), tuple(dilation))
        slots, group = block_row.numel(), cwg.WARPS * cwg.parts_of(geometry.block)[1]
        plan = cwg.Plan(tuple(band), tuple(tile), units.numel() // group, shares)
        got = torch.empty(slots, *block, dtype=input.dtype)
        operands = (grad_output, input, block_row, block_col, block_tap, units, got)
        tables = (None if t is None else t.data_ptr() for t in (mean, scale, shift))
        arrays = Arrays(
            *(t.data_ptr() for t in operands), units.numel(), *tables, fused, 0 if scale is None else scale.dim(),
            upsample == 2, pool == 2, slope,
        )  # fmt: skip
        o = self.options
        chosen = (ctypes.c_int * 4)(o.seed, o.delay_copies, o.drop_barrier, o.drop_wait)
        stats, message = (ctypes.c_long * 3)(), ctypes.create_string_buffer(2000)
        failed = self._library.weight_grad(
            dtype_code(input.dtype, allow_tf32), shape_array(geometry, slots, plan, plan.groups), ctypes.byref(arrays),
            chosen, stats, message, len(message),
        )  # fmt: skip
        if failed:
            raise Caught(message.value.decode())
        self.stats = Stats(*stats)
        return got

    def run(self, problem: Problem, plan: cwg.Plan, options: Options = Options()) -> tuple[Tensor, Stats]:
        """Gradient, by slots, by a plan, which need not be the one that ddst would choose."""
        g = problem.geometry
        _, (x, gy) = cwg.flattened(g, problem.x, problem.gy)
        grid = tp.grid(g.weight_shape, g.block)
        index = tp.split_topology(problem.slots.topology, *grid[:2])
        units = cwg.list_units(index, grid, g.block, plan.band).view(-1)
        self.options = options
        got = self.conv2d_weight_grad(
            gy, x, index.block_row, index.block_col, index.block_tap, units, list(g.weight_shape), list(g.block),
            list(g.stride), list(g.padding), list(g.dilation), list(plan.band), list(plan.tile), plan.shares,
            problem.allow_tf32,
        )  # fmt: skip
        return got, self.stats


def plan_for(problem: Problem, device: cwg.Device = DEVICE) -> cwg.Plan:
    """What ddst would choose for the problem on a device."""
    flat, _ = cwg.flattened(problem.geometry, problem.x, problem.gy)
    return cwg.plan(flat, problem.slots.count, problem.x.element_size(), device, allow_tf32=problem.allow_tf32)
