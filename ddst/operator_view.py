"""How the operators see a weight that is not theirs as it lies: grouped, transposed, with its taps backwards, a matrix.

Each view is another map of the same slots over another grid of blocks; the values stay where they are. As a matrix a
weight ``[C_out, C_in, kH, kW]`` is ``[C_out, C · kH · kW · b_in]``: its columns are in *block order* (input block, tap,
channel within the block), where those of a flattened weight are in the order (channel, tap).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def operator_shape(weight_shape: Sequence[int], groups: int = 1) -> tuple[int, ...]:
    """What the operators are told of a weight: ``(C_out, C_in, kH, kW)``, of all groups together; one row if it is 1-D.

    >>> operator_shape((32, 8, 3), 4), operator_shape((32, 8))
    ((32, 32, 1, 3), (32, 8))
    """
    rows, cols, *space = weight_shape
    return (rows, cols * groups, *([1, *space] if len(space) == 1 else space))


def block_diagonal_slots(slot_blocks: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    """``slot_blocks`` of the block-diagonal weight that a grouped convolution's weight stands for.

    A block of group ``g`` (its row divided by ``R / groups``) lies ``g · C`` columns further right there.

    Args:
        slot_blocks: of the grouped weight. shape: of its block mask, ``[R, C, …]``; ``groups`` divides ``R``.

    >>> block_diagonal_slots(torch.tensor([1, 3, -1]), (2, 2), 2).tolist()
    [1, 7, -1]
    """
    if groups == 1:
        return slot_blocks
    width = math.prod(shape[1:])
    row = slot_blocks // width
    moved = slot_blocks + (row * (groups - 1) + row // (shape[0] // groups)) * width
    return torch.where(slot_blocks < 0, slot_blocks, moved)


def turned_slots(
    slot_blocks: Tensor, shape: Sequence[int], transposed: bool = False, flipped: bool = False, matrix: bool = False
) -> tuple[Tensor, tuple[int, ...]]:
    """``(slot_blocks, mask shape)`` of a weight with its taps backwards, as a matrix of all taps, or transposed.

    >>> turned_slots(torch.tensor([1, -1]), (2, 2, 3), transposed=True, flipped=True)
    (tensor([ 1, -1]), (2, 2, 3))
    """
    rows, cols, *space = shape
    taps = math.prod(space)
    row, col, tap = slot_blocks // (cols * taps), slot_blocks // taps % cols, slot_blocks % taps
    tap = taps - 1 - tap if flipped else tap
    if matrix:
        col, cols, tap, taps, space = col * taps + tap, cols * taps, torch.zeros_like(tap), 1, []
    if transposed:
        row, col, rows, cols = col, row, cols, rows
    return torch.where(slot_blocks < 0, slot_blocks, (row * cols + col) * taps + tap), (rows, cols, *space)


def to_block_order(x: Tensor, taps: int, width: int) -> Tensor:
    """``[…, channels · taps]`` as it lies in a flattened weight, in block order: ``[…, C · taps · width]``.

    Channels beyond the last are zero.

    >>> to_block_order(torch.tensor([1, 2, 3, 4, 5, 6]), taps=2, width=2).tolist()
    [1, 3, 2, 4, 5, 0, 6, 0]
    """
    leading, channels = x.shape[:-1], x.shape[-1] // taps
    blocks = -(-channels // width)
    x = x.reshape(*leading, channels, taps)
    if blocks * width != channels:
        x = F.pad(x, (0, 0, 0, blocks * width - channels))
    return x.reshape(*leading, blocks, width, taps).transpose(-1, -2).reshape(*leading, blocks * taps * width)


def from_block_order(x: Tensor, channels: int, taps: int, width: int) -> Tensor:
    """The inverse of :func:`to_block_order`, with the taps in a dimension of their own: ``[…, channels, taps]``.

    >>> from_block_order(torch.tensor([1, 3, 2, 4, 5, 0, 6, 0]), 3, taps=2, width=2).tolist()
    [[1, 2], [3, 4], [5, 6]]
    """
    leading, blocks = x.shape[:-1], -(-channels // width)
    x = x.reshape(*leading, blocks, taps, width).transpose(-1, -2).reshape(*leading, blocks * width, taps)
    return x[..., :channels, :]
