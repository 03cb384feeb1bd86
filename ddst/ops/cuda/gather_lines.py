"""Lines of records, which the gather kernels walk: a phase of the taps, a group of output channels, an input block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import topology as tp

GRANULE, HEADER = 16, 4  # kSlice, kRecordHeader of csrc/cuda/gather_geometry.hpp


class Lines(NamedTuple):
    """How a block grid is cut into lines.

    Attributes:
        grid: ``(R, C, T)``. width: of the kernel. phases: those of the output pixels along both axes.
        groups: of output channels. inner_blocks: blocks of input channels.
        per_group: output blocks of a group. granules: of 16 channels that a block has on the output side.
    """

    grid: tuple[int, int, int]
    width: int
    phases: tuple[int, int]
    groups: int
    inner_blocks: int
    per_group: int
    granules: int
    input_gradient: bool

    @property
    def total(self) -> int:
        """Of all lines."""
        return math.prod(self.phases) * self.groups * self.inner_blocks

    @property
    def places(self) -> int:
        """For blocks, in all lines: a tap's are those of a group."""
        return self.total * self.grid[2] * self.per_group

    def place(self, index: tp.Index) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(line, tap, place among the output blocks of its group, whether it is free)`` of each slot, int64.

        The line of a free slot is the one behind the last.
        """
        out, inner = (index.block_col, index.block_row) if self.input_gradient else (index.block_row, index.block_col)
        tap, out, free = index.block_tap.long(), out.long(), index.block_row == self.grid[0]
        phase = tap // self.width % self.phases[0] * self.phases[1] + tap % self.width % self.phases[1]
        line = (phase * self.groups + out // self.per_group) * self.inner_blocks + inner
        return torch.where(free, self.total, line), tap, out % self.per_group, free

    def numbers(self, slots: int) -> tuple[int, ...]:
        """What :func:`ddst.kernels.cuda_lists.spread_by_line` takes, in its order, and the number of lines."""
        return *self.grid, self.width, slots, self.groups, self.inner_blocks, *self.phases, self.total


def lines_of(
    weight_shape: Sequence[int],
    block: tuple[int, int],
    phases: tuple[int, int],
    *,
    input_gradient: bool,
    tile_channels: int,
) -> Lines:
    """Lines for groups of ``tile_channels`` output channels; those of the input gradient are the weight's ``C_in``.

    >>> lines = lines_of((256, 128, 3, 3), (16, 32), (1, 1), input_gradient=False, tile_channels=128)
    >>> lines.groups, lines.inner_blocks, lines.per_group, lines.total
    (2, 4, 8, 8)
    """
    side, depth = (block[1], block[0]) if input_gradient else block
    out_channels, in_channels = (weight_shape[1], weight_shape[0]) if input_gradient else weight_shape[:2]
    return Lines(
        tp.grid(weight_shape, block), weight_shape[3], phases, -(-out_channels // tile_channels),
        -(-in_channels // depth), tile_channels // side, side // GRANULE, input_gradient,
    )  # fmt: skip
