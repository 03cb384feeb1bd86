"""The packed block-sparse format: which blocks of a weight are active, and in which order they are stored.

A weight ``[C_out, C_in, kH, kW]`` is cut into blocks of ``b_out × b_in`` channels *at one tap* ``(kh, kw)``. With
``R = ceil(C_out / b_out)``, ``C = ceil(C_in / b_in)`` and ``T = kH · kW`` there are ``R · C · T`` blocks, and

* ``block_mask`` (bool, ``[R, C, kH, kW]``; a linear weight has the mask ``[R, C]``, that of a 1-D convolution
  ``[R, C, k]``) says which are active;
* ``values[slot, i, j] = W[row · b_out + i, col · b_in + j, kh, kw]``, shape ``[slots, b_out, b_in]``: an active block
  lies in one *slot* for as long as it is active, and a slot without a block is *free*: zero, and read by nothing. The
  part of an edge block that lies outside the weight is stored too, and is always exactly zero;
* ``slot_blocks`` (int32, ``[slots]``) says which block lies in which slot: its rank ``(row · C + col) · T + tap`` among
  all blocks, with ``tap = kh · kW + kw``, or -1 for a free slot. A mask alone stands for the *row-major* slots: no free
  one, and its active blocks by rising rank;
* ``topology`` is one int32 vector derived from it, which the kernels walk: the concatenation of

      row_ptr [R + 1] | col_ptr [C + 1] | block_row [slots] | block_col [slots] | block_tap [slots]
      | row_order [slots] | col_order [slots]

  ``row_order[row_ptr[r] … row_ptr[r + 1] - 1]`` are the slots in output block row ``r``, sorted by input block, then
  tap; ``col_order[col_ptr[c] … col_ptr[c + 1] - 1]`` are those in input block ``c``, sorted by output row, then tap:
  the transposed order, which refers to the same values. Behind the ``nnz = row_ptr[R] = col_ptr[C]`` active slots both
  orders name the free ones, for which ``(block_row, block_col, block_tap)`` is ``(R, C, 0)``. The vector's length
  depends on the number of slots alone, so that it can be rewritten in place.

``csrc/topology.hpp`` reads the same vector; nothing else knows its layout.

A weight here is any weight, its rows what its first dimension counts: a transposed convolution's is
``[C_in, C_out, kH, kW]``, and its blocks are ``b_in × b_out``. A grouped one, ``[C_out, C_in / groups, kH, kW]``, has
blocks within the groups only; kernels are given the block-diagonal weight ``[C_out, C_in, kH, kW]`` that it stands for
(:mod:`ddst.operator_view`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _host
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
    row_order: Tensor
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
    """The topology vector of a block mask with row-major slots (see the module's docstring), on the mask's device.

    Args:
        mask: bool, ``[R, C]`` or ``[R, C, kH, kW]``.

    Cost: one sort of ``nnz`` keys. On CUDA one host synchronisation (the number of blocks).

    >>> build_topology(torch.tensor([[True, False], [True, True]])).tolist()
    [0, 1, 3, 0, 2, 3, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 2, 0, 1, 2]
    """
    return topology_of_slots(row_major_slots(mask), mask.shape)


def row_major_slots(mask: Tensor) -> Tensor:
    """``slot_blocks`` of a mask's active blocks by rising rank, without a free slot: int32 ``[nnz]``.

    >>> row_major_slots(torch.tensor([[True, False], [True, True]])).tolist()
    [0, 2, 3]
    """
    check_mask(mask)
    if mask.is_meta:
        raise ValueError("mask must have entries, got one on the meta device")
    return mask.reshape(-1).nonzero()[:, 0].to(torch.int32)


def mask_of_slots(slot_blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """The block mask of the shape ``[R, C]`` or ``[R, C, kH, kW]`` whose active blocks have slots.

    >>> mask_of_slots(torch.tensor([3, -1, 0], dtype=torch.int32), (2, 2)).tolist()
    [[True, False], [False, True]]
    """
    shape = _check_shape(shape)
    check_slots(slot_blocks, math.prod(shape))
    # One place more, for the free slots.
    flat = torch.zeros(math.prod(shape) + 1, dtype=torch.bool, device=slot_blocks.device)
    flat[slot_blocks.long()] = True
    return flat[:-1].view(*shape)


def topology_of_slots(slot_blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """The topology vector of slots, int32, on their device. Sizes follow from arguments: nothing waits for a device.

    Args:
        slot_blocks: int32 ``[slots]``; each block at most once, -1 for a free slot.
        shape: of the block mask.

    Raises:
        ValueError: a block in two slots, or none of the mask's; on the CPU only, as another device would have to wait.

    Cost: two sorts of ``slots`` keys.

    >>> topology_of_slots(torch.tensor([3, -1, 0], dtype=torch.int32), (2, 2)).tolist()
    [0, 1, 2, 0, 1, 2, 1, 2, 0, 1, 2, 0, 0, 0, 0, 2, 0, 1, 2, 0, 1]
    """
    rows, cols, *space = _check_shape(shape, 2)
    taps = math.prod(space)
    check_slots(slot_blocks)
    if type(slot_blocks) is Tensor and slot_blocks.device.type == "cpu":  # several times faster than by operators
        return torch.from_numpy(_host.topology_of_slots(slot_blocks.numpy(), rows, cols, taps))
    return _topology_by_operators(slot_blocks, rows, cols, taps)


def _topology_by_operators(slot_blocks: Tensor, rows: int, cols: int, taps: int) -> Tensor:
    """:func:`topology_of_slots` on any device."""
    total = rows * cols * taps
    key = slot_blocks.long()
    key = torch.where(key < 0, total, key)  # free slots come last in both orders
    row = key // (cols * taps)
    free = row == rows
    col = torch.where(free, cols, key // taps % cols)
    tap = torch.where(free, 0, key % taps)
    row_order = torch.argsort(key, stable=True)
    # Stable: within a column the row-major order stays, which is by output row, then tap.
    col_order = row_order[torch.argsort(col[row_order], stable=True)]
    row_ptr = _starts(row[row_order], rows)
    col_ptr = _starts(col[col_order], cols)
    return torch.cat([row_ptr, col_ptr, row, col, tap, row_order, col_order]).to(torch.int32)


def _starts(sorted_keys: Tensor, count: int) -> Tensor:
    """``[count + 1]``: position of the first key that is at least 0, 1, … ``count``."""
    bounds = torch.arange(count + 1, dtype=sorted_keys.dtype, device=sorted_keys.device)
    return torch.searchsorted(sorted_keys, bounds)


def slot_count(topology: Tensor, rows: int, cols: int) -> int:
    """Number of slots, free ones included, of a topology vector over ``rows`` × ``cols`` blocks.

    >>> slot_count(build_topology(torch.eye(2, dtype=torch.bool)), 2, 2)
    2
    """
    return (topology.shape[0] - rows - cols - 2) // 5


def split_topology(topology: Tensor, rows: int, cols: int) -> Index:
    """The sections of a topology vector as views.

    >>> split_topology(build_topology(torch.eye(2, dtype=torch.bool)), 2, 2).block_col.tolist()
    [0, 1]
    """
    slots = slot_count(topology, rows, cols)
    return Index(*topology.split([rows + 1, cols + 1, slots, slots, slots, slots, slots]))


def check_mask(mask: Tensor, shape: Sequence[int] | None = None, name: str = "block_mask") -> None:
    """Raises TypeError or ValueError unless ``mask`` is a bool tensor of a block mask's shape."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, got {got}")
    if shape is not None and tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(mask.shape)}")
    if mask.dim() not in (2, 3, 4):
        raise ValueError(f"{name} must have the shape [R, C], [R, C, k] or [R, C, kH, kW], got {tuple(mask.shape)}")
    if mask.numel() >= 2**31:
        raise ValueError(f"{name} has {mask.numel()} blocks, more than int32 can index: use larger blocks")


