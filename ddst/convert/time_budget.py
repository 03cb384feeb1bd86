"""The largest density whose training step takes no more than a share of the dense one, by what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..topology import grid
from .advice_report import BlockAdvice
from .candidates import Candidate
from .shares import Plan, make_plan, share_out

#: Where each layer is measured: a rule gives wide layers less than the whole's density.
DENSITIES = (0.03, 0.1, 0.3, 1.0)
#: Steps of the search: down by this factor to the first density that fits, then bisection in between.
_COARSE, _FINE = 0.95, 12
_LOWEST = 1e-6


def plan_within(
    candidates: Sequence[Candidate],
    time_budget: float,
    block: tuple[int, int],
    distribution: str | Mapping[str, float],
    work: Mapping[str, float] | None,
    measured: BlockAdvice,
) -> Plan:
    """``max d`` such that ``T(d) ≤ time_budget · T_dense``: the largest density of the distribution that fits the time.

    ``T(d) = T_dense − Σ_l (dense_l − sparse_l(d_l))`` over the layers which the distribution makes sparse at density
    ``d`` and which are faster so at their ``d_l`` (whole blocks over all blocks); the others stay dense. All is on the
    scale of the model's own step, see :func:`ddst.advise`, so what no sparse layer touches counts as it is. Since every
    ``d_l`` of a distribution grows with ``d``, the largest density has the most active weights. It is sought downwards
    from 1 in steps of 5 %, then to a thousandth of that by bisection.

    Raises:
        ValueError: no density fits; with the smallest budget that can be met and what takes the time there.

    Cost: 10 to 300 plans, each ``O(L²)`` for ``L`` layers.
    """
    able = densities_to_measure(candidates, block, distribution)
    blocks = {c.name: math.prod(grid(c.oriented, block)) for c in candidates if c.name in able}

    def plan_at(density: float) -> tuple[float, Plan]:
        plan = make_plan(candidates, density, block, distribution, work, measured)
        shares = {name: count / blocks[name] for name, count in plan.counts.items()}
        return measured.step_seconds(shares) / measured.model_seconds, plan

    density, (share, plan) = 1.0, plan_at(1.0)
    smallest = share, plan
    while share > time_budget:
        if (set(plan.counts) == set(able) and max(plan.counts.values()) == 1) or density < _LOWEST:
            raise ValueError(_refusal(time_budget, *smallest, measured))
        density *= _COARSE
        share, plan = plan_at(density)
        smallest = min(smallest, (share, plan), key=lambda found: found[0])
    below, above = density, density / _COARSE
    for _ in range(_FINE if density < 1.0 else 0):
        middle = (below + above) / 2
        share, found = plan_at(middle)
        below, above, plan = (middle, above, found) if share <= time_budget else (below, middle, plan)
    return plan


def densities_to_measure(
    candidates: Iterable[Candidate], block: tuple[int, int], distribution: str | Mapping[str, float]
) -> dict[str, float]:
    """The layers that some density makes sparse, each with one for :func:`ddst.advise`: which one does not matter."""
    # No rule leaves one dense here.
    every = distribution if isinstance(distribution, Mapping) else "uniform"
    return dict.fromkeys(share_out([replace(c) for c in candidates], 1.0, block, every), 0.1)


def _refusal(time_budget: float, share: float, plan: Plan, measured: BlockAdvice, most: int = 5) -> str:
    whole = measured.model_seconds
    rest = whole - sum(layer.calls * layer.dense_seconds for layer in measured.layers)
    taken = [(rest, "all else (activations, normalisation, what is no layer or was not measured)")]
    reasons = {c.name: c.reason for c in plan.candidates}
    for layer in measured.layers:
        density = plan.densities.get(layer.name)
        left = layer.calls * layer.dense_seconds - (0.0 if density is None else layer.saved(density))
        why = f"dense: {reasons.get(layer.name)}" if density is None else f"density {density:.3g}"
        taken.append((left, f"{layer.name} ({why})"))
    taken.sort(key=lambda part: -part[0])
    parts = "; ".join(f"{seconds / whole:.3f} in {name}" for seconds, name in taken[:most])
    return (
        f"time_budget {time_budget:g} cannot be met: the smallest that can is {math.ceil(share * 1e4) / 1e4:g} of the "
        f"dense step, which goes to: {parts}"
    )
