"""Shuffled batches of indices without end, resumable in the middle of an epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Sampler:
    """indices(t) = the next `batch` entries of permutation, permutation, ...: every image once per epoch.

    A batch may reach over the end of an epoch, so batches are always full, also when the set is smaller than one batch.

    Args:
        size: number of images.
        batch: indices per call.
        seed: of the sampler's own generator; no other random numbers are used or moved.

    Raises:
        ValueError: `size` or `batch` below 1.

    Example:
        >>> sampler = Sampler(size=4, batch=2, seed=0)
        >>> sorted(torch.cat([sampler.next(), sampler.next()]).tolist())
        [0, 1, 2, 3]
    """

    def __init__(self, size: int, batch: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.size, self.batch = size, batch
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(size, generator=self._generator)
        self._used = 0

    def next(self) -> Tensor:
        """The next `batch` indices, int64."""
        taken: list[Tensor] = []
        missing = self.batch
        while missing > 0:
            if self._used == self.size:
                self._order = torch.randperm(self.size, generator=self._generator)
                self._used = 0
            part = self._order[self._used : self._used + missing]
            taken.append(part)
            self._used += part.numel()
            missing -= part.numel()
        return torch.cat(taken)

    def state_dict(self) -> dict[str, Any]:
        """Position, current permutation and generator state."""
        return {"generator": self._generator.get_state(), "order": self._order.clone(), "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            ValueError: the state is of a set of another size.
        """
        if state["order"].numel() != self.size:
            raise ValueError(f"sampler state is for {state['order'].numel()} images, this set has {self.size}")
        self._generator.set_state(state["generator"])
        self._order = state["order"].clone()
        self._used = int(state["used"])
