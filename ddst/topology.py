"""The packed block-sparse format: which blocks of a weight are active, and in which order they are stored.

A weight ``[C_out, C_in, kH, kW]`` is cut into blocks of ``b_out × b_in`` channels *at one tap* ``(kh, kw)``. With
``R = ceil(C_out / b_out)``, ``C = ceil(C_in / b_in)`` and ``T = kH · kW`` there are ``R · C · T`` blocks, and

* ``block_mask`` (bool, ``[R, C, kH, kW]``; a linear weight has the mask ``[R, C]``) says which are active;
* a block's *id* is its rank among the active ones in row-major order of the mask: output block row, input block, tap;
* ``values[id, i, j] = W[row · b_out + i, col · b_in + j, kh, kw]``, shape ``[nnz, b_out, b_in]``. The part of an edge
  block that lies outside the weight is stored too, and is always exactly zero;
* ``topology`` is one int32 vector, the concatenation of

      row_ptr [R + 1] | col_ptr [C + 1] | block_row [nnz] | block_col [nnz] | block_tap [nnz] | col_order [nnz]

  Ids ``row_ptr[r] … row_ptr[r + 1] - 1`` lie in output block row ``r``. ``col_order[col_ptr[c] … col_ptr[c + 1] - 1]``
  are the ids in input block ``c``, sorted by output row, then tap: the transposed order, which refers to the same
  values. ``block_tap = kh · kW + kw``.

``csrc/topology.hpp`` reads the same vector; nothing else knows its layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import (
    MAX_INT,
    check_generator,
    check_int,
    check_ints,
    check_number,
    check_tensor,
    check_weight_shape,
)

MAX_BLOCK = 64


class Index(NamedTuple):
    """The sections of a topology vector, as views."""

    row_ptr: Tensor
    col_ptr: Tensor
    block_row: Tensor
    block_col: Tensor
    block_tap: Tensor
    col_order: Tensor


def check_block(block: Sequence[int] | int, name: str = "block") -> tuple[int, int]:
    """Returns ``(b_out, b_in)`` of a pair, or of one number for a square block.

    Raises:
        TypeError: not an int or a pair of ints.
        ValueError: an entry outside 1 … 64.

    >>> check_block(16), check_block((16, 4))
    ((16, 16), (16, 4))
    """
    b_out, b_in = check_ints(name, block, 2, 1, MAX_BLOCK, one_tuple=False)
    return b_out, b_in


def grid(weight_shape: Sequence[int], block: tuple[int, int]) -> tuple[int, int, int]:
    """``(R, C, T)``: output block rows, input blocks and taps of a weight.

    >>> grid((40, 20, 3, 3), (16, 16))
    (3, 2, 9)
    """
    return (
        -(-weight_shape[0] // block[0]),
        -(-weight_shape[1] // block[1]),
        math.prod(weight_shape[2:]),
    )


def mask_shape(weight_shape: Sequence[int], block: tuple[int, int]) -> tuple[int, ...]:
    """``[ceil(C_out/b_out), ceil(C_in/b_in), kH, kW]``, the block mask's shape; a linear weight's has no ``kH, kW``.

    >>> mask_shape((40, 20, 3, 3), (16, 16))
    (3, 2, 3, 3)
    """
    rows, cols, _ = grid(weight_shape, block)
    return (rows, cols, *weight_shape[2:])


def block_sizes(weight_shape: Sequence[int], block: tuple[int, int]) -> Tensor:
    """``[R, C]`` on the CPU: number of a block's entries that lie inside the weight; edge blocks have fewer.

    >>> block_sizes((20, 16), (16, 16)).tolist()
    [[256], [64]]
    """
    rows, cols, _ = grid(weight_shape, block)
    height = (weight_shape[0] - block[0] * torch.arange(rows, device="cpu")).clamp(max=block[0])
    width = (weight_shape[1] - block[1] * torch.arange(cols, device="cpu")).clamp(max=block[1])
    return height[:, None] * width[None, :]


def mask_sizes(weight_shape: Sequence[int], block: tuple[int, int]) -> Tensor:
    """:func:`block_sizes` in the shape of the block mask: ``[R, C, kH, kW]``, a linear weight's ``[R, C]``. A view.

    >>> mask_sizes((20, 16, 1, 2), (16, 16)).tolist()
    [[[[256, 256]]], [[[64, 64]]]]
    """
    sizes = block_sizes(weight_shape, block)
    return sizes.view(*sizes.shape, *[1] * (len(weight_shape) - 2)).expand(mask_shape(weight_shape, block))


def build_topology(mask: Tensor) -> Tensor:
    """The topology vector of a block mask (see the module's docstring), int32, on the mask's device.

    Args:
        mask: bool, ``[R, C]`` or ``[R, C, kH, kW]``.

    Cost: one sort of ``nnz`` keys. On CUDA one host synchronisation (the number of blocks).

    >>> build_topology(torch.tensor([[True, False], [True, True]])).tolist()
    [0, 1, 3, 0, 2, 3, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 2]
    """
    check_mask(mask)
    if mask.is_meta:
        raise ValueError("mask must have entries, got one on the meta device")
    rows, cols = mask.shape[:2]
    taps = mask.shape[2:].numel()
    flat = mask.reshape(-1).nonzero()[:, 0]
    row = flat // (cols * taps)
    col = flat // taps % cols
    tap = flat % taps
    row_ptr = torch.zeros(rows + 1, dtype=torch.int64, device=mask.device)
    col_ptr = torch.zeros(cols + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(torch.bincount(row, minlength=rows), 0, out=row_ptr[1:])
    torch.cumsum(torch.bincount(col, minlength=cols), 0, out=col_ptr[1:])
    order = torch.argsort(col, stable=True)
    return torch.cat([row_ptr, col_ptr, row, col, tap, order]).to(torch.int32)


def split_topology(topology: Tensor, rows: int, cols: int) -> Index:
    """The sections of a topology vector as views.

    >>> split_topology(build_topology(torch.eye(2, dtype=torch.bool)), 2, 2).block_col.tolist()
    [0, 1]
    """
    nnz = (topology.numel() - rows - cols - 2) // 4
    return Index(*topology.split([rows + 1, cols + 1, nnz, nnz, nnz, nnz]))


def check_mask(mask: Tensor, shape: Sequence[int] | None = None, name: str = "block_mask") -> None:
    """Raises TypeError or ValueError unless ``mask`` is a bool tensor of a block mask's shape."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, got {got}")
    if shape is not None and tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(mask.shape)}")
    if mask.dim() not in (2, 4):
        raise ValueError(f"{name} must have the shape [R, C] or [R, C, kH, kW], got {tuple(mask.shape)}")
    if mask.numel() >= 2**31:
        raise ValueError(f"{name} has {mask.numel()} blocks, more than int32 can index: use larger blocks")