def check_slots(slot_blocks: Tensor, blocks: int | None = None, name: str = "slot_blocks") -> None:
    """Raises TypeError or ValueError unless ``slot_blocks`` has a map's dtype and shape.

    Args:
        blocks: number of blocks that there are; the ranks are compared with it where nothing has to wait for them.
    """
    dtype = check_tensor(name, slot_blocks).dtype
    if dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 tensor, got {dtype}")
    if slot_blocks.dim() != 1:
        raise ValueError(f"{name} must have the shape [slots], got {tuple(slot_blocks.shape)}")
    known = type(slot_blocks) is Tensor and slot_blocks.device.type == "cpu" and not torch.compiler.is_compiling()
    if blocks is not None and known and slot_blocks.numel():
        least, most = (int(end) for end in slot_blocks.aminmax())
        if least < -1 or most >= blocks:
            raise ValueError(f"{name} must hold ranks of the weight's {blocks} blocks, or -1, got {least} to {most}")


def _check_shape(shape: Sequence[int], least: int = 1) -> tuple[int, ...]:
    """The shape of a block mask, or (``least`` is 1) of one that was flattened."""
    if not isinstance(shape, tuple | list):
        raise TypeError(f"shape must be a tuple of ints, got {type(shape).__name__}")
    sizes = tuple(shape)
    if not least <= len(sizes) <= 4:
        raise ValueError(f"shape must be [R, C], [R, C, k] or [R, C, kH, kW], got {sizes}")
    return tuple(check_int("shape", size, 0) for size in sizes)


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


