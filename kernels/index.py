"""Index lists of the kernels, built from a topology on its device and kept as long as it lives.

Each list is written by one launch (:mod:`.lists`), the first time and, in place, whenever blocks have moved. Its size
follows from the number of slots, which the topology's shape tells, so nothing waits for the device and everything may
run while a CUDA graph is captured. How many slots hold a block is known to the device only. :mod:`ddst.index_cache`
keeps the lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ddst.index_cache import cached
from ddst.topology import grid, slot_count

from .launch import Launch
from .lists import groups_launch, row_lists_launch


class RowLists(NamedTuple):
    """What each program of a tile walks through: the union of the entries of a group of ``rows`` consecutive rows.

    A row is an output block, in the input gradient an input block of one phase. A phase's last group may be smaller.

    Attributes:
        ptr: ``[groups + 1]``; group g owns the positions ``ptr[g] … ptr[g + 1] - 1``.
        entries: ``[slots + 1]``, packed (channel block, tap) as :mod:`.tile` says, each once in a group. What follows
            the last group's is 0, read ahead and never used: one spare, free slots, and what the unions save.
        ids: ``[(slots + 1) · rows]``, for each position the slot of each row's block, -1 where it has none.
        order: ``[groups]``, the groups by falling number of entries.
    """

    ptr: Tensor
    entries: Tensor
    ids: Tensor
    order: Tensor


class Groups(NamedTuple):
    """Blocks that share one operand of the weight gradient, at most ``size`` per group.

    Free slots are in groups of their own, whose gradient is zero.

    Attributes:
        bounds: ``[groups, 2]``, the first position of each group and its end. As the number of groups is known to the
            device only, there is room for the most there can be (:func:`most_groups`); the rest is empty (first and end
            are equal).
        ids: ``[slots]``, the slot at each position.
        row, col, tap: ``[slots]``, output block row, input block and tap ``kh · kW + kw`` of each slot; R, C and 0 of a
            free one.
    """

    bounds: Tensor
    ids: Tensor
    row: Tensor
    col: Tensor
    tap: Tensor


def tap_bits(kernel: Sequence[int]) -> int:
    """Bits that one coordinate of a tap takes in an entry: 5, more for kernels wider than 32.

    >>> tap_bits((3, 3)), tap_bits((1, 40))
    (5, 6)
    """
    return max(5, (max(kernel, default=1) - 1).bit_length())


def max_channel_blocks(kernel: Sequence[int]) -> int:
    """How many channel blocks an entry can tell apart.

    >>> max_channel_blocks((3, 3))
    2097152
    """
    return 1 << (31 - 2 * tap_bits(kernel))


class _RowLists(NamedTuple):
    """What decides on row lists beside the topology; of the phases of an input gradient's stride, or one.

    Attributes:
        rows, cols: of the block grid. across: rows of a phase. channels: entries that a row can have at a tap.
        together: rows of a group.
    """

    rows: int
    cols: int
    kernel: tuple[int, ...]
    dgrad: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    together: int

    @property
    def across(self) -> int:
        return self.cols if self.dgrad else self.rows

    @property
    def phases(self) -> int:
        return math.prod(self.stride) if self.dgrad else 1

    def __call__(self, topology: Tensor) -> RowLists:
        groups, slots = self.phases * -(-self.across // self.together), slot_count(topology, self.rows, self.cols)
        sizes = (groups + 1, slots + 1, (slots + 1) * self.together, groups)
        lists = RowLists(*(topology.new_empty(size) for size in sizes))
        self.rewrite(topology, lists)
        return lists

    def rewrite(self, topology: Tensor, lists: RowLists) -> None:
        held = topology.new_empty(self.phases * self.rows * self.cols * math.prod(self.kernel))
        _row_launch(self, slot_count(topology, self.rows, self.cols))(topology, held, *lists)


@lru_cache(maxsize=1024)
def _row_launch(of: _RowLists, slots: int) -> Launch:
    width = of.kernel[1] if of.kernel else 1
    channels, per_phase = of.rows if of.dgrad else of.cols, -(-of.across // of.together)
    grid = (of.rows, of.cols, math.prod(of.kernel), width, slots, of.across, channels, of.phases, per_phase)
    return row_lists_launch((*grid, *of.stride, *of.padding, *of.dilation), of.dgrad, of.together, tap_bits(of.kernel))


def forward_lists(topology: Tensor, weight_shape: Sequence[int], block: Sequence[int], rows: int = 1) -> RowLists:
    """Rows are output blocks; within a group, entries stand by input block, then tap."""
    out, cols, _ = grid(weight_shape, (block[0], block[1]))
    lists = _RowLists(out, cols, tuple(weight_shape[2:]), False, (1, 1), (0, 0), (1, 1), rows)
    return cached(topology, lists, lists, lists.rewrite)


def input_grad_lists(
    topology: Tensor,
    weight_shape: Sequence[int],
    block: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    rows: int = 1,
) -> RowLists:
    """Rows are (phase, input block); within a group, entries stand by output block, then tap.

    Input pixels of equal ``(h mod stride, w mod stride)`` are a *phase*. Tap ``k`` takes part in the gradient of the
    pixels with ``h + padding ≡ k · dilation (mod stride)``, a single phase: a row holds only what its pixels need.
    """
    out, cols, _ = grid(weight_shape, (block[0], block[1]))
    window = (tuple(stride), tuple(padding), tuple(dilation))
    lists = _RowLists(out, cols, tuple(weight_shape[2:]), True, *window, rows)
    return cached(topology, lists, lists, lists.rewrite)


def most_groups(slots: int, runs: int, size: int) -> int:
    """At most so many groups hold ``slots`` slots of ``runs`` different operands, and those that are free.

    >>> most_groups(0, 4, 4), most_groups(3, 4, 4), most_groups(100, 4, 4)
    (0, 3, 28)
    """
    return min(slots, (slots + (runs + 1) * (size - 1)) // size)


class _Groups(NamedTuple):
    """What decides on groups beside the topology."""

    rows: int
    cols: int
    taps: int
    by_row: bool
    size: int

    @property
    def runs(self) -> int:
        return self.rows if self.by_row else self.cols * self.taps

    def __call__(self, topology: Tensor) -> Groups:
        slots = slot_count(topology, self.rows, self.cols)
        bounds = topology.new_empty(most_groups(slots, self.runs, self.size), 2)
        groups = Groups(bounds, *(topology.new_empty(slots) for _ in range(4)))
        self.rewrite(topology, groups)
        return groups

    def rewrite(self, topology: Tensor, groups: Groups) -> None:
        slots = slot_count(topology, self.rows, self.cols)
        held, starts = topology.new_empty(self.rows * self.cols * self.taps + slots), topology.new_empty(self.runs + 2)
        _groups_launch(self, slots)(topology, held, starts, *groups)


@lru_cache(maxsize=1024)
def _groups_launch(of: _Groups, slots: int) -> Launch:
    most = most_groups(slots, of.runs, of.size)
    return groups_launch((of.rows, of.cols, of.taps, slots, most, of.size), of.by_row)


def weight_grad_groups(
    topology: Tensor, weight_shape: Sequence[int], block: Sequence[int], by: str, size: int
) -> Groups:
    """Groups of at most ``size`` blocks that share an output block row ("row"), or input block and tap ("col").

    Within one, blocks stand by output block, then input block, then tap: neighbours read the same pixels.
    """
    if by not in ("row", "col"):
        raise ValueError(f"by must be 'row' or 'col', got {by!r}")
    groups = _Groups(*grid(weight_shape, (block[0], block[1])), by == "row", size)
    return cached(topology, groups, groups, groups.rewrite)
