"""Which blocks leave and which enter: pure functions on tensors, one 1-D tensor per layer that is ranked together.

A ranking *group* is a list of layers: one layer for per-layer ranking, all of them for global ranking. All functions
are deterministic: equal keys are ranked by the layer's place in the list, then by the block's place in its tensor.
Ranking runs in float64 on the CPU, so that the choice does not depend on the device's sorting.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddst._arguments import check_number, check_tensor, check_tensors


def relative_keys(norms: Tensor, sizes: Tensor, active: Tensor | None = None) -> Tensor:
    """``key_b = rms_b / rms_layer``, ``rms_b = ‖block b‖ / √size_b``, ``rms_layer`` over the layer's active blocks.

    Makes blocks of different layers comparable. Raw norms are not, for blocks larger than 1×1: the spread of block
    RMS within a layer is a few per cent at initialisation, so a global ranking of raw norms ranks layers and empties
    the ones with the largest fan-in.

    Args:
        norms: ``[n]`` L2 norms of a layer's blocks (weights or gradient scores).
        sizes: ``[n]`` number of weights in each block.
        active: bool ``[n]``, the blocks ``rms_layer`` is taken over; all when None.

    Returns:
        float64 ``[n]`` on the CPU. A layer whose active blocks are all zero is divided by 1.

    >>> relative_keys(torch.tensor([3.0, 4.0]), torch.tensor([1, 1])).tolist()
    [0.848528137423857, 1.131370849898476]
    """
    check_tensor("norms", norms)
    for name, tensor in (("sizes", sizes), ("active", norms if active is None else active)):
        if check_tensor(name, tensor).shape != norms.shape:
            raise ValueError(f"{name} must have norms' shape {tuple(norms.shape)}, got {tuple(tensor.shape)}")
    wide, size = _finite(norms, 0.0), sizes.detach().to("cpu", torch.float64)
    # Scaled by the largest norm first: squares of huge or tiny norms would leave float64's range.
    top = float(wide.max()) if wide.numel() else 0.0
    if top == 0:
        return wide
    rms = (wide / top) / size.sqrt()
    among = torch.ones_like(rms, dtype=torch.bool) if active is None else active.cpu()
    scale = float(((rms.square() * size)[among].sum() / size[among].sum().clamp(min=1)).sqrt())
    return rms / scale if scale > 0 else rms


def check_share(name: str, value: float | None) -> None:
    """Raises unless it is a share from 0 to 1, or None for none."""
    if value is not None:
        check_number(name, value, 0, 1, note="(a share) or None")


def choose_drop(
    norms: Sequence[Tensor],
    amount: float,
    *,
    keys: Sequence[Tensor] | None = None,
    sizes: Sequence[Tensor] | None = None,
    max_norm_share: float | None = None,
    stay: Sequence[Tensor] | None = None,
    lines: Sequence[Sequence[Tensor]] = (),
    to_the_last: bool = False,
) -> list[Tensor]:
    """The active blocks with the smallest keys, ``Σ size ≈ amount``, always leaving each layer and line one.

    Args:
        norms: per layer ``[nnz]``, L2 norms of its active blocks. Norms that are not finite count as 0 (leave first).
        amount: how much to drop, in units of ``sizes`` (blocks when ``sizes`` is None). The ranking's prefix whose
            total comes nearest is taken; of two equally near ones the shorter.
        keys: per layer ``[nnz]``, what is ranked; ``norms`` when None (the paper's), see
            :func:`ddst.sparsity.relative_keys`.
        sizes: per layer ``[nnz]``, the weights in each block.
        max_norm_share: cap on the dropped share of the group's squared norm: blocks that would pass it stay, so
            that fewer than ``amount``, perhaps none, may be dropped.
        stay: per layer bool ``[nnz]``, blocks that are not dropped whatever their keys; none when None.
        lines: of each kind (rows, columns) per layer integers ``[nnz]``, the line that each block is in.
        to_the_last: what a layer and a line keep. False: the largest block of those that do not stay anyway. True:
            in ascending order of the keys, a block is passed over only if it is the last one there.

    Returns:
        Per layer bool ``[nnz]``, True where the block is dropped.

    Raises:
        ValueError: ``max_norm_share`` outside 0 … 1, a negative amount.

    >>> [d.tolist() for d in choose_drop([torch.tensor([3.0, 1.0]), torch.tensor([0.5])], 3)]
    [[False, True], [False]]
    """
    check_share("max_norm_share", max_norm_share)
    norms = check_tensors("norms", norms)
    keys = None if keys is None else check_tensors("keys", keys, norms)
    sizes = None if sizes is None else check_tensors("sizes", sizes, norms)
    stay = None if stay is None else check_tensors("stay", stay, norms)
    if isinstance(lines, Tensor | str) or not isinstance(lines, Sequence):
        raise TypeError(f"lines must be a sequence of sequences of tensors, got {type(lines).__name__}")
    kinds = [check_tensors(f"lines[{i}]", kind, norms) for i, kind in enumerate(lines)]
    finite = [_finite(n, 0.0) for n in norms]
    ranked = [_finite(k, 0.0) for k in keys] if keys is not None else finite
    free = []
    for i, key in enumerate(ranked):
        staying = torch.zeros_like(key, dtype=torch.bool) if stay is None else stay[i].cpu()
        layer = torch.zeros(key.shape, dtype=torch.long)
        free.append(_free(key, staying, [layer, *(kind[i].cpu().long() for kind in kinds)], to_the_last))
    cost = None
    if max_norm_share is not None:
        top = max((float(n.max()) for n in finite if n.numel()), default=0.0) or 1.0
        squares = [(n / top).square() for n in finite]
        total = sum(float(s.sum()) for s in squares)
        cost = (squares, max_norm_share * total * (1 + 1e-12))
    return _smallest(ranked, amount, sizes, free, cost)


def choose_grow(scores: Sequence[Tensor], amount: float, *, sizes: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The candidates with the largest scores, ``Σ size ≈ amount``.

    Args:
        scores: per layer ``[n]``, the scores of the blocks that may be grown. Scores that are not finite rank last.
        amount: how much to grow, in units of ``sizes`` (blocks when None), as in :func:`choose_drop`.
        sizes: per layer ``[n]``, the weights in each block.

    Returns:
        Per layer bool ``[n]``, True where the block is grown. All of them when there are fewer than ``amount``.

    >>> [g.tolist() for g in choose_grow([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], 2)]
    [[True, False], [True]]
    """
    scores = check_tensors("scores", scores)
    sizes = None if sizes is None else check_tensors("sizes", sizes, scores)
    keys = [-_finite(s, -float("inf")) for s in scores]
    return _smallest(keys, amount, sizes, [torch.ones_like(k, dtype=torch.bool) for k in keys], None)


def random_scores(counts: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """Scores that make :func:`choose_grow` draw uniformly without replacement, from a CPU generator.

    >>> [s.shape[0] for s in random_scores([2, 3], torch.Generator().manual_seed(0))]
    [2, 3]
    """
    return [torch.rand(n, generator=generator, dtype=torch.float64) for n in counts]


def exchange_count(active: int, fraction: float) -> int:
    """``⌊ζ · nnz⌋``, at most ``nnz − 1``: blocks of a layer to exchange.

    >>> exchange_count(100, 0.29), exchange_count(1, 1.0)
    (29, 0)
    """
    # 0.29 * 100 is 28.999999999999996: the margin gives the count that was meant.
    return max(0, min(int(fraction * active + 1e-9), active - 1))


def _free(key: Tensor, staying: Tensor, lines: Sequence[Tensor], to_the_last: bool) -> Tensor:
    """Blocks that may leave, smallest first, so that no line of any kind is left without a block."""
    largest = torch.stack([_largest_of_each(line, key, staying) for line in lines])
    if not to_the_last:
        return ~(staying | largest.any(0))
    free = ~staying
    # Only a line's largest block can be its last one: the rest leaves while that is there. So these alone are walked.
    walk = largest.any(0).nonzero()[:, 0]
    walk = walk[torch.sort(key[walk], stable=True).indices]
    keeps = [set(line[staying].tolist()) for line in lines]  # the lines that keep a block
    places = zip(*(line[walk].tolist() for line in lines), strict=True)
    for block, of, last in zip(walk.tolist(), places, largest[:, walk].T.tolist(), strict=True):
        if any(is_last and line not in kept for is_last, line, kept in zip(last, of, keeps, strict=True)):
            free[block] = False
            for kept, line in zip(keeps, of, strict=True):
                kept.add(line)
    return free


def _largest_of_each(line: Tensor, key: Tensor, besides: Tensor) -> Tensor:
    """Per number in ``line`` its block of the largest key, leaving some out: the one that a stable ascending ranking
    would drop last.
    """
    count, key = int(line.max()) + 1 if line.numel() else 0, key.masked_fill(besides, -torch.inf)
    largest = key.new_full((count,), -torch.inf).scatter_reduce(0, line, key, "amax")
    place = torch.where(key == largest[line], torch.arange(key.numel()), -1)
    last = place.new_full((count,), -1).scatter_reduce(0, line, place, "amax")
    return (place == last[line]) & ~besides


def _finite(tensor: Tensor, otherwise: float) -> Tensor:
    wide = tensor.detach().to("cpu", torch.float64)
    return torch.where(wide.isfinite(), wide, otherwise)


def _smallest(
    keys: Sequence[Tensor],
    amount: float,
    sizes: Sequence[Tensor] | None,
    free: Sequence[Tensor],
    cost: tuple[Sequence[Tensor], float] | None,
) -> list[Tensor]:
    """Takes candidates in ascending order of their key up to an amount and, if given, a budget of cost."""
    amount = check_number("amount", amount, 0)
    lengths = [k.numel() for k in keys]
    chosen = torch.zeros(sum(lengths), dtype=torch.bool)
    if chosen.numel():
        candidates = torch.cat(list(free)).nonzero()[:, 0]
        order = candidates[torch.sort(torch.cat(list(keys))[candidates], stable=True).indices]
        size = torch.ones(sum(lengths)) if sizes is None else torch.cat([s.detach().cpu() for s in sizes])
        reached = size[order].to(torch.float64).cumsum(0)
        take = int((reached <= amount).sum())
        before = float(reached[take - 1]) if take else 0.0
        if take < reached.numel() and float(reached[take]) - amount < amount - before:
            take += 1
        if cost is not None:
            spent = torch.cat(list(cost[0]))[order].cumsum(0)
            take = min(take, int((spent <= cost[1]).sum()))
        chosen[order[:take]] = True
    return list(chosen.split(lengths))
