"""The oracle: the packed format written out with plain loops from its definition, and dense torch in float64.

Nothing here calls ddst, so that an error of the library's own packing cannot hide an error of an op.
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
    """(row, column, tap) of every active block, by id."""
    flat = as_taps(mask).tolist()
    return [
        (r, c, t) for r, row in enumerate(flat) for c, taps in enumerate(row) for t, active in enumerate(taps) if active
    ]


def topology_of(mask: Tensor, slots: Sequence[int] | None = None) -> Tensor:
    """row_ptr | col_ptr | block_row | block_col | block_tap | row_order | col_order as one int32 tensor, by counting.

    Args:
        slots: for each slot the number of its block, as `active_blocks` counts them, or -1; by default in that order.
    """
    active, free = active_blocks(mask), (mask.shape[0], mask.shape[1], 0)
    blocks = active if slots is None else [active[n] if n >= 0 else free for n in slots]
    rows, cols = mask.shape[0], mask.shape[1]
    row_ptr = [sum(1 for b in active if b[0] < r) for r in range(rows + 1)]
    col_ptr = [sum(1 for b in active if b[1] < c) for c in range(cols + 1)]
    row_order = sorted(range(len(blocks)), key=lambda i: blocks[i])
    col_order = sorted(range(len(blocks)), key=lambda i: (blocks[i][1], blocks[i][0], blocks[i][2]))
    parts = [row_ptr, col_ptr, *([b[k] for b in blocks] for k in range(3)), row_order, col_order]
    return torch.tensor([v for part in parts for v in part], dtype=torch.int32)


def unpack_blocks(values: Tensor, mask: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """The dense weight of packed values; differentiable, twice too. Entries outside the channel counts are left out."""
    b_out, b_in = values.shape[1], values.shape[2]
    placed = torch.tensor(active_blocks(mask), dtype=torch.long).reshape(-1, 3)
    out = placed[:, 0, None, None] * b_out + torch.arange(b_out)[None, :, None]
    col = placed[:, 1, None, None] * b_in + torch.arange(b_in)[None, None, :]
    out, col, tap = torch.broadcast_tensors(out, col, placed[:, 2, None, None])
    valid = (out < weight_shape[0]) & (col < weight_shape[1])
    flat = values.new_zeros(*weight_shape[:2], as_taps(mask).shape[2])
    return flat.index_put((out[valid], col[valid], tap[valid]), values[valid]).reshape(tuple(weight_shape))


def blocks_of(dense: Tensor, block: tuple[int, int]) -> Tensor:
    """All blocks [R, C, T, b_out, b_in] of a dense tensor of weight shape, the outside part zero."""
    flat = dense.reshape(dense.shape[0], dense.shape[1], -1)
    rows, cols = mask_dims(flat.shape[:2], block)
    padded = flat.new_zeros(rows * block[0], cols * block[1], flat.shape[2])
    padded[: flat.shape[0], : flat.shape[1]] = flat
    return padded.reshape(rows, block[0], cols, block[1], -1).permute(0, 2, 4, 1, 3)


def pack_blocks(dense: Tensor, mask: Tensor, block: tuple[int, int]) -> Tensor:
    """Packed values [nnz, b_out, b_in] of the active blocks of a dense weight."""
    return blocks_of(dense, block)[as_taps(mask)]


def block_norms(dense: Tensor, block: tuple[int, int]) -> Tensor:
    """L2 norm of every block of a dense weight (or gradient), in the shape of the mask."""
    return blocks_of(dense, block).square().sum(dim=(-2, -1)).sqrt().reshape(mask_dims(dense.shape, block))


def inside(mask: Tensor, weight_shape: Sequence[int], block: tuple[int, int]) -> Tensor:
    """Bool [nnz, b_out, b_in]: entries of the packed values that lie within the channel counts."""
    return pack_blocks(torch.ones(tuple(weight_shape)), mask, block).bool()


def active_entries(mask: Tensor, weight_shape: Sequence[int], block: tuple[int, int]) -> Tensor:
    """Bool in the shape of the dense weight: entries whose block is active."""
    ones = torch.ones(len(active_blocks(mask)), *block)
    return unpack_blocks(ones, mask, weight_shape).bool()
