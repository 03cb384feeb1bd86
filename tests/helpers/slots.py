"""Blocks scattered over slots, as after many exchanges; what lies in free slots must not matter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from helpers.dense import active_blocks, row_major, topology_of

NAN = float("nan")


class Slots(NamedTuple):
    """A random arrangement of a mask's blocks.

    Attributes:
        of_block: int64 ``[nnz]``, the slot of each block, counted as `active_blocks` does.
        count: number of slots.
        topology: the vector that says so.
    """

    of_block: Tensor
    count: int
    topology: Tensor

    def spread(self, packed: Tensor, fill: float = NAN) -> Tensor:
        """``[count, …]`` of ``[nnz, …]``: everything in its slot, and ``fill`` in the free ones."""
        slots = packed.new_full((self.count, *packed.shape[1:]), fill)
        slots[self.of_block] = packed
        return slots

    def check_free(self, gradient: Tensor) -> None:
        """That the free slots of a gradient are zero."""
        free = torch.ones(self.count, dtype=torch.bool)
        free[self.of_block] = False
        assert gradient.shape[0] == self.count
        assert bool((gradient[free] == 0).all()), "free slots have no gradient"


def scatter(mask: Tensor, free: int = 3, seed: int = 0) -> Slots:
    """The mask's blocks in random slots, of which ``free`` hold none."""
    nnz = len(active_blocks(mask))
    order = torch.randperm(nnz + free, generator=torch.Generator().manual_seed(seed))
    blocks = torch.full((nnz + free,), -1, dtype=torch.int32)
    blocks[order[:nnz]] = row_major(mask)
    return Slots(order[:nnz], nnz + free, topology_of(blocks, mask.shape))