def block_count(density: float, total: int) -> int:
    """Number of active blocks of ``total`` at a density: rounded, and at least one.

    >>> block_count(0.1, 144), block_count(0.001, 144)
    (14, 1)
    """
    return max(1, round(check_number("density", density, most=1, above=0) * check_int("total", total, 1)))


def check_block_total(weight_shape: Sequence[int], block: tuple[int, int]) -> int:
    """Number of blocks of a weight, before anything is made of that size.

    Raises:
        ValueError: more than an int32 index can hold.

    >>> check_block_total((40, 20, 3, 3), (16, 16))
    54
    """
    total = math.prod(grid(weight_shape, block))
    if total > MAX_INT:
        sizes = "x".join(map(str, weight_shape))
        raise ValueError(
            f"a weight of {sizes} has {total} blocks of {block[0]}x{block[1]}, more than int32 can index: "
            "use larger blocks (block) or smaller sizes"
        )
    return total


def random_mask(
    weight_shape: Sequence[int], block: tuple[int, int], nnz: int, generator: torch.Generator | None = None
) -> Tensor:
    """A random mask of ``nnz`` active blocks that leaves no block row and no block column empty where ``nnz`` allows.

    The first ``min(nnz, max(R, C))`` blocks pair a shuffled list of output block rows with a shuffled list of input
    blocks at random taps; the rest is drawn without replacement from what is left.

    Returns:
        bool, ``[R, C, kH, kW]`` (``[R, C]`` for a linear weight), on the CPU.

    >>> mask = random_mask((64, 64, 3, 3), (16, 16), 5)
    >>> int(mask.sum()), bool(mask.any(3).any(2).any(1).all())
    (5, True)
    """
    weight_shape, block = check_weight_shape("weight_shape", weight_shape), check_block(block)
    check_generator("generator", generator)
    rows, cols, taps = grid(weight_shape, block)
    total = check_block_total(weight_shape, block)
    nnz = check_int("nnz", nnz, 0, total)
    cover = min(nnz, max(rows, cols))

    def cycle(count: int) -> Tensor:
        repeats = -(-cover // count) if cover else 0
        shuffles = [torch.randperm(count, generator=generator, device="cpu") for _ in range(repeats)]
        return torch.cat(shuffles)[:cover] if shuffles else torch.zeros(0, dtype=torch.int64, device="cpu")

    # Named, because "with torch.device(...)" changes where tensors are made by default.
    flat = torch.zeros(total, dtype=torch.bool, device="cpu")
    tap = torch.randint(taps, (cover,), generator=generator, device="cpu")
    flat[(cycle(rows) * cols + cycle(cols)) * taps + tap] = True
    free = (~flat).nonzero()[:, 0]
    missing = nnz - int(flat.sum())
    flat[free[torch.randperm(free.numel(), generator=generator, device="cpu")[:missing]]] = True
    return flat.view(mask_shape(weight_shape, block))


def as_blocks(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """``[R, C, kH, kW, b_out, b_in]`` view or copy of a dense weight, padded with zeros to whole blocks."""
    rows, cols, _ = grid(weight.shape, block)
    space = weight.shape[2:]
    pad = [0, 0] * len(space) + [0, cols * block[1] - weight.shape[1], 0, rows * block[0] - weight.shape[0]]
    padded = torch.nn.functional.pad(weight, pad) if any(pad) else weight
    tiled = padded.reshape(rows, block[0], cols, block[1], *space)
    return tiled.permute(0, 2, *range(4, 4 + len(space)), 1, 3)


def from_blocks(blocks: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """The dense weight of ``[R, C, kH, kW, b_out, b_in]``: the inverse of :func:`as_blocks`, without the padding."""
    rows, cols, *space, height, width = blocks.shape
    inner = 2 + len(space)
    tiled = blocks.permute(0, inner, 1, inner + 1, *range(2, inner))
    return tiled.reshape(rows * height, cols * width, *space)[: weight_shape[0], : weight_shape[1]]


def pack(weight: Tensor, mask: Tensor, block: tuple[int, int]) -> Tensor:
    """``values[id] = W[block id]``: the active blocks of a dense weight, ``[nnz, b_out, b_in]``. Differentiable.

    >>> pack(torch.arange(4.0).view(2, 2), torch.tensor([[True, True]]), (2, 1)).tolist()
    [[[0.0], [2.0]], [[1.0], [3.0]]]
    """
    shape = check_weight_shape("weight's shape", tuple(check_tensor("weight", weight).shape))
    block = check_block(block)
    check_mask(mask, mask_shape(shape, block), f"mask (of a weight {shape} in blocks {block})")
    return as_blocks(weight, block)[mask]


def unpack(values: Tensor, mask: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """``W[block id] = values[id]``, zero elsewhere: the dense weight of packed values. Differentiable.

    >>> unpack(torch.ones(1, 2, 1), torch.tensor([[False, True]]), (2, 2)).tolist()
    [[0.0, 1.0], [0.0, 1.0]]
    """
    block = (check_tensor("values", values, 3).shape[1], values.shape[2])
    weight_shape = check_weight_shape("weight_shape", weight_shape)
    check_mask(
        mask, mask_shape(weight_shape, block), f"mask (of a weight_shape {weight_shape}, values in blocks {block})"
    )
    if values.shape[0] != int(mask.sum()):  # one block would be broadcast
        raise ValueError(f"values must hold one block for each of the mask's {int(mask.sum())}, got {values.shape[0]}")
    return from_blocks(values.new_zeros(*mask.shape, *block).index_put((mask,), values), weight_shape)


def inside(mask: Tensor, weight_shape: Sequence[int], block: tuple[int, int]) -> Tensor:
    """bool ``[nnz, b_out, b_in]``: which stored entries lie inside the weight."""
    where = mask.nonzero()
    row = where[:, 0:1] * block[0] + torch.arange(block[0], device=mask.device)
    col = where[:, 1:2] * block[1] + torch.arange(block[1], device=mask.device)
    return (row < weight_shape[0])[:, :, None] & (col < weight_shape[1])[:, None, :]


@dataclass(frozen=True)
class MaskChange:
    """What a new block mask does to everything stored per active block.

    Attributes:
        old_mask, new_mask: bool block masks.
        source: int64 ``[nnz_new]``, the old id of each new block, or -1 where the block is grown.

    >>> change = MaskChange.between(torch.tensor([[True, True]]), torch.tensor([[False, True]]))
    >>> change.source.tolist(), change.apply(torch.tensor([5.0, 7.0])).tolist()
    ([1], [7.0])
    """

    old_mask: Tensor
    new_mask: Tensor
    source: Tensor

    @staticmethod
    def between(old_mask: Tensor, new_mask: Tensor) -> MaskChange:
        ids = old_mask.reshape(-1).cumsum(0) - 1
        old = old_mask.reshape(-1)
        source = torch.where(old, ids, -1)[new_mask.reshape(-1)]
        return MaskChange(old_mask.clone(), new_mask.clone(), source)

    @property
    def grown(self) -> Tensor:
        """bool ``[nnz_new]``: blocks that were not active before."""
        return self.source < 0

    def apply(self, stored: Tensor) -> Tensor:
        """Carries ``[nnz_old, …]`` over to ``[nnz_new, …]``: kept blocks keep their entries, grown ones are zero."""
        nnz_old = int(self.old_mask.sum())
        if stored.shape[:1] != (nnz_old,):
            raise ValueError(f"stored must have {nnz_old} blocks in its first dimension, got {tuple(stored.shape)}")
        carried = stored.new_zeros(self.source.numel(), *stored.shape[1:])
        kept = ~self.grown
        carried[kept] = stored[self.source[kept]]
        return carried
