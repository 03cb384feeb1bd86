"""What a sparse layer's slots mean, written out with plain loops: the oracle of tests of layers. Nothing calls ddst."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def places(slot_blocks: Tensor, dims: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(slot, row, column, tap) of every active block, by slot; ``dims`` is the shape of the block mask."""
    taps = math.prod(dims[2:])
    return [
        (slot, rank // taps // dims[1], rank // taps % dims[1], rank % taps)
        for slot, rank in enumerate(slot_blocks.tolist())
        if rank >= 0
    ]


def mask_from(slot_blocks: Tensor, dims: Sequence[int]) -> Tensor:
    """The block mask of slots."""
    mask = torch.zeros(dims[0], dims[1], math.prod(dims[2:]), dtype=torch.bool)
    for _, row, col, tap in places(slot_blocks, dims):
        assert not mask[row, col, tap], "a block lies in two slots"
        mask[row, col, tap] = True
    return mask.view(*dims)


def topology_from(slot_blocks: Tensor, dims: Sequence[int]) -> Tensor:
    """The topology vector of slots, by sorting tuples."""
    by_row = sorted(places(slot_blocks, dims), key=lambda p: p[1:])
    by_col = sorted(by_row, key=lambda p: (p[2], p[1], p[3]))
    free = [slot for slot, rank in enumerate(slot_blocks.tolist()) if rank < 0]
    at = {slot: (row, col, tap) for slot, row, col, tap in by_row} | dict.fromkeys(free, (dims[0], dims[1], 0))
    parts = [
        [sum(p[1] < r for p in by_row) for r in range(dims[0] + 1)],
        [sum(p[2] < c for p in by_row) for c in range(dims[1] + 1)],
        *([at[slot][k] for slot in range(slot_blocks.numel())] for k in range(3)),
        [p[0] for p in by_row] + free,
        [p[0] for p in by_col] + free,
    ]
    return torch.tensor([v for part in parts for v in part], dtype=torch.int32)


def dense_of(values: Tensor, slot_blocks: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """The dense weight, differentiable."""
    height, width = values.shape[1:]
    dims = (-(-weight_shape[0] // height), -(-weight_shape[1] // width), *weight_shape[2:])
    dense = values.new_zeros(weight_shape[0], weight_shape[1], math.prod(weight_shape[2:]))
    for slot, row, col, tap in places(slot_blocks, dims):
        part = dense[row * height : (row + 1) * height, col * width : (col + 1) * width, tap]
        part += values[slot, : part.shape[0], : part.shape[1]]
    return dense.view(*weight_shape)


def packed_from(dense: Tensor, slot_blocks: Tensor, block: tuple[int, int]) -> Tensor:
    """Packed values of a dense weight, zero in free slots and outside."""
    dims = (-(-dense.shape[0] // block[0]), -(-dense.shape[1] // block[1]), *dense.shape[2:])
    values = dense.new_zeros(slot_blocks.numel(), *block)
    for slot, row, col, tap in places(slot_blocks, dims):
        part = dense.flatten(2) if dense.dim() == 4 else dense[..., None]
        part = part[row * block[0] : (row + 1) * block[0], col * block[1] : (col + 1) * block[1], tap]
        values[slot, : part.shape[0], : part.shape[1]] = part
    return values


def slots_inside(slot_blocks: Tensor, weight_shape: Sequence[int], block: tuple[int, int]) -> Tensor:
    """bool: entries of the packed values that belong to an active block and lie within the channel counts."""
    return packed_from(torch.ones(tuple(weight_shape)), slot_blocks, block).bool()


def weight_of(layer: nn.Module) -> Tensor:
    """The dense weight of a layer's raw values."""
    return dense_of(layer.values, layer.slot_blocks, layer.weight_shape)


def block_map(layer: nn.Module) -> dict[int, int]:
    """The slot of every active block."""
    return {rank: slot for slot, rank in enumerate(layer.slot_blocks.tolist()) if rank >= 0}
