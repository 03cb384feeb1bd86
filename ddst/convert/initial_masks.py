"""The block masks that sparse training starts from: random or by magnitude, with the density met exactly."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import topology as tp
from ..ops.reference import block_norms_of

KINDS = ("random", "magnitude")


@dataclass
class _Draft:
    """A layer's mask while it is being adjusted."""

    mask: Tensor
    sizes: Tensor
    rank: Tensor
    wanted: float

    @property
    def weights(self) -> float:
        """What the active weights count: those inside the weight, of edge blocks fewer than of others."""
        return float(self.sizes[self.mask].sum(dtype=torch.float64))

    def best_flip(self, grow: bool, below: float) -> int | None:
        """Flat index of the block to add (or to take away) that holds fewer weights than ``below``, or None.

        Taken away is the lowest rank, added the highest. A block that is the last of its row or column goes only if
        there is no other, the last block of a layer never.
        """
        able = (self.mask != grow) & (self.sizes < below) & (self.sizes > 0)
        if not grow:
            if int(self.mask.sum()) < 2:
                return None
            pairs = self.mask.flatten(2).sum(2) if self.mask.dim() > 2 else self.mask.long()
            spare = (pairs.sum(1)[:, None] > 1) & (pairs.sum(0)[None, :] > 1)
            spare = spare.reshape(*spare.shape, *[1] * (self.mask.dim() - 2)) & able
            able = spare if bool(spare.any()) else able
        if not bool(able.any()):
            return None
        worst = -torch.inf if grow else torch.inf
        ranks = torch.where(able, self.rank, worst).flatten()
        return int(ranks.argmax() if grow else ranks.argmin())


def initial_masks(
    weights: Mapping[str, Tensor],
    counts: Mapping[str, int],
    densities: Mapping[str, float] | None,
    block: tuple[int, int],
    kind: str = "random",
    generator: torch.Generator | None = None,
    *,
    transposed: Collection[str] = (),
    groups: Mapping[str, int] | None = None,
    cost: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """``|Σ active − Σ density · size| ≤ b_out · b_in / 2``: a mask per layer with ``counts[name]`` active blocks.

    With channel counts that are multiples of the block all blocks weigh the same and the counts are exact. Edge blocks
    weigh less, so the same number of blocks may hold more or fewer weights: blocks are then added or taken away, in the
    layers furthest from their own share, until the sum is met.

    Args:
        weights: dense weight per layer.
        counts, densities: blocks and density per layer; without densities there are as many blocks as counted.
        block: ``(b_out, b_in)``.
        kind: "random" (every block row and column gets a block where the count allows) or "magnitude" (the blocks of
            largest L2 norm).
        generator: of the random choices, on the CPU; torch's default generator by default.
        transposed: names of weights with the input channels first, whose blocks are ``(b_in, b_out)``.
        groups: of grouped convolutions, by name.
        cost: what a weight of each layer counts in both sums, 1 by default; the limit is then half a block of the
            layer where it costs most. Layers that cost nothing keep their counts.

    Returns:
        bool masks on the CPU, of the shape of :func:`ddst.topology.mask_shape`.

    >>> weights = {"a": torch.randn(24, 32), "b": torch.randn(40, 16, 3, 3)}
    >>> masks = initial_masks(weights, {"a": 2, "b": 5}, {"a": 0.5, "b": 0.2}, (16, 16))
    >>> {name: tuple(mask.shape) for name, mask in masks.items()}
    {'a': (2, 2), 'b': (3, 1, 3, 3)}
    """
    drafts: dict[str, _Draft] = {}
    for name, weight in weights.items():
        shape, each = tuple(weight.shape), 1.0 if cost is None else cost[name]
        own = (block[1], block[0]) if name in transposed else block
        sizes = tp.mask_sizes(shape, own).double() * each
        if kind == "magnitude":
            rank = block_norms_of(weight.detach().cpu().double(), own)
            mask = torch.zeros(rank.numel(), dtype=torch.bool)
            mask[rank.flatten().topk(counts[name]).indices] = True
            mask = mask.view(rank.shape)
        else:
            mask = tp.random_mask(shape, own, counts[name], generator, (groups or {}).get(name, 1))
            rank = torch.rand(mask.shape, generator=generator, dtype=torch.float64)
        drafts[name] = _Draft(mask, sizes, rank, 0.0 if densities is None else densities[name] * weight.numel() * each)
    if densities is not None:
        dearest = max((1.0 if cost is None else cost[name] for name in weights), default=1.0)
        _settle(list(drafts.values()), dearest * block[0] * block[1])
    return {name: draft.mask for name, draft in drafts.items()}


def _settle(drafts: list[_Draft], largest: float) -> None:
    """Flips blocks until the active weights of all layers together are within half a block of what is wanted."""
    surplus = {id(draft): draft.weights - draft.wanted for draft in drafts}
    error = sum(surplus.values())
    while abs(error) > largest / 2:
        grow = error < 0
        for draft in sorted(drafts, key=lambda d: surplus[id(d)], reverse=not grow):
            # Smaller than twice the error, so that every flip brings the sum nearer.
            flip = draft.best_flip(grow, below=2 * abs(error))
            if flip is not None:
                break
        else:
            return
        draft.mask.view(-1)[flip] = grow
        change = float(draft.sizes.flatten()[flip]) * (1 if grow else -1)
        surplus[id(draft)] += change
        error += change