def check_groups(weight_shape: Sequence[int], block: tuple[int, int], groups: int) -> None:
    """Raises ValueError unless the channels of a group are whole blocks; a single group may end in part of one.

    >>> check_groups((32, 8, 3, 3), (8, 8), 4)
    """
    sides = (weight_shape[0] // groups, weight_shape[1])
    if groups > 1 and (sides[0] % block[0] or sides[1] % block[1]):
        raise ValueError(
            f"block must divide the channels of a group, {sides[0]} along the weight's first dimension and {sides[1]} "
            f"along its second with groups={groups}, got {block[0]}x{block[1]}"
        )


def random_mask(
    weight_shape: Sequence[int],
    block: tuple[int, int],
    nnz: int,
    generator: torch.Generator | None = None,
    groups: int = 1,
) -> Tensor:
    """A random mask of ``nnz`` active blocks that leaves no block row and no block column empty where ``nnz`` allows.

    The first ``min(nnz, max(R, C))`` blocks pair a shuffled list of output block rows with a shuffled list of input
    blocks at random taps; the rest is drawn without replacement from what is left. With several groups, which divide
    the rows, that holds for the rows and columns of each.

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
    nnz, groups = check_int("nnz", nnz, 0, total), check_int("groups", groups, 1)
    if rows % groups:
        raise ValueError(f"groups must divide the {rows} block rows, got {groups}")
    height = rows // groups
    cover = min(nnz, max(height, cols) * groups)

    def cycle(count: int, wanted: int) -> Tensor:
        repeats = -(-wanted // count) if wanted else 0
        shuffles = [torch.randperm(count, generator=generator, device="cpu") for _ in range(repeats)]
        return torch.cat(shuffles)[:wanted] if shuffles else torch.zeros(0, dtype=torch.int64, device="cpu")

    # Named, because "with torch.device(...)" changes where tensors are made by default.
    flat = torch.zeros(total, dtype=torch.bool, device="cpu")
    tap = torch.randint(taps, (cover,), generator=generator, device="cpu")
    pair = torch.empty(0, dtype=torch.int64, device="cpu")
    for group in range(groups):
        share = cover // groups + (group < cover % groups)
        pair = torch.cat([pair, (group * height + cycle(height, share)) * cols + cycle(cols, share)])
    flat[pair * taps + tap] = True
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


def pack_slots(weight: Tensor, slot_blocks: Tensor, block: tuple[int, int]) -> Tensor:
    """``values[slot] = W[block in slot]``, zero in free slots: ``[slots, b_out, b_in]``. Differentiable.

    >>> pack_slots(torch.eye(2), torch.tensor([3, -1], dtype=torch.int32), (1, 1)).flatten().tolist()
    [1.0, 0.0]
    """
    check_weight_shape("weight's shape", tuple(check_tensor("weight", weight).shape))
    block = check_block(block)
    blocks = as_blocks(weight, block).reshape(-1, *block)
    check_slots(slot_blocks, blocks.shape[0])
    rank = slot_blocks.to(weight.device).long()
    return torch.where((rank >= 0)[:, None, None], blocks[rank.clamp(min=0)], 0)


def unpack_slots(values: Tensor, slot_blocks: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """``W[block in slot] = values[slot]``, zero elsewhere: the dense weight. Differentiable; free slots are not read.

    >>> unpack_slots(torch.ones(2, 1, 1), torch.tensor([3, -1], dtype=torch.int32), (2, 2)).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    block = (check_tensor("values", values, 3).shape[1], values.shape[2])
    weight_shape = check_weight_shape("weight_shape", weight_shape)
    shape = mask_shape(weight_shape, check_block(block, "block (the last two sizes of values)"))
    total = math.prod(shape)
    check_slots(slot_blocks, total)
    if values.shape[:1] != slot_blocks.shape:
        raise ValueError(
            f"values must hold one block for each of {slot_blocks.numel()} slots (of slot_blocks, or of the mask's "
            f"active blocks), got {values.shape[0]}"
        )
    rank = slot_blocks.to(values.device).long()
    # One place more, for the free slots.
    blocks = values.new_zeros(total + 1, *block).index_put((torch.where(rank < 0, total, rank),), values)[:-1]
    return from_blocks(blocks.view(*shape, *block), weight_shape)


def pack(weight: Tensor, mask: Tensor, block: tuple[int, int]) -> Tensor:
    """:func:`pack_slots` with a mask's row-major slots: the active blocks of a dense weight, ``[nnz, b_out, b_in]``.

    >>> pack(torch.arange(4.0).view(2, 2), torch.tensor([[True, True]]), (2, 1)).tolist()
    [[[0.0], [2.0]], [[1.0], [3.0]]]
    """
    shape = check_weight_shape("weight's shape", tuple(check_tensor("weight", weight).shape))
    block = check_block(block)
    check_mask(mask, mask_shape(shape, block), f"mask (of a weight {shape} in blocks {block})")
    return pack_slots(weight, row_major_slots(mask), block)


def unpack(values: Tensor, mask: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """:func:`unpack_slots` with the row-major slots of a mask: the dense weight of its packed active blocks.

    >>> unpack(torch.ones(1, 2, 1), torch.tensor([[False, True]]), (2, 2)).tolist()
    [[0.0, 1.0], [0.0, 1.0]]
    """
    block = (check_tensor("values", values, 3).shape[1], values.shape[2])
    weight_shape = check_weight_shape("weight_shape", weight_shape)
    check_mask(
        mask, mask_shape(weight_shape, block), f"mask (of a weight_shape {weight_shape}, values in blocks {block})"
    )
    return unpack_slots(values, row_major_slots(mask), weight_shape)


def inside_slots(slot_blocks: Tensor, weight_shape: Sequence[int], block: tuple[int, int]) -> Tensor:
    """bool ``[slots, b_out, b_in]``: which stored entries belong to an active block and lie inside the weight.

    >>> inside_slots(torch.tensor([1, -1], dtype=torch.int32), (2, 3), (2, 2)).flatten(1).tolist()
    [[True, False, True, False], [False, False, False, False]]
    """
    weight_shape, block = check_weight_shape("weight_shape", weight_shape), check_block(block)
    rows, cols, taps = grid(weight_shape, block)
    check_slots(slot_blocks, rows * cols * taps)
    rank = slot_blocks.long()
    row = (rank // (cols * taps))[:, None] * block[0] + torch.arange(block[0], device=rank.device)
    col = (rank // taps % cols)[:, None] * block[1] + torch.arange(block[1], device=rank.device)
    return (rank >= 0)[:, None, None] & (row < weight_shape[0])[:, :, None] & (col < weight_shape[1])[:, None, :]


def inside(mask: Tensor, weight_shape: Sequence[int], block: tuple[int, int]) -> Tensor:
    """:func:`inside_slots` with the row-major slots of a mask: bool ``[nnz, b_out, b_in]``."""
    shape, block = check_weight_shape("weight_shape", weight_shape), check_block(block)
    check_mask(mask, mask_shape(shape, block), f"mask (of a weight_shape {shape} in blocks {block})")
    return inside_slots(row_major_slots(mask), shape, block)
