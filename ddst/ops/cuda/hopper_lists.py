"""Lists that the gather kernel for sm_90a walks (``csrc/cuda/hopper_gather_geometry.hpp``), made on the device.

A record for each phase of the taps, group of 128 output channels and input block holds the taps that have a block,
which granules of 16 channels they are, and where the blocks lie. An order has the groups with most blocks first, so
that the last ones to be computed are short.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import topology as tp
from . import kept_lists
from .gather_lines import HEADER, Lines, lines_of

TILE_CHANNELS = 128  # kHopperChannels


def record_ints(taps: int, per_group: int) -> tuple[int, int]:
    """``(ints of a record, those of its taps)``, for groups of ``per_group`` blocks.

    >>> record_ints(9, 8), record_ints(1, 2)
    ((88, 12), (12, 4))
    """
    padded = -(-(taps + 1) // 4) * 4  # a zero ends them
    return HEADER + padded + -(-taps * per_group // 4) * 4, padded


def records_and_order(
    index: tp.Index,
    weight_shape: Sequence[int],
    block: tuple[int, int],
    stride: tuple[int, int],
    *,
    input_gradient: bool,
    granules: int,
) -> tuple[Tensor, Tensor]:
    """``(records [phases · groups · input blocks, ints], order [phases · groups])`` of the blocks in ``index``.

    A record is ``[blocks, 0, 0, 0 | tap + mask · 2¹⁶ for each tap that has a block, ascending | rows]``, filled up with
    zeros. Bit i of a mask says that channels ``16 i … 16 i + 15`` of the group have a block at the tap; rows are the
    blocks' first ones among those of the packed values, ``slot · b_out``, by tap, then channel. With products of
    ``granules`` = 4, blocks of 64 channels are taken together: where one of them is there, the others are listed with
    the row behind the last one, and read as zeros.

    Raises:
        ValueError: there are 2³¹ rows or more, which int32 cannot number.

    Returns:
        int32. Built by operations of fixed size, without a host synchronisation. Cost: some passes over a table of all
        blocks there could be.
    """
    lines = lines_of(
        weight_shape, block, stride if input_gradient else (1, 1), input_gradient=input_gradient,
        tile_channels=TILE_CHANNELS,
    )  # fmt: skip
    taps, per_group, count = lines.grid[2], lines.per_group, lines.total
    together = _together(lines, granules)
    slots, device = index.block_row.numel(), index.block_row.device
    _check_rows(slots, block)
    ints, padded = record_ints(taps, per_group)

    # Every place for a block: its slot + 1, or 0; one place more takes what would be said of free slots.
    line, tap, place, free = lines.place(index)
    nowhere = lines.places
    at = torch.where(free, nowhere, (line * taps + tap) * per_group + place)
    held = torch.zeros(nowhere + 1, dtype=torch.int64, device=device)
    held = held.scatter_(0, at, torch.arange(1, slots + 1, device=device))[:nowhere].view(count, taps, per_group)

    united = held.view(count, taps, per_group // together, together)
    listed = (united > 0).any(-1, keepdim=True).expand_as(united).reshape(held.shape)
    bits = ((1 << lines.granules) - 1) << torch.arange(per_group, device=device) * lines.granules
    mask = (listed * bits).sum(-1)
    used = mask > 0
    entries = torch.where(used, torch.arange(taps, device=device) + (mask << 16), 0)
    row = torch.where(held > 0, held - 1, slots) * block[0]

    records = torch.zeros(count, ints + 1, dtype=torch.int64, device=device)  # the last int takes what is not listed
    records[:, 0] = listed.sum((1, 2))
    records.scatter_(1, torch.where(used, HEADER + used.cumsum(-1) - 1, ints), entries)
    flat = listed.view(count, -1)
    records.scatter_(1, torch.where(flat, HEADER + padded + flat.cumsum(-1) - 1, ints), row.view(count, -1))
    work = records[:, 0].view(-1, lines.inner_blocks).sum(-1)
    order = torch.sort(work, descending=True, stable=True)[1]
    return records[:, :ints].int().contiguous(), order.int()


def _together(lines: Lines, granules: int) -> int:
    """Output blocks that a product of so many granules takes."""
    return max(1, granules // lines.granules)


def _check_rows(slots: int, block: tuple[int, int]) -> None:
    if (rows := slots * block[0]) >= 2**31:
        raise ValueError(f"packed values must have fewer than 2^31 rows, got {rows}")


class RecordsAndOrder(NamedTuple):
    """`records_and_order` of any topology, kept (:mod:`.kept_lists`); ``phases``: as for `gather.Records`."""

    weight_shape: tuple[int, ...]
    block: tuple[int, int]
    phases: tuple[int, int]
    input_gradient: bool
    granules: int
    kind: str = "hopper"

    @property
    def lines(self) -> Lines:
        return lines_of(
            self.weight_shape, self.block, self.phases, input_gradient=self.input_gradient,
            tile_channels=TILE_CHANNELS,
        )  # fmt: skip

    def by_operators(self, topology: Tensor) -> tuple[Tensor, Tensor]:
        index = tp.split_topology(topology, *tp.grid(self.weight_shape, self.block)[:2])
        return records_and_order(
            index, self.weight_shape, self.block, self.phases, input_gradient=self.input_gradient,
            granules=self.granules,
        )  # fmt: skip

    def empty(self, topology: Tensor) -> tuple[Tensor, Tensor]:
        lines = self.lines
        _check_rows(tp.slot_count(topology, *lines.grid[:2]), self.block)
        ints, _ = record_ints(lines.grid[2], lines.per_group)
        return topology.new_empty(lines.total, ints), topology.new_empty(lines.total // lines.inner_blocks)

    def rewrite(self, topology: Tensor, lists: tuple[Tensor, Tensor]) -> None:
        lines = self.lines
        held, ptr = topology.new_empty(lines.places), topology.new_empty(lines.total // lines.inner_blocks + 1)
        launch = _launch(lines, tp.slot_count(topology, *lines.grid[:2]), self.block[0], self.granules)
        launch(topology, held, ptr, *lists)


@lru_cache(maxsize=1024)
def _launch(lines: Lines, slots: int, height: int, granules: int) -> Any:
    ints, padded = record_ints(lines.grid[2], lines.per_group)
    return kept_lists.kernels().hopper_records_launch(
        (*lines.numbers(slots), ints, HEADER + padded, height), lines.input_gradient, lines.per_group, lines.granules,
        HEADER, _together(lines, granules),
    )  # fmt: skip
