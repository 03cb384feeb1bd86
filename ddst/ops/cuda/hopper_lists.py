"""Lists that the gather kernel for sm_90a walks (``csrc/cuda/hopper_gather_geometry.hpp``), made on the device.

A record for each phase of the taps, group of 128 output channels and input block holds the taps that have a block,
which granules of 16 channels they are, and where the blocks lie. An order has the groups with most blocks first, so
that the last ones to be computed are short.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import topology as tp

TILE_CHANNELS, GRANULE, HEADER = 128, 16, 4  # kHopperChannels, kSlice, kRecordHeader


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
    width, taps = weight_shape[3], weight_shape[2] * weight_shape[3]
    out, inner = (index.block_col, index.block_row) if input_gradient else (index.block_row, index.block_col)
    side, depth = (block[1], block[0]) if input_gradient else block
    out_channels, in_channels = (weight_shape[1], weight_shape[0]) if input_gradient else weight_shape[:2]
    phases = stride if input_gradient else (1, 1)
    per_group, per_block, together = TILE_CHANNELS // side, side // GRANULE, max(1, granules * GRANULE // side)
    if (rows := out.numel() * block[0]) >= 2**31:
        raise ValueError(f"packed values must have fewer than 2^31 rows, got {rows}")
    groups, in_blocks = -(-out_channels // TILE_CHANNELS), -(-in_channels // depth)
    ints, padded = record_ints(taps, per_group)
    lines, slots, device = phases[0] * phases[1] * groups * in_blocks, out.numel(), out.device

    # Every place for a block: its slot + 1, or 0; one place more takes what would be said of free slots.
    tap = index.block_tap.long()
    phase = tap // width % phases[0] * phases[1] + tap % width % phases[1]
    line = (phase * groups + out // per_group) * in_blocks + inner
    nowhere = lines * taps * per_group
    free = index.block_row == tp.grid(weight_shape, block)[0]
    at = torch.where(free, nowhere, (line * taps + tap) * per_group + out % per_group)
    held = torch.zeros(nowhere + 1, dtype=torch.int64, device=device)
    held = held.scatter_(0, at, torch.arange(1, slots + 1, device=device))[:nowhere].view(lines, taps, per_group)

    united = held.view(lines, taps, per_group // together, together)
    listed = (united > 0).any(-1, keepdim=True).expand_as(united).reshape(held.shape)
    bits = ((1 << per_block) - 1) << torch.arange(per_group, device=device) * per_block
    mask = (listed * bits).sum(-1)
    used = mask > 0
    entries = torch.where(used, torch.arange(taps, device=device) + (mask << 16), 0)
    row = torch.where(held > 0, held - 1, slots) * block[0]

    records = torch.zeros(lines, ints + 1, dtype=torch.int64, device=device)  # the last int takes what is not listed
    records[:, 0] = listed.sum((1, 2))
    records.scatter_(1, torch.where(used, HEADER + used.cumsum(-1) - 1, ints), entries)
    flat = listed.view(lines, -1)
    records.scatter_(1, torch.where(flat, HEADER + padded + flat.cumsum(-1) - 1, ints), row.view(lines, -1))
    work = records[:, 0].view(-1, in_blocks).sum(-1)
    order = torch.sort(work, descending=True, stable=True)[1]
    return records[:, :ints].int().contiguous(), order.int()
