"""Index lists of the CUDA C++ kernels, written by one launch each: by a single program, as :mod:`.lists` says.

What a list holds is defined where it is made by operations of torch, for a topology on any device:
:mod:`ddst.ops.cuda.gather`, :mod:`ddst.ops.cuda.hopper_lists` and :mod:`ddst.ops.cuda.weight_grad_units`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Launch
from .lists import clear, close_ranks, place, rank_by_length

_TILE, _SIDE, _WARPS = 1024, 64, 8


@triton.jit
def spread_by_line(
    topology, held, R, C, taps, width, slots, groups, inner_blocks, s_h, s_w, lines, DGRAD: tl.constexpr,
    PER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Fills the table ``held [lines, taps, PER]`` with slots, -1 where there is no block, between two barriers.

    A line is a phase, a group of PER output blocks, and an inner block.
    """
    clear(held, lines * taps * PER, -1, TILE)
    tl.debug_barrier()
    for first in tl.range(0, slots, TILE):
        s = first + tl.arange(0, TILE)
        row, col, t = place(topology, s, s < slots, R, C, slots)
        if DGRAD:
            out = col
            inner = row
        else:
            out = row
            inner = col
        phase = t // width % s_h * s_w + t % width % s_w
        line = (phase * groups + out // PER) * inner_blocks + inner
        tl.store(held + (line * taps + t) * PER + out % PER, s, mask=(s < slots) & (row < R))
    tl.debug_barrier()


@triton.jit
def load_lines(held, line, lines, taps, TAPS: tl.constexpr, PER: tl.constexpr):
    """Slots ``[lines, TAPS, PER]`` of some lines, -1 where there is no block."""
    t = tl.arange(0, TAPS)[None, :, None]
    at = (line[:, None, None] * taps + t) * PER + tl.arange(0, PER)[None, None, :]
    return tl.load(held + at, mask=(line < lines)[:, None, None] & (t < taps), other=-1)


@triton.jit
def granule_masks(listed, BITS: tl.constexpr, PER: tl.constexpr):
    """``[lines, taps]`` of ``listed [lines, taps, PER]``: BITS bits for each place that is listed."""
    bits = ((1 << BITS) - 1) << (tl.arange(0, PER) * BITS)
    return tl.sum(listed * bits[None, None, :], axis=2)


@triton.jit(
    do_not_specialize=[
        "R", "C", "taps", "width", "slots", "groups", "inner_blocks", "s_h", "s_w", "lines", "ints", "first_slot",
    ]
)  # fmt: skip
def gather_records_kernel(
    topology, held, records, R, C, taps, width, slots, groups, inner_blocks, s_h, s_w, lines, ints, first_slot,
    DGRAD: tl.constexpr, PER: tl.constexpr, BITS: tl.constexpr, HEADER: tl.constexpr, TAPS: tl.constexpr,
    LINES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``ddst.ops.cuda.gather.gather_records``. ``first_slot``: ints of a record before those of its slots."""
    clear(records, lines * ints, 0, TILE)
    spread_by_line(topology, held, R, C, taps, width, slots, groups, inner_blocks, s_h, s_w, lines, DGRAD, PER, TILE)
    t = tl.arange(0, TAPS)[None, :]
    for first in tl.range(0, lines, LINES):
        line = first + tl.arange(0, LINES)
        slot = load_lines(held, line, lines, taps, TAPS, PER)
        listed = (slot >= 0).to(tl.int32)
        flat = tl.reshape(listed, (LINES, TAPS * PER))
        record = records + line * ints
        tl.store(record, tl.sum(flat, axis=1), mask=line < lines)
        mask = granule_masks(listed, BITS, PER)
        tl.store(record[:, None] + HEADER + t, mask, mask=(line < lines)[:, None] & (t < taps))
        rank = tl.cumsum(flat, 1) - flat
        tl.store(record[:, None] + first_slot + rank, tl.reshape(slot, (LINES, TAPS * PER)), mask=flat > 0)


@triton.jit(
    do_not_specialize=[
        "R", "C", "taps", "width", "slots", "groups", "inner_blocks", "s_h", "s_w", "lines", "ints", "first_row",
        "height",
    ]
)  # fmt: skip
def hopper_records_kernel(
    topology, held, ptr, records, order, R, C, taps, width, slots, groups, inner_blocks, s_h, s_w, lines, ints,
    first_row, height, DGRAD: tl.constexpr, PER: tl.constexpr, BITS: tl.constexpr, HEADER: tl.constexpr,
    TOGETHER: tl.constexpr, TAPS: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """``ddst.ops.cuda.hopper_lists.records_and_order``. ``first_row``: ints of a record before those of its rows;
    ``height``: rows of a block; ``ptr``: blocks listed before each group, and in all.
    """
    clear(records, lines * ints, 0, TILE)
    spread_by_line(topology, held, R, C, taps, width, slots, groups, inner_blocks, s_h, s_w, lines, DGRAD, PER, TILE)
    t = tl.arange(0, TAPS)[None, :]
    done = tl.sum(tl.zeros((LINES,), dtype=tl.int32), axis=0)
    for first in tl.range(0, lines, LINES):
        line = first + tl.arange(0, LINES)
        slot = load_lines(held, line, lines, taps, TAPS, PER)
        units = tl.reshape((slot >= 0).to(tl.int32), (LINES, TAPS, PER // TOGETHER, TOGETHER))
        units = tl.broadcast_to(tl.max(units, axis=3)[:, :, :, None], (LINES, TAPS, PER // TOGETHER, TOGETHER))
        listed = tl.reshape(units, (LINES, TAPS, PER))
        flat = tl.reshape(listed, (LINES, TAPS * PER))
        record = records + line * ints
        count = tl.sum(flat, axis=1)
        tl.store(record, count, mask=line < lines)
        mask = granule_masks(listed, BITS, PER)
        used = (mask > 0).to(tl.int32)
        tl.store(record[:, None] + HEADER + tl.cumsum(used, 1) - used, t + (mask << 16), mask=used > 0)
        row = tl.reshape(tl.where(slot < 0, slots, slot) * height, (LINES, TAPS * PER))
        tl.store(record[:, None] + first_row + tl.cumsum(flat, 1) - flat, row, mask=flat > 0)
        before = done + tl.cumsum(count, 0) - count
        tl.store(ptr + line // inner_blocks, before, mask=(line < lines) & (line % inner_blocks == 0))
        done += tl.sum(count, axis=0)
    tl.store(ptr + lines // inner_blocks, done)
    tl.debug_barrier()
    rank_by_length(ptr, order, lines // inner_blocks, SIDE)


@triton.jit(do_not_specialize=["R", "C", "taps", "slots", "across", "bands", "height", "width", "ints"])
def units_kernel(
    topology, held, ids, starts, firsts, units, R, C, taps, slots, across, bands, height, width, ints,
    PARTS: tl.constexpr, WARPS: tl.constexpr, PER_WARP: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """``ddst.ops.cuda.weight_grad_units.list_units``, of bands of ``height × width`` blocks, ``across`` side by side.

    ``held``: the table of slots, band by band, and after it the free ones; ``ids``: the slot at each position;
    ``starts``, ``firsts``: the position of each band's first slot, and of their end; its first group.
    """
    length = height * width * taps
    total = bands * length
    clear(held, total + slots, -1, TILE)
    clear(units, ints, -1, TILE)
    tl.debug_barrier()
    for first in tl.range(0, slots, TILE):
        s = first + tl.arange(0, TILE)
        row, col, t = place(topology, s, s < slots, R, C, slots)
        band = band_of(row, col, R, height, width, across, bands)
        at = band * length + (row % height * width + col % width) * taps + t
        tl.store(held + tl.where(row < R, at, total + s), s, mask=s < slots)
    tl.debug_barrier()
    close_ranks(held, ids, starts, bands, length, slots, TILE)
    tl.debug_barrier()
    groups_done = tl.sum(tl.zeros((SIDE,), dtype=tl.int32), axis=0)
    for first in tl.range(0, bands + 1, SIDE):
        band = first + tl.arange(0, SIDE)
        its = units_of(starts, band, band <= bands, PARTS)
        groups = tl.cdiv(its, WARPS * PER_WARP)
        tl.store(firsts + band, groups_done + tl.cumsum(groups, 0) - groups, mask=band <= bands)
        groups_done += tl.sum(groups, axis=0)
    tl.debug_barrier()
    for first in tl.range(0, slots * PARTS, TILE):
        i = first + tl.arange(0, TILE)
        ok = i < slots * PARTS
        slot = tl.load(ids + i // PARTS, mask=ok, other=0)
        row, col, _ = place(topology, slot, ok, R, C, slots)
        band = band_of(row, col, R, height, width, across, bands)
        its = tl.maximum(units_of(starts, band, ok, PARTS), 1).to(tl.int64)  # products of two counts may need 64 bits
        groups = tl.cdiv(its, WARPS * PER_WARP)
        rank = i - tl.load(starts + band, mask=ok, other=0) * PARTS
        group = rank * groups // its
        begin = tl.cdiv(group * its, groups)
        size = tl.cdiv((group + 1) * its, groups) - begin
        warp = (rank - begin) * WARPS // size
        position = rank - begin - tl.cdiv(warp * size, WARPS)
        line = (tl.load(firsts + band, mask=ok, other=0) + group) * WARPS + warp
        tl.store(units + line * PER_WARP + position, slot * PARTS + i % PARTS, mask=ok)


@triton.jit
def band_of(row, col, R, height, width, across, bands):
    """The band of blocks; that of free slots comes behind the others."""
    return tl.where(row < R, row // height * across + col // width, bands)


@triton.jit
def units_of(starts, band, ok, PARTS: tl.constexpr):
    """How many units bands have."""
    end = tl.load(starts + band + 1, mask=ok, other=0)
    return (end - tl.load(starts + band, mask=ok, other=0)) * PARTS


def _lines(taps: int, per_group: int) -> dict[str, int]:
    """Lines of a tile, each with room for ``taps``, a power of two."""
    room = triton.next_power_of_2(taps)
    return {"TAPS": room, "LINES": max(1, _TILE // (room * per_group)), "TILE": _TILE}


def gather_records_launch(numbers: tuple[int, ...], dgrad: bool, per_group: int, granules: int, header: int) -> Launch:
    """``numbers``: those that :func:`gather_records_kernel` takes, in their order; ``granules``: of a block."""
    constants = {"DGRAD": dgrad, "PER": per_group, "BITS": granules, "HEADER": header, **_lines(numbers[2], per_group)}
    return Launch(gather_records_kernel, (1,), numbers, constants, _WARPS, 1)


def hopper_records_launch(
    numbers: tuple[int, ...], dgrad: bool, per_group: int, granules: int, header: int, together: int
) -> Launch:
    """``numbers``: those that :func:`hopper_records_kernel` takes, in their order; ``granules``: of a block."""
    constants = {"DGRAD": dgrad, "PER": per_group, "BITS": granules, "HEADER": header, "TOGETHER": together}
    constants |= {**_lines(numbers[2], per_group), "SIDE": _SIDE}
    return Launch(hopper_records_kernel, (1,), numbers, constants, _WARPS, 1)


def units_launch(numbers: tuple[int, ...], parts: int, warps: int, per_warp: int) -> Launch:
    """``numbers``: those that :func:`units_kernel` takes, in their order."""
    constants = {"PARTS": parts, "WARPS": warps, "PER_WARP": per_warp, "TILE": _TILE, "SIDE": _SIDE}
    return Launch(units_kernel, (1,), numbers, constants, _WARPS, 1)
