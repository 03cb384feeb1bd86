"""How a kernel may be run: the settings that tuning chooses from, and the defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

SIDES = (16, 32, 64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = ("forward", "input_grad", "weight_grad", "block_scores")
#: Densities that tables tell apart; a layer's is rounded to the nearest in ratio.
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


class Problem(NamedTuple):
    """One call of an operator, as far as a choice of configuration may depend on it. Nothing of it is device data.

    Attributes:
        op: "forward", "input_grad", "weight_grad" or "block_scores".
        linear: whether it is a linear map: a 1 × 1 convolution of images of one pixel.
        dtype: of the tensors; sums are float32.
        block: ``(b_out, b_in)``.
        weight_shape: ``(C_out, C_in, kH, kW)``.
        stride, padding, dilation: of the convolution.
        images, input_size, output_size: sizes of the convolution's input and output.
        blocks: number of slots of blocks: how many of them are active is device data; 0 for block scores, which ask for
            none.
    """

    op: str
    linear: bool
    dtype: torch.dtype
    block: tuple[int, int]
    weight_shape: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    images: int
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    blocks: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Output block rows, input blocks and taps."""
        out, into, kh, kw = self.weight_shape
        return -(-out // self.block[0]), -(-into // self.block[1]), kh * kw

    @property
    def density(self) -> float:
        """Share of the blocks that have slots: the most that can be active."""
        return self.blocks / math.prod(self.grid)


#: Two for each multiprocessor of an H200.
ENOUGH_PROGRAMS = 264


@dataclass(frozen=True)
class GatherConfig:
    """How the forward pass and the input gradient run (:mod:`.gather`).

    Attributes:
        pixels: pixels per program, 64 or 128. The M of the matrix products.
        fuse: blocks per step of the loop, as one product of depth ``fuse · block``. 4 suits blocks of 16, 2 of 32.
        rows: output blocks per program (input blocks in the input gradient), 1, 2 or 4. It walks the union of their
            entries: fewer pixels are read, more zeros multiplied (with ``fuse`` 1).
        bits: whether a pixel's bounds tests are made once, for all taps, and kept as bits (kernels of at most 32 taps).
        copy: bytes per asynchronous copy of pixels: 16 go past L1, 8 through it.
        box: None, or the extent ``(images, height, width)`` of the box of ``pixels`` pixels that a program fetches as a
            whole by the tensor memory accelerator (meant for sm_90 and later; with ``fuse`` 1).
        warps, stages: warps per program, steps of the loop in flight.
    """

    pixels: int = 64
    fuse: int = 1
    rows: int = 1
    bits: bool = True
    copy: int = 16
    box: tuple[int, int, int] | None = None
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        if self.box is not None and (self.fuse != 1 or math.prod(self.box) != self.pixels):
            raise ValueError(f"box must hold {self.pixels} pixels, with fuse 1; got {self}")
        if self.rows not in (1, 2, 4) or (self.rows > 1 and self.fuse > 1):
            raise ValueError(f"rows must be 1, 2 or 4, and more than 1 with fuse 1 only; got {self}")


#: Instead of the rule's, which spill registers on some architecture in TF32 or in full float32.
_FLOAT32 = {
    ("forward", (16, 16)): [
        GatherConfig(pixels=128, fuse=2, stages=2),
        GatherConfig(fuse=2),
        GatherConfig(pixels=128, fuse=4),
        GatherConfig(pixels=128),
        GatherConfig(pixels=128, box=(1, 8, 16)),
        GatherConfig(box=(1, 8, 8)),
    ],
    ("forward", (32, 16)): [GatherConfig(pixels=128, stages=2), GatherConfig()],
    ("forward", (32, 32)): [
        GatherConfig(),
        GatherConfig(stages=2),
        GatherConfig(pixels=128),
        GatherConfig(pixels=128, box=(1, 8, 16)),
        GatherConfig(box=(1, 8, 8)),
    ],
    ("forward", (32, 64)): [GatherConfig(), GatherConfig(pixels=128, stages=2)],
    ("forward", (64, 64)): [GatherConfig(bits=False, stages=2), GatherConfig(bits=False, copy=8, stages=2)],
    ("input_grad", (16, 32)): [GatherConfig(stages=4), GatherConfig(bits=False)],
    ("input_grad", (16, 64)): [GatherConfig(fuse=2, stages=2), GatherConfig(fuse=4, stages=2)],
    ("input_grad", (32, 16)): [GatherConfig(pixels=128, stages=4), GatherConfig()],
    ("input_grad", (32, 32)): [
        GatherConfig(),
        GatherConfig(stages=2),
        GatherConfig(pixels=128),
        GatherConfig(pixels=128, box=(1, 8, 16)),
        GatherConfig(box=(1, 8, 8)),
    ],
    ("input_grad", (32, 64)): [GatherConfig(bits=False, stages=2), GatherConfig(pixels=128, stages=2)],
    ("input_grad", (64, 32)): [GatherConfig(stages=2), GatherConfig(pixels=128)],
}


def gather_candidates(op: str, dtype: torch.dtype, block: Sequence[int]) -> list[GatherConfig]:
    """What the forward pass or the input gradient may be run with, the default at low density first.

    >>> gather_candidates("forward", torch.bfloat16, (16, 16))[0].fuse
    4
    """
    found = _FLOAT32.get((op, (block[0], block[1]))) if dtype.itemsize == 4 else None
    return [*(found or _one_row(op, dtype, block)), *_several_rows(op, dtype, block)]


def _one_row(op: str, dtype: torch.dtype, block: Sequence[int]) -> list[GatherConfig]:
    summed = block[1 if op == "forward" else 0]
    square, wide = block[0] == block[1], dtype.itemsize == 4
    # In float32, two blocks at once spill registers on sm_100 unless they are square, boxes of 64 × 64 on sm_80.
    fuse = (2 if wide else 4) if summed == 16 and (square or not wide) else 1
    narrow = wide and min(block) >= 32  # 128 pixels spill registers: for 64 × 64, on sm_80 for 32 × 32
    first = GatherConfig(pixels=64 if narrow else 128, fuse=fuse)
    found = [first]
    if not narrow:
        # With 3 stages ptxas keeps 64 × 64 sums of depth 32 in 80 registers on sm_80, and spills.
        sides = tuple(block) if op == "forward" else (block[1], block[0])
        stages = 4 if sides == (64, 32) else first.stages
        found.append(replace(first, pixels=64, stages=stages))
    elif not square:
        found.append(replace(first, stages=2))
    boxes = not wide or (square and block[0] < 64)
    if boxes:
        found.append(replace(first, fuse=1, pixels=128, box=(1, 8, 16)))
    if square:  # other blocks are rarer, and everything listed here is tested and compiled
        found += [
            replace(first, stages=4 if dtype.itemsize == 2 else 2),
            replace(first, fuse=1 if fuse > 1 else max(1, 64 // summed)),
            *([replace(first, fuse=1, pixels=64, box=(1, 8, 8))] if boxes else []),
        ]
    if block[0] == block[1] and dtype.itemsize == 2:
        found.append(replace(first, copy=8))
    return list(dict.fromkeys(found))


def _several_rows(op: str, dtype: torch.dtype, block: Sequence[int]) -> list[GatherConfig]:
    """For blocks of 16 or 32 channels of the result. In float32, 128 pixels of twice as many sums spill registers."""
    result, summed = block if op == "forward" else reversed(block)
    wide = dtype.itemsize == 4
    if result == summed and result < 64:
        return [GatherConfig(pixels=128, rows=2 if wide and result == 32 else 4)]
    if (result, summed) == (16, 64):
        shared = GatherConfig(pixels=64 if wide else 128, rows=4)
        return [shared, *([] if wide else [replace(shared, box=(1, 8, 16))])]
    return []


def gather_fits(config: GatherConfig, problem: Problem) -> bool:
    """Whether a configuration can run a problem. A box needs strides of 16 bytes, and source pixels that are neighbours
    where the result's are.
    """
    forward = problem.op == "forward"
    channels = problem.weight_shape[1 if forward else 0]
    whole = channels > 0 and channels * problem.dtype.itemsize % 16 == 0
    return config.box is None or (whole and (not forward or problem.stride == (1, 1)))


def expected_reads(config: GatherConfig, problem: Problem) -> float:
    """``(1 - (1 - density)^rows) / (rows · channels of a row) + density / pixels``.

    What a random mask lets a program read for each of its sums, in elements per source channel and tap: pixels, unless
    all its rows lack the block, and weights. Density is that of the bucket.

    >>> problem = Problem("forward", False, torch.bfloat16, (16, 16), (256, 256, 3, 3), (1, 1), (1, 1), (1, 1),
    ...                   64, (32, 32), (32, 32), 691)
    >>> [round(expected_reads(GatherConfig(pixels=128, rows=rows), problem), 4) for rows in (1, 2, 4)]
    [0.0211, 0.0183, 0.0142]
    """
    density = density_bucket(problem.density)
    width = config.rows * problem.block[0 if problem.op == "forward" else 1]
    return (1 - (1 - density) ** config.rows) / width + density / config.pixels


def gather_default(allowed: Sequence[GatherConfig], problem: Problem) -> GatherConfig:
    """The untuned choice among candidates: the first, or one of several rows that reads at most three quarters as much.

    A quarter has to be saved, as the zeros in a union are multiplied too. With 4 rows it is from a density of 30 % on.
    """
    shared = [config for config in allowed if config.rows > 1]
    best = min(shared, key=lambda config: expected_reads(config, problem), default=allowed[0])
    return best if expected_reads(best, problem) <= 0.75 * expected_reads(allowed[0], problem) else allowed[0]


def gather_runs(config: GatherConfig, problem: Problem) -> bool:
    """Whether a configuration fits and is worth a trial.

    Tiles of 128 pixels, and several rows, must leave programs enough for a large device, and boxes hold no more pixels
    outside the result than inside.
    """
    forward = problem.op == "forward"
    stride = (1, 1) if forward else problem.stride
    height, width = problem.output_size if forward else problem.input_size
    size = (problem.images, -(-height // stride[0]), -(-width // stride[1]))
    pixels = math.prod(size)
    if config.box is None:
        tiles = -(-pixels // config.pixels)
    else:
        tiles = math.prod(-(-extent // side) for extent, side in zip(size, config.box, strict=True))
    programs = tiles * -(-problem.grid[0 if forward else 1] // config.rows) * math.prod(stride)
    return (
        gather_fits(config, problem)
        and (config.pixels * config.rows == 64 or programs >= ENOUGH_PROGRAMS)
        and (config.box is None or tiles * config.pixels <= 2 * pixels)
    )


@dataclass(frozen=True)
class WeightGradConfig:
    """How the weight gradient runs (:mod:`.weight_grad`).

    Attributes:
        by: what the blocks of a program share: an output block "row", or an input block and tap ("col").
        group: blocks per program. Times their other side it is the M of the matrix products, at least 64.
        pixels: pixels per step of the loop, the K of the products.
        waves: programs per multiprocessor that the split of the pixels aims at.
        warps, stages: warps per program, steps of the loop in flight.
    """

    by: Literal["row", "col"] = "row"
    group: int = 4
    pixels: int = 64
    waves: int = 4
    warps: int = 4
    stages: int = 3


def default_weight_grad(dtype: torch.dtype, block: Sequence[int]) -> WeightGradConfig:
    """The untuned choice: by row, except for 64 × 64, where one block is enough for a program.

    >>> default_weight_grad(torch.bfloat16, (16, 16)).group, default_weight_grad(torch.float32, (64, 64)).by
    (4, 'col')
    """
    by: Literal["row", "col"] = "col" if min(block) == 64 else "row"
    return WeightGradConfig(by, _group(by, block), pixels=32 if dtype == torch.float32 else 64)


def _group(by: str, block: Sequence[int]) -> int:
    """Blocks that fill 64 rows."""
    return 64 // block[1 if by == "row" else 0]


def weight_grad_candidates(dtype: torch.dtype, block: Sequence[int]) -> list[WeightGradConfig]:
    """What the weight gradient may be run with, the default first.

    >>> [len(weight_grad_candidates(torch.bfloat16, (side, side))) for side in SIDES]
    [7, 7, 7]
    """
    first = default_weight_grad(dtype, block)
    other: Literal["row", "col"] = "row" if first.by == "col" else "col"
    found = [first, replace(first, waves=2), replace(first, waves=8)]
    if block[0] == block[1] or dtype.itemsize == 2:
        narrow = dtype.itemsize == 2 and tuple(block) in ((16, 16), (32, 16))
        stages = 2 if narrow else first.stages  # 3 spill on sm_80
        found.append(replace(first, by=other, group=_group(other, block), stages=stages))
    if block[0] == block[1] and dtype.itemsize == 2:
        found += [
            replace(first, stages=4 if block[0] > 16 else 2),  # 4 spill on sm_80
            replace(first, pixels=2 * first.pixels),
            # Twice the rows: by column only, as two sets of shifted pixels per thread cost by row what sharing saves.
            replace(first, by="col", group=2 * _group("col", block)),
        ]
    return list(dict.fromkeys(found))


def candidates(op: str, dtype: torch.dtype, block: Sequence[int]) -> list[GatherConfig] | list[WeightGradConfig]:
    """Every configuration that may be chosen for an operator, the untuned choice (at low density) first.

    Tests run each of them against a reference and compile it for every architecture. Block scores have none to choose.

    Raises:
        ValueError: an unknown operator.
    """
    if op == "weight_grad":
        return weight_grad_candidates(dtype, block)
    if op in ("forward", "input_grad"):
        return gather_candidates(op, dtype, block)
    if op == "block_scores":
        return []
    raise ValueError(f"op must be one of {OPS}, got {op!r}")


def _power_of_two(n: int) -> int:
    return 1 << round(math.log2(max(1, n)))


def shape_class(problem: Problem) -> str:
    """The layer's shape as tables know it: kernel, stride, channels and output pixels, sizes rounded to powers of two.

    >>> shape_class(Problem("forward", False, torch.float32, (16, 16), (256, 250, 3, 3), (1, 1), (1, 1), (1, 1),
    ...                     64, (32, 32), (32, 32), 230))
    '3x3 stride 1x1, 256 to 256 channels, 65536 pixels'
    """
    out, into, kh, kw = problem.weight_shape
    pixels = problem.images * problem.output_size[0] * problem.output_size[1]
    return (
        f"{kh}x{kw} stride {problem.stride[0]}x{problem.stride[1]}, {_power_of_two(into)} to {_power_of_two(out)} "
        f"channels, {_power_of_two(pixels)} pixels"
    )


def density_bucket(density: float) -> float:
    """The entry of :data:`DENSITIES` nearest in ratio.

    >>> density_bucket(0.12), density_bucket(0.0001), density_bucket(0.8)
    (0.1, 0.02, 1.0)
    """
    return min(DENSITIES, key=lambda bucket: abs(math.log(max(density, 1e-9) / bucket)))
