"""How the density asked for is shared out over the candidates of a conversion."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .advice_report import BlockAdvice
from .candidates import Candidate
from .distribution import (
    block_counts,
    check_density,
    erk_densities,
    smallest_density,
    uniform_densities,
    work_densities,
)
from .report import SparsifyReport

#: Those that make small layers denser, and share out over all layers that count, dense or not.
RULES = ("erk", "work")
DISTRIBUTIONS = (*RULES, "uniform")


def why_dense(candidates: Iterable[Candidate], cost: Mapping[str, float] | None = None, most: int = 10) -> str:
    """The layers that stay dense and why, the largest first (with the cost of a weight of each, the dearest)."""
    left = [c for c in candidates if c.reason is not None]
    left.sort(key=lambda c: -c.size * (1.0 if cost is None else cost[c.name]))
    more = [f"and {len(left) - most} more"] if len(left) > most else []
    return "; ".join([f"{c.name}: {c.reason}" for c in left[:most]] + more)


def share_out(
    candidates: list[Candidate],
    density: float,
    block: tuple[int, int],
    distribution: str | Mapping[str, float],
    work: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The density of every layer to be swapped; writes into the others why not, and which layers the density counts.

    Raises:
        ValueError: a distribution that names unknown or unsuitable layers, or nothing to swap.
    """
    named: dict[str, float] = {}
    expected = f"distribution must be {', '.join(map(repr, DISTRIBUTIONS))} or {{name: density}}"
    if isinstance(distribution, Mapping):
        named = _named_densities(candidates, distribution)
    elif not isinstance(distribution, str):
        raise TypeError(f"{expected}, got {type(distribution).__name__}")
    elif distribution not in DISTRIBUTIONS:
        raise ValueError(f"{expected}, got {distribution!r}")
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
    if distribution == "work":
        for c in candidates:
            # Whatever takes time, of any kind; what has no weights yet has no shape to go by.
            c.counted = c.reason != "excluded" and c.size > 0
    elif distribution != "erk":
        for c in candidates:
            c.counted = c.name in free
    counted = {c.name: c.oriented for c in candidates if c.counted}
    if not counted or (not free and distribution != "erk"):
        raise ValueError(f"model has no layer to swap ({why_dense(candidates) or 'no convolution or linear layer'})")
    if distribution not in RULES:
        return {**uniform_densities(free, density), **named}
    dense = counted.keys() - free.keys()
    if distribution == "work" and not sum((work or {}).get(name, 0.0) for name in free):
        raise ValueError("sample must reach a layer that can be sparse, but running the model with it reached none")
    # Below the smallest density there is no distribution; what is reached then is compared with what was asked for.
    least = smallest_density(counted, block, dense, work if distribution == "work" else None)
    asked = max(check_density(density), least)
    if distribution == "work":
        assert work is not None
        shares, called = work_densities(counted, work, asked, dense), "density by work"
    else:
        shares, called = erk_densities(counted, asked, dense), "ERK density"
    for c in candidates:
        if c.reason is None and shares[c.name] == 1.0:
            c.reason = f"its {called} is 1"
    return {c.name: shares[c.name] for c in candidates if c.reason is None}


def _ungroupable(candidate: Candidate, block: tuple[int, int]) -> str | None:
    """Why a grouped convolution cannot be sparse with a block: the channels of a group are no multiples of it."""
    groups, layer = candidate.groups, candidate.module
    c_in, c_out = int(layer.in_channels) // groups, int(layer.out_channels) // groups  # type: ignore[arg-type]
    if c_out % block[0] == 0 and c_in % block[1] == 0:
        return None
    return f"groups={groups} of {c_in} to {c_out} channels, no multiples of a block of {block[0]}x{block[1]}"


@dataclass(frozen=True)
class Plan:
    """What a conversion would do.

    Attributes:
        candidates: with the reasons why some stay as they are, and which ones the density counts.
        densities, counts: of each layer to be swapped, and its blocks. slower: left dense because sparse is slower.
        cost: what one weight of each counts: 1, or its multiply-adds where the density is a share of these.
    """

    candidates: list[Candidate]
    densities: dict[str, float]
    counts: dict[str, int]
    slower: dict[str, str]
    cost: dict[str, float]

    @property
    def chosen(self) -> dict[str, Candidate]:
        """The layers to be swapped."""
        return {c.name: c for c in self.candidates if c.name in self.densities}


def make_plan(
    candidates: Iterable[Candidate],
    density: float,
    block: tuple[int, int],
    distribution: str | Mapping[str, float],
    work: Mapping[str, float] | None = None,
    measured: BlockAdvice | None = None,
) -> Plan:
    """Shares a density out; with measurements, layers stay dense that these did not find to be faster sparse.

    Args:
        candidates: of :func:`~ddst.convert.find_weights`; they are not changed.
        work: multiply-adds of each candidate, which ``distribution="work"`` needs.
    """
    candidates = [replace(c) for c in candidates]
    densities = share_out(candidates, density, block, distribution, work)
    slower = {} if measured is None else measured.slower(densities)
    for c in candidates:
        if c.name in slower:
            c.reason, c.counted = slower[c.name], c.counted and distribution in RULES
            del densities[c.name]
    by_work = work if distribution == "work" else None
    shapes = {c.name: c.oriented for c in candidates if c.name in densities}
    counts = block_counts(shapes, densities, block, by_work)
    cost = {c.name: 1.0 if by_work is None else by_work[c.name] / max(1, c.size) for c in candidates}
    return Plan(candidates, densities, counts, slower, cost)


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


def check_met(report: SparsifyReport, plan: Plan, density: float | None, block: tuple[int, int]) -> None:
    """Raises where the density, or else the sum of the layers' own, is missed by more than a block."""
    cost = plan.cost
    counted = [layer for layer in report.layers if layer.counted]
    reached = sum(layer.active * cost[layer.name] for layer in counted)
    total = sum(layer.size * cost[layer.name] for layer in counted)
    wanted = sum(plan.densities.get(layer.name, 1.0) * layer.size * cost[layer.name] for layer in counted)
    if density is not None:
        wanted = density * total
    coarsest = max((cost[name] for name in plan.densities), default=1.0)
    untouched = density is not None and density < 1 and not plan.densities  # Less than a block, but not what was asked.
    if untouched or abs(reached - wanted) > coarsest * block[0] * block[1]:
        smallest = math.ceil(reached / total * 1e4) / 1e4
        dense = why_dense((c for c in plan.candidates if c.counted), plan.cost)
        raise ValueError(
            f"density {wanted / total:.6g} cannot be met with blocks of {block[0]}x{block[1]}: "
            "the smallest that can is "
            f"{smallest} (layers left dense, and one block in each other); exclude layers or use smaller blocks"
            + (f". Left dense: {dense}" if dense else "")
        )
