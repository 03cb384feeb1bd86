"""Index lists of the kernels, built from a topology on its device and kept as long as it lives.

All torch operations here have results of fixed size (the number of slots is known from the topology's shape), so
nothing waits for the device and everything may run while a CUDA graph is captured. How many slots hold a block is known
to the device only; free ones come last in every list. :mod:`ddst.index_cache` keeps the lists, and rewrites them in
place when blocks move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddst.index_cache import cached
from ddst.topology import grid, split_topology


class RowLists(NamedTuple):
    """What each program of a tile walks through: the union of the entries of a group of ``rows`` consecutive rows.

    A row is an output block, in the input gradient an input block of one phase. A phase's last group may be smaller.

    Attributes:
        ptr: ``[groups + 1]``; group g owns the positions ``ptr[g] … ptr[g + 1] - 1``.
        entries: ``[slots + 1]``, packed (channel block, tap) as :mod:`.tile` says, each once in a group. What follows
            the last group's is read ahead and never used: one spare, free slots, and what the unions save.
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


def _with_spare(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.to(torch.int32), (0, 1))


def _pack(block: Tensor, tap: Tensor, kernel: Sequence[int]) -> Tensor:
    bits = tap_bits(kernel)
    width = kernel[1] if len(kernel) else 1
    return (block << 2 * bits) | (tap // width << bits) | tap % width


def _heavy_first(ptr: Tensor) -> Tensor:
    return torch.argsort(ptr[:-1] - ptr[1:], stable=True).to(torch.int32)


def _starts(sorted_keys: Tensor, count: int) -> Tensor:
    """``[count + 1]``: position of the first key that is at least 0, 1, … ``count``."""
    bounds = torch.arange(count + 1, dtype=sorted_keys.dtype, device=sorted_keys.device)
    return torch.searchsorted(sorted_keys, bounds, out_int32=True)


def _unions(row: Tensor, across: int, entry: Tensor, phases: int, rows: int, free: Tensor) -> RowLists:
    """Lists of groups of ``rows`` of the ``across`` rows of each of ``phases``, entries in rising order.

    Args:
        row, entry, free: ``[slots]``, phase · across + row, packed entry of each slot, and whether it is free instead.
    """
    groups = -(-across // rows)
    group = torch.where(free, phases * groups, row // across * groups + row % across // rows)  # free ones come last,
    entry = torch.where(free, 0, entry)  # at one position
    key, order = torch.sort(group.long() << 31 | entry, stable=True)
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    position = first.cumsum(0) - 1
    starts = _starts(key >> 31, phases * groups).long()
    before = torch.nn.functional.pad(first.cumsum(0, dtype=torch.int32), (1, 0))
    ptr = before[starts]
    entries = entry.new_zeros(entry.numel() + 1).scatter_(0, position, entry[order])
    ids = entry.new_full(((entry.numel() + 1) * rows,), -1)
    slot = torch.where(free[order], -1, order).to(torch.int32)
    ids.scatter_(0, position * rows + row[order] % across % rows, slot)
    return RowLists(ptr, entries, ids, _heavy_first(ptr))


def forward_lists(topology: Tensor, weight_shape: Sequence[int], block: Sequence[int], rows: int = 1) -> RowLists:
    """Rows are output blocks; within a group, entries stand by input block, then tap."""

    def build(topology: Tensor) -> RowLists:
        out, cols, _ = grid(weight_shape, (block[0], block[1]))
        index = split_topology(topology, out, cols)
        entry = _pack(index.block_col, index.block_tap, weight_shape[2:])
        if rows > 1:
            return _unions(index.block_row, out, entry, 1, rows, index.block_row == out)
        ptr = index.row_ptr.clone()
        return RowLists(ptr, _with_spare(entry[index.row_order]), _with_spare(index.row_order), _heavy_first(ptr))

    return cached(topology, ("forward", *weight_shape, *block, rows), build)


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

    def build(topology: Tensor) -> RowLists:
        out, cols, _ = grid(weight_shape, (block[0], block[1]))
        index = split_topology(topology, out, cols)
        width = weight_shape[3] if len(weight_shape) == 4 else 1
        phase_h = (index.block_tap // width * dilation[0] - padding[0]) % stride[0]
        phase_w = (index.block_tap % width * dilation[1] - padding[1]) % stride[1]
        row = (phase_h * stride[1] + phase_w) * cols + index.block_col
        entry = _pack(index.block_row, index.block_tap, weight_shape[2:])
        return _unions(row, cols, entry, stride[0] * stride[1], rows, index.block_row == out)

    return cached(topology, ("input_grad", *weight_shape, *block, *stride, *padding, *dilation, rows), build)


def most_groups(slots: int, runs: int, size: int) -> int:
    """At most so many groups hold ``slots`` slots of ``runs`` different operands, and those that are free.

    >>> most_groups(0, 4, 4), most_groups(3, 4, 4), most_groups(100, 4, 4)
    (0, 3, 28)
    """
    return min(slots, (slots + (runs + 1) * (size - 1)) // size)


def weight_grad_groups(
    topology: Tensor, weight_shape: Sequence[int], block: Sequence[int], by: str, size: int
) -> Groups:
    """Groups of at most ``size`` blocks that share an output block row ("row"), or input block and tap ("col").

    Within one, blocks stand by output block, then input block, then tap: neighbours read the same pixels.
    """

    def build(topology: Tensor) -> Groups:
        rows, cols, taps = grid(weight_shape, (block[0], block[1]))
        index = split_topology(topology, rows, cols)
        row, col, tap = index.block_row.clone(), index.block_col.clone(), index.block_tap.clone()
        slots = row.numel()
        runs = rows if by == "row" else cols * taps  # and one more, of the free slots
        run = row if by == "row" else col * taps + tap
        key, order = torch.sort(run[index.row_order], stable=True)
        ids = index.row_order[order]
        position = torch.arange(slots, dtype=torch.int32, device=topology.device)
        start = _starts(key, runs + 1)
        of = key.long()
        first = (position - start[of]) % size == 0
        most = most_groups(slots, runs, size)
        line = torch.where(first, first.cumsum(0) - 1, most)  # positions that begin no group go to one spare line
        end = torch.minimum(position + size, start[of + 1])
        bounds = torch.zeros(most + 1, 2, dtype=torch.int32, device=topology.device)
        bounds[line] = torch.stack([position, end], 1)
        return Groups(bounds[:most], ids, row, col, tap)

    if by not in ("row", "col"):
        raise ValueError(f"by must be 'row' or 'col', got {by!r}")
    return cached(topology, ("weight_grad", *weight_shape, *block, by, size), build)
