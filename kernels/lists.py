"""Index lists written by one launch each: what the other kernels walk, from a topology that lies on the device.

Each list is written by a single program. It spreads the slots over a table of all blocks there could be, in the order
of the list, and closes the ranks: nothing is sorted, and the time is that of a pass or two over the table. The host
knows every size beforehand and waits for nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Launch

_TILE, _SIDE, _WARPS = 1024, 64, 8


@triton.jit
def clear(at, count, VALUE: tl.constexpr, TILE: tl.constexpr):
    """Writes VALUE to ``count`` entries."""
    for first in tl.range(0, count, TILE):
        i = first + tl.arange(0, TILE)
        tl.store(at + i, tl.full((TILE,), VALUE, tl.int32), mask=i < count)


@triton.jit
def place(topology, s, ok, R, C, slots):
    """(output block, input block, tap) of slots; of free ones (R, C, 0)."""
    at = topology + R + C + 2 + s
    row = tl.load(at, mask=ok, other=0)
    col = tl.load(at + slots, mask=ok, other=0)
    return row, col, tl.load(at + 2 * slots, mask=ok, other=0)


@triton.jit
def phase(position, stride):
    """``position`` modulo ``stride``, from 0 on for negative ones, too."""
    return (position % stride + stride) % stride


@triton.jit(
    do_not_specialize=[
        "R", "C", "taps", "width", "slots", "across", "channels", "phases", "per_phase", "s_h", "s_w", "p_h", "p_w",
        "d_h", "d_w",
    ]
)  # fmt: skip
def row_lists_kernel(
    topology, held, ptr, entries, ids, order, R, C, taps, width, slots, across, channels, phases, per_phase,
    s_h, s_w, p_h, p_w, d_h, d_w, DGRAD: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    """:class:`.index.RowLists`. ``held``: the table, ``[phases · across, channels · taps]``, of slots."""
    length = channels * taps
    clear(held, phases * across * length, -1, TILE)
    clear(entries, slots + 1, 0, TILE)
    clear(ids, (slots + 1) * ROWS, -1, TILE)
    tl.debug_barrier()
    for first in tl.range(0, slots, TILE):
        s = first + tl.arange(0, TILE)
        row, col, t = place(topology, s, s < slots, R, C, slots)
        if DGRAD:
            row_phase = phase(t // width * d_h - p_h, s_h) * s_w + phase(t % width * d_w - p_w, s_w)
            line = row_phase * across + col
            channel = row
        else:
            line = row
            channel = col
        tl.store(held + line * length + channel * taps + t, s, mask=(s < slots) & (row < R))
    tl.debug_barrier()
    groups = phases * per_phase
    done = tl.sum(tl.zeros((TILE,), dtype=tl.int32), axis=0)
    for first in tl.range(0, groups * length, TILE):
        d = first + tl.arange(0, TILE)
        group = d // length
        k = d % length
        row = group % per_phase * ROWS
        own = held + (group // per_phase * across + row) * length + k
        present = d < 0
        for j in tl.static_range(ROWS):
            ok = (group < groups) & (row + j < across)
            present = present | (tl.load(own + j * length, mask=ok, other=-1) >= 0)
        one = present.to(tl.int32)
        position = done + tl.cumsum(one, 0) - one
        t = k % taps
        tl.store(entries + position, (k // taps << 2 * BITS) | (t // width << BITS) | t % width, mask=present)
        for j in tl.static_range(ROWS):
            ok = (group < groups) & (row + j < across)
            slot = tl.load(own + j * length, mask=ok, other=-1)
            tl.store(ids + position * ROWS + j, slot, mask=present)
        tl.store(ptr + group, position, mask=(group < groups) & (k == 0))
        done += tl.sum(one, axis=0)
    tl.store(ptr + groups, done)
    tl.debug_barrier()
    rank_by_length(ptr, order, groups, SIDE)


@triton.jit
def lengths(ptr, g, groups):
    """How many entries groups have."""
    return tl.load(ptr + g + 1, mask=g < groups, other=0) - tl.load(ptr + g, mask=g < groups, other=0)


@triton.jit
def rank_by_length(ptr, order, groups, SIDE: tl.constexpr):
    """Writes the groups by falling number of entries, equal ones by number; group g has ``ptr[g + 1] - ptr[g]``."""
    for first in tl.range(0, groups, SIDE):
        g = first + tl.arange(0, SIDE)
        own_length = lengths(ptr, g, groups)
        rank = tl.zeros((SIDE,), dtype=tl.int32)
        for other in tl.range(0, groups, SIDE):
            o = other + tl.arange(0, SIDE)
            longer = lengths(ptr, o, groups)[None, :] > own_length[:, None]
            same = lengths(ptr, o, groups)[None, :] == own_length[:, None]
            before = longer | (same & (o[None, :] < g[:, None]))
            rank += tl.sum((before & (o < groups)[None, :]).to(tl.int32), axis=1)
        tl.store(order + rank, g, mask=g < groups)


@triton.jit
def close_ranks(held, ids, starts, runs, length, slots, TILE: tl.constexpr):
    """Writes a table's slots to ``ids``, one after another, and to ``starts`` the position of each run's first one.

    The table has ``runs`` times ``length`` places, -1 where there is no block, and after them ``slots`` for free slots,
    a run as well; last in ``starts`` is their end.
    """
    total = runs * length
    done = tl.sum(tl.zeros((TILE,), dtype=tl.int32), axis=0)
    for first in tl.range(0, total + slots, TILE):
        d = first + tl.arange(0, TILE)
        slot = tl.load(held + d, mask=d < total + slots, other=-1)
        one = (slot >= 0).to(tl.int32)
        position = done + tl.cumsum(one, 0) - one
        tl.store(ids + position, slot, mask=slot >= 0)
        tl.store(starts + d // length, position, mask=(d % length == 0) & (d <= total) & (d < total + slots))
        done += tl.sum(one, axis=0)
    tl.store(starts + runs + 1, done)


@triton.jit(do_not_specialize=["R", "C", "taps", "slots", "most", "size"])
def groups_kernel(
    topology, held, starts, bounds, ids, row, col, tap, R, C, taps, slots, most, size, BY_ROW: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """:class:`.index.Groups`. ``held``: the table of slots, run by run, and after it the free ones; ``starts``: the
    position of each run's first slot, and of their end.
    """
    total = R * C * taps
    runs = R if BY_ROW else C * taps
    length = total // runs
    clear(held, total + slots, -1, TILE)
    clear(bounds, 2 * most, 0, TILE)
    tl.debug_barrier()
    for first in tl.range(0, slots, TILE):
        s = first + tl.arange(0, TILE)
        r, c, t = place(topology, s, s < slots, R, C, slots)
        tl.store(row + s, r, mask=s < slots)
        tl.store(col + s, c, mask=s < slots)
        tl.store(tap + s, t, mask=s < slots)
        at = (r * C + c) * taps + t if BY_ROW else (c * taps + t) * R + r
        tl.store(held + tl.where(r < R, at, total + s), s, mask=s < slots)
    tl.debug_barrier()
    close_ranks(held, ids, starts, runs, length, slots, TILE)
    tl.debug_barrier()
    done = tl.sum(tl.zeros((TILE,), dtype=tl.int32), axis=0)
    lines = tl.sum(tl.zeros((TILE,), dtype=tl.int32), axis=0)
    for first in tl.range(0, total + slots, TILE):
        d = first + tl.arange(0, TILE)
        present = tl.load(held + d, mask=d < total + slots, other=-1) >= 0
        one = present.to(tl.int32)
        position = done + tl.cumsum(one, 0) - one
        run = tl.minimum(d // length, runs)
        begin = tl.load(starts + run, mask=present, other=0)
        end = tl.load(starts + run + 1, mask=present, other=0)
        begins = present & ((position - begin) % size == 0)
        line = lines + tl.cumsum(begins.to(tl.int32), 0) - 1
        tl.store(bounds + 2 * line, position, mask=begins)
        tl.store(bounds + 2 * line + 1, tl.minimum(position + size, end), mask=begins)
        done += tl.sum(one, axis=0)
        lines += tl.sum(begins.to(tl.int32), axis=0)


def row_lists_launch(numbers: tuple[int, ...], dgrad: bool, rows: int, bits: int) -> Launch:
    """``numbers``: those that :func:`row_lists_kernel` takes, in their order."""
    constants = {"DGRAD": dgrad, "ROWS": rows, "BITS": bits, "TILE": _TILE, "SIDE": _SIDE}
    return Launch(row_lists_kernel, (1,), numbers, constants, _WARPS, 1)


def groups_launch(numbers: tuple[int, ...], by_row: bool) -> Launch:
    """``numbers``: those that :func:`groups_kernel` takes, in their order."""
    return Launch(groups_kernel, (1,), numbers, {"BY_ROW": by_row, "TILE": _TILE}, _WARPS, 1)
