"""Groups of units, which the weight gradient's kernels work on: lists that are made on the device.

A *unit* is what one warp accumulates: a block, or a part of at most 32 × 32 of a larger one. A *band* is a rectangle of
the block grid. A *group* is a list of units of one band, for one CTA, whose staged activations serve all of them. The
pixels are cut into *tiles*, and the tiles into *shares*; every share of every group is a CTA, and the shares are summed
in order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import topology as tp
from . import kept_lists

WARPS = 8  # of a CTA of the kernel for every architecture
_ACCUMULATORS = 2048  # fp32 sums of a warp


class Geometry(NamedTuple):
    """Sizes of a convolution whose weight gradient is asked for."""

    images: int
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    weight_shape: tuple[int, int, int, int]
    block: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


class Plan(NamedTuple):
    """``band``: block rows and columns; ``tile``: images, rows, columns of output pixels; ``groups``: at most."""

    band: tuple[int, int]
    tile: tuple[int, int, int]
    groups: int
    shares: int


def parts_of(block: tuple[int, int]) -> tuple[int, int]:
    """``(units of a block, units that a warp accumulates)``.

    >>> parts_of((16, 16)), parts_of((64, 64))
    ((1, 8), (4, 2))
    """
    rows = min(block[0], 32)
    cols = min(block[1], rows)
    return block[0] // rows * (block[1] // cols), _ACCUMULATORS // (rows * cols)


def most_groups(slots: int, bands: int, block: tuple[int, int], warps: int = WARPS) -> int:
    """At most so many groups hold ``slots`` blocks, however they lie in the bands; those that are free are a band more.

    >>> most_groups(0, 4, (16, 16)), most_groups(3, 4, (16, 16)), most_groups(1000, 4, (16, 16))
    (0, 3, 20)
    """
    parts, per_warp = parts_of(block)
    full = min(slots, bands + 1)
    return full + (slots * parts - full) // (warps * per_warp)


def list_units(
    index: tp.Index, grid: tuple[int, int, int], block: tuple[int, int], band: tuple[int, int], warps: int = WARPS
) -> Tensor:
    """``units[group, warp, i] = slot · parts + part`` of the group's units, -1 where there is none.

    The units of a band are dealt to as few groups as hold them, and those of a group to its warps, evenly and in the
    order of their blocks, so that a warp's units share output rows. A warp's units come first in its list, and a group
    that has any has one in its first place. Free slots are a band of their own, whose gradient is zero, behind the
    others; groups without units come last.

    Args:
        index: the sections of the topology vector, whose device gets the list; grid: ``(R, C, T)``; warps: of a group.

    Returns:
        int32 ``[most_groups(…), warps, units of a warp]``. Made without a host synchronisation.
    """
    parts, per_warp = parts_of(block)
    slots, device = index.block_row.numel(), index.block_row.device
    across = -(-grid[1] // band[1])
    bands = -(-grid[0] // band[0]) * across
    size = warps * per_warp
    units = torch.full((most_groups(slots, bands, block, warps), warps, per_warp), -1, dtype=torch.int32, device=device)
    row, col = (section[index.row_order].long() for section in (index.block_row, index.block_col))
    band_of = torch.where(row == grid[0], bands, row // band[0] * across + col // band[1])
    count = torch.zeros(bands + 1, dtype=torch.int64, device=device).scatter_add_(0, band_of, torch.ones_like(band_of))
    count = count * parts
    groups = _ceil_div(count, size)
    band_of, order = torch.sort(band_of, stable=True)
    slot = index.row_order[order].long()
    unit = (slot[:, None] * parts + torch.arange(parts, device=device)).flatten()
    its = band_of[:, None].expand(slots, parts).flatten()
    count, groups, first_group, first_unit = (
        table[its] for table in (count, groups, groups.cumsum(0) - groups, count.cumsum(0) - count)
    )
    rank = torch.arange(slots * parts, device=device) - first_unit
    group = rank * groups // count
    begin, end = _ceil_div(group * count, groups), _ceil_div((group + 1) * count, groups)
    warp = (rank - begin) * warps // (end - begin)
    place = rank - begin - _ceil_div(warp * (end - begin), warps)
    units.view(-1).scatter_(0, ((first_group + group) * warps + warp) * per_warp + place, unit.int())
    return units


def _ceil_div(a: Tensor, b: Tensor | int) -> Tensor:
    return -(-a // b)


class Units(NamedTuple):
    """`list_units` of any topology, kept (:mod:`.kept_lists`)."""

    grid: tuple[int, int, int]
    block: tuple[int, int]
    band: tuple[int, int]
    warps: int
    kind: str = "units"

    def by_operators(self, topology: Tensor) -> Tensor:
        index = tp.split_topology(topology, *self.grid[:2])
        return list_units(index, self.grid, self.block, self.band, self.warps)

    def empty(self, topology: Tensor) -> Tensor:
        slots = tp.slot_count(topology, *self.grid[:2])
        groups = most_groups(slots, _bands(self.grid, self.band), self.block, self.warps)
        return topology.new_empty(groups, self.warps, parts_of(self.block)[1])

    def rewrite(self, topology: Tensor, units: Tensor) -> None:
        slots, bands = tp.slot_count(topology, *self.grid[:2]), _bands(self.grid, self.band)
        held = topology.new_empty(bands * self.band[0] * self.band[1] * self.grid[2] + slots)
        ids, starts, firsts = (topology.new_empty(size) for size in (slots, bands + 2, bands + 1))
        _launch(self, slots, units.numel())(topology, held, ids, starts, firsts, units)


def _bands(grid: tuple[int, int, int], band: tuple[int, int]) -> int:
    return -(-grid[0] // band[0]) * -(-grid[1] // band[1])


@lru_cache(maxsize=1024)
def _launch(of: Units, slots: int, ints: int) -> Any:
    numbers = (*of.grid, slots, -(-of.grid[1] // of.band[1]), _bands(of.grid, of.band), *of.band, ints)
    parts, per_warp = parts_of(of.block)
    return kept_lists.kernels().units_launch(numbers, parts, of.warps, per_warp)
