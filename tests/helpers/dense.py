"""The oracle: the packed format written out with plain loops from its definition, and dense torch in float64.

Nothing here calls ddst, so that an error of the library's own packing cannot hide an error of an op.

`blocks` says which block lies in which slot of packed values: either int32 `slot_blocks`, or a bool mask, which stands
for its active blocks by rising rank without a free slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mask_dims(weight_shape: Sequence[int], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the block mask: block rows and columns rounded up, then the taps of a convolution."""
    rows, cols = -(-weight_shape[0] // block[0]), -(-weight_shape[1] // block[1])
    return (rows, cols, *weight_shape[2:])


def as_taps(mask: Tensor) -> Tensor:
    """The mask as [R, C, T]; a linear layer has one tap."""
    return mask.reshape(mask.shape[0], mask.shape[1], -1)


def active_blocks(mask: Tensor) -> list[tuple[int, int, int]]:
    """(row, column, tap) of every active block, by rank."""
    flat = as_taps(mask).tolist()
    return [
        (r, c, t) for r, row in enumerate(flat) for c, taps in enumerate(row) for t, active in enumerate(taps) if active
    ]


def row_major(mask: Tensor) -> Tensor:
    """The int32 `slot_blocks` that a mask alone stands for."""
    dims = as_taps(mask).shape
    return torch.tensor([(r * dims[1] + c) * dims[2] + t for r, c, t in active_blocks(mask)], dtype=torch.int32)


def placed_blocks(blocks: Tensor, dims: Sequence[int]) -> list[tuple[int, int, int] | None]:
    """(row, column, tap) of the block in every slot, None for a free slot; `dims` is the shape of the mask."""
    if blocks.dtype == torch.bool:
        return list(active_blocks(blocks))
    cols, taps = dims[1], torch.Size(dims[2:]).numel()
    return [None if rank < 0 else (rank // taps // cols, rank // taps % cols, rank % taps) for rank in blocks.tolist()]


def mask_of(blocks: Tensor, dims: Sequence[int]) -> Tensor:
    """The block mask of the shape `dims` of what lies in slots; no block lies in two."""
    mask = torch.zeros(*dims[:2], torch.Size(dims[2:]).numel(), dtype=torch.bool)
    for block in placed_blocks(blocks, dims):
        if block is not None:
            assert not mask[block], f"block {block} lies in two slots"
            mask[block] = True
    return mask.view(*dims)


def _indices(placed: list[tuple[int, int, int] | None]) -> tuple[Tensor, Tensor]:
    """The slots [n] that hold a block, and (row, column, tap) [n, 3] of these."""
    slots = [slot for slot, block in enumerate(placed) if block is not None]
    triples = [block for block in placed if block is not None]
    return torch.tensor(slots, dtype=torch.long), torch.tensor(triples, dtype=torch.long).reshape(-1, 3)


def topology_of(blocks: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """row_ptr | col_ptr | block_row | block_col | block_tap | row_order | col_order as one int32 tensor, by counting.

    `dims` is the shape of the mask, needed where `blocks` is not one.
    """
    rows, cols = (blocks.shape if dims is None else dims)[:2]
    placed = placed_blocks(blocks, blocks.shape if dims is None else dims)
    active = {slot: block for slot, block in enumerate(placed) if block is not None}
    free = [slot for slot, block in enumerate(placed) if block is None]
    row_ptr = [sum(1 for b in active.values() if b[0] < r) for r in range(rows + 1)]
    col_ptr = [sum(1 for b in active.values() if b[1] < c) for c in range(cols + 1)]
    triples = [(rows, cols, 0) if block is None else block for block in placed]
    row_order = sorted(active, key=lambda slot: active[slot])
    col_order = sorted(active, key=lambda slot: (active[slot][1], active[slot][0], active[slot][2]))
    parts = [row_ptr, col_ptr, *([b[k] for b in triples] for k in range(3)), row_order + free, col_order + free]
    return torch.tensor([v for part in parts for v in part], dtype=torch.int32)


def unpack_blocks(values: Tensor, blocks: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """The dense weight of packed values; differentiable, twice too. Entries outside the channel counts are left out.

    Free slots are not read, so that NaN there does not show.
    """
    b_out, b_in = values.shape[1], values.shape[2]
    slot, place = _indices(placed_blocks(blocks, mask_dims(weight_shape, (b_out, b_in))))
    out = place[:, 0, None, None] * b_out + torch.arange(b_out)[None, :, None]
    col = place[:, 1, None, None] * b_in + torch.arange(b_in)[None, None, :]
    out, col, tap = torch.broadcast_tensors(out, col, place[:, 2, None, None])
    valid = (out < weight_shape[0]) & (col < weight_shape[1])
    flat = values.new_zeros(*weight_shape[:2], torch.Size(weight_shape[2:]).numel())
    return flat.index_put((out[valid], col[valid], tap[valid]), values[slot][valid]).reshape(tuple(weight_shape))


def blocks_of(dense: Tensor, block: tuple[int, int]) -> Tensor:
    """All blocks [R, C, T, b_out, b_in] of a dense tensor of weight shape, the outside part zero."""
    flat = dense.reshape(dense.shape[0], dense.shape[1], -1)
    rows, cols = mask_dims(flat.shape[:2], block)
    padded = flat.new_zeros(rows * block[0], cols * block[1], flat.shape[2])
    padded[: flat.shape[0], : flat.shape[1]] = flat
    return padded.reshape(rows, block[0], cols, block[1], -1).permute(0, 2, 4, 1, 3)


def pack_blocks(dense: Tensor, blocks: Tensor, block: tuple[int, int]) -> Tensor:
    """Packed values [slots, b_out, b_in] of the active blocks of a dense weight, zero in free slots."""
    placed = placed_blocks(blocks, mask_dims(dense.shape, block))
    slot, place = _indices(placed)
    values = dense.new_zeros(len(placed), *block)
    return values.index_put((slot,), blocks_of(dense, block)[place.unbind(1)])


def block_norms(dense: Tensor, block: tuple[int, int]) -> Tensor:
    """L2 norm of every block of a dense weight (or gradient), in the shape of the mask."""
    return blocks_of(dense, block).square().sum(dim=(-2, -1)).sqrt().reshape(mask_dims(dense.shape, block))


def inside(blocks: Tensor, weight_shape: Sequence[int], block: tuple[int, int]) -> Tensor:
    """Bool [slots, b_out, b_in]: entries of the packed values that lie in a block and within the channel counts."""
    return pack_blocks(torch.ones(tuple(weight_shape)), blocks, block).bool()


def active_entries(blocks: Tensor, weight_shape: Sequence[int], block: tuple[int, int]) -> Tensor:
    """Bool in the shape of the dense weight: entries whose block is active."""
    ones = torch.ones(len(placed_blocks(blocks, mask_dims(weight_shape, block))), *block)
    return unpack_blocks(ones, blocks, weight_shape).bool()
