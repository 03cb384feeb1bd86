"""How the density asked for is shared out over the candidates of a conversion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .candidates import Candidate
from .distribution import check_density, erk_densities, smallest_density, uniform_densities


def why_dense(candidates: Iterable[Candidate], most: int = 10) -> str:
    """The layers that stay dense, the largest first, and why."""
    left = sorted((c for c in candidates if c.reason is not None), key=lambda c: -c.size)
    more = [f"and {len(left) - most} more"] if len(left) > most else []
    return "; ".join([f"{c.name}: {c.reason}" for c in left[:most]] + more)


def share_out(
    candidates: list[Candidate], density: float, block: tuple[int, int], distribution: str | Mapping[str, float]
) -> dict[str, float]:
    """The density of every layer to be swapped; writes into the others why not, and which layers the density counts.

    Raises:
        ValueError: a distribution that names unknown or unsuitable layers, or nothing to swap.
    """
    named: dict[str, float] = {}
    if isinstance(distribution, Mapping):
        named = _named_densities(candidates, distribution)
    elif not isinstance(distribution, str):
        raise TypeError(
            f"distribution must be 'erk', 'uniform' or {{name: density}}, got {type(distribution).__name__}"
        )
    elif distribution not in ("erk", "uniform"):
        raise ValueError(f"distribution must be 'erk', 'uniform' or {{name: density}}, got {distribution!r}")
    for c in candidates:
        if c.reason is not None:
            continue
        c_out, c_in = c.oriented[:2]
        if c.groups > 1:
            c.reason = _ungroupable(c, block)
            if c.reason is not None and c.name in named:
                raise ValueError(f"distribution names {c.name!r}, which cannot be sparse: {c.reason}")
        elif c.name not in named and (c_out < block[0] or c_in < block[1]):
            c.reason = f"{c_in} to {c_out} channels, fewer than a block of {block[0]}x{block[1]}"
    free = {c.name: c.oriented for c in candidates if c.reason is None}
    if distribution == "erk":
        counted = {c.name: c.oriented for c in candidates if c.counted}
        dense = counted.keys() - free.keys()
    else:
        counted, dense = free, set()
    if not counted:
        raise ValueError(f"model has no layer to swap ({why_dense(candidates) or 'no convolution or linear layer'})")
    if distribution != "erk":
        for c in candidates:
            c.counted = c.name in free
        return {**uniform_densities(free, density), **named}
    # Below the smallest density there is no distribution; what is reached then is compared with what was asked for.
    shares = erk_densities(counted, max(density, smallest_density(counted, block, dense)), dense)
    for c in candidates:
        if c.reason is None and shares[c.name] == 1.0:
            c.reason = "its ERK density is 1"
    return {c.name: shares[c.name] for c in candidates if c.reason is None}


def _ungroupable(candidate: Candidate, block: tuple[int, int]) -> str | None:
    """Why a grouped convolution cannot be sparse with a block: the channels of a group are no multiples of it."""
    groups, layer = candidate.groups, candidate.module
    c_in, c_out = int(layer.in_channels) // groups, int(layer.out_channels) // groups  # type: ignore[arg-type]
    if c_out % block[0] == 0 and c_in % block[1] == 0:
        return None
    return f"groups={groups} of {c_in} to {c_out} channels, no multiples of a block of {block[0]}x{block[1]}"


def _named_densities(candidates: list[Candidate], distribution: Mapping[str, float]) -> dict[str, float]:
    """The densities of a ``{name: density}``, by each layer's first name."""
    by_name = {name: c for c in candidates for name in c.names}
    named: dict[str, float] = {}
    for name, share in distribution.items():
        if name not in by_name:
            raise ValueError(f"distribution names {name!r}, which is no convolution or linear layer of the model")
        candidate = by_name[name]
        if candidate.reason is not None:
            raise ValueError(f"distribution names {name!r}, which cannot be sparse: {candidate.reason}")
        if named.setdefault(candidate.name, share) != share:
            raise ValueError(f"distribution gives two densities to one layer: {', '.join(candidate.names)}")
        check_density(share, f"distribution[{name!r}]")
    return named
