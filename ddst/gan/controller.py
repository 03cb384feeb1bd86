"""The discriminator's density: a pure function from a window of balance ratios to a decision with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ddst._arguments import check_bool, check_int, check_number, check_one_of, check_type
from ddst.gan.balance import WindowSummary

MODES = ("relaxed", "strict")
SIGNALS = ("balance_ratio", "real_sign")
KEEP, GROW, DROP, EXCHANGE = "keep", "grow", "drop", "exchange"


@dataclass(frozen=True)
class Decision:
    """What to do with the discriminator, why, and from what: enough to replay it.

    Attributes:
        step: generator iteration.
        action: "keep", "grow", "drop" or "exchange" (drop and grow at a constant density).
        density: before. new_density: the density asked for; equal to ``density`` for "keep" and "exchange".
        reason: one sentence.
        window: the summary the decision was made from.
        lowest, highest: the densities the discriminator can reach, see :meth:`ddst.gan.controller.DecisionRule.decide`.
        resolution: the smallest change of density that can be made.
    """

    step: int
    action: str
    density: float
    new_density: float
    reason: str
    window: WindowSummary
    lowest: float = 0.0
    highest: float = 1.0
    resolution: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; :meth:`from_dict` undoes it."""
        return asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Decision:
        """The decision that :meth:`as_dict` wrote."""
        return Decision(**{**fields, "window": WindowSummary(**fields["window"])})


class DecisionRule:
    """What decides about D's density: ``(window, density, step) → Decision``, a pure function.

    Attributes:
        density_range: ``(d_min, d_max)``, the densities it asks for. warmup: steps without a decision.
    """

    density_range: tuple[float, float] | None
    warmup: int = 0

    def decide(
        self,
        window: WindowSummary,
        density: float,
        step: int,
        *,
        lowest: float = 0.0,
        highest: float = 1.0,
        resolution: float = 0.0,
    ) -> Decision:
        """The decision for a window, a density and a step; a pure function of its arguments.

        Args:
            window: summary of the balance ratio.
            density: of the discriminator, 0 … 1.
            step: generator iteration, compared with ``warmup``.
            lowest, highest: the densities the discriminator can reach
                (:attr:`~ddst.sparsity.TopologyUpdater.attainable_density`): the range ends there if that is narrower.
            resolution: the smallest change that can be made: a density within it of the range's end is at the end.
        """
        check_type("window", window, WindowSummary, "a WindowSummary")
        check_number("density", density, 0, 1)
        check_int("step", step)
        for name, value in (("lowest", lowest), ("highest", highest), ("resolution", resolution)):
            check_number(name, value)
        assert self.density_range is not None
        ends = max(self.density_range[0], lowest), min(self.density_range[1], highest)
        # Densities are sums of shares: 0.1 + 8 · 0.05 is not 0.5.
        margin = max(resolution, 1e-9)
        action, new_density, reason = self._choose(window, density, step, ends, margin)
        return Decision(step, action, density, new_density, reason, window, lowest, highest, resolution)

    def _choose(
        self, window: WindowSummary, density: float, step: int, ends: tuple[float, float], margin: float
    ) -> tuple[str, float, str]:
        """(action, new density, reason); ``margin``: how near to one of the ends is at the end."""
        raise NotImplementedError

    def replay(self, decision: Decision) -> Decision:
        """Decides again from what a logged decision was made from: equal to it if the settings are the same."""
        check_type("decision", decision, Decision, "a Decision")
        return self.decide(
            decision.window,
            decision.density,
            decision.step,
            lowest=decision.lowest,
            highest=decision.highest,
            resolution=decision.resolution,
        )


@dataclass(frozen=True)
class DensityController(DecisionRule):
    """``d += Δ`` where ``BR > B+``, ``d −= Δ`` where ``BR < B−``, within ``[d_min, d_max]``.

    =============  =========================  ======================================================
    mode           "relaxed"                  "strict"
    =============  =========================  ======================================================
    density range  0.05 … 1                   0.05 … 0.5
    BR > B+        ``d + Δ``, at most d_max   the same; at d_max "exchange": DST at constant density
    BR < B−        ``d − Δ``, at least d_min  the same
    B− ≤ BR ≤ B+   keep                       keep
    =============  =========================  ======================================================

    Kept, with the reason: in the first ``warmup`` steps, before the window is full, where the window has no ratio (β
    near zero or negative), and at the end of the range. A density that starts outside the range is never moved further
    out, and never jumps: "drop" from above d_max takes Δ at a time.

    The authors' code does two things otherwise than their text, which is what is followed here; ``published=True`` is
    the code: a ratio *on* a bound counts as beyond it, and a strict D *above* d_max is left alone where BR > B+ (here
    it is exchanged there, too: a D that starts too dense would otherwise never move again).

    ``signal="real_sign"`` decides by StyleGAN2-ADA's signal ``E[sign D(x)]`` in place of BR, with the directions
    swapped: a large one says that D is sure of the data, so D shrinks above the upper bound and grows below the lower.

    Args:
        mode: "relaxed" or "strict".
        bounds: ``(B−, B+)``; None: (0.45, 0.55), with "real_sign" (0.55, 0.65), around ADA's published target 0.6.
        delta: ``Δ``, above 0.
        density_range: ``(d_min, d_max)``; None: that of the mode.
        warmup: steps without a decision.
        signal: "balance_ratio" or "real_sign". published: decide on the bounds and above d_max as the code does.

    Raises:
        ValueError: an argument outside its range.

    Source: Wang et al., *Balanced Training for Sparse GANs* (2023), dynamic density adjustment, both settings; Karras
        et al., *Training Generative Adversarial Networks with Limited Data* (2020), section 3, for the sign.

    >>> controller = DensityController("strict")
    >>> window = WindowSummary(100, 100, 0.3, 0.5, 0.6)
    >>> controller.decide(window, density=0.5, step=2000).action
    'exchange'
    >>> decision = controller.decide(window, density=0.1, step=2000)
    >>> decision.action, round(decision.new_density, 3), decision.reason
    ('grow', 0.15, 'balance ratio 0.6 is above 0.55: D is too weak')
    >>> controller.replay(decision) == decision
    True
    """

    mode: str = "relaxed"
    bounds: tuple[float, float] | None = None
    delta: float = 0.05
    density_range: tuple[float, float] | None = None
    warmup: int = 0
    signal: str = "balance_ratio"
    published: bool = False

    def __post_init__(self) -> None:
        check_one_of("mode", self.mode, MODES)
        check_one_of("signal", self.signal, SIGNALS)
        check_bool("published", self.published)
        usual = (0.45, 0.55) if self.signal == "balance_ratio" else (0.55, 0.65)
        low, high = check_pair("bounds", usual if self.bounds is None else self.bounds)
        if not low <= high:
            raise ValueError(f"bounds must be (B-, B+) with B- at most B+, got {self.bounds}")
        check_number("delta", self.delta, most=1, above=0)
        given = (0.05, 1.0 if self.mode == "relaxed" else 0.5) if self.density_range is None else self.density_range
        check_int("warmup", self.warmup, 0)
        object.__setattr__(self, "bounds", (low, high))
        object.__setattr__(self, "density_range", check_range("density_range", given))

    def _choose(
        self, window: WindowSummary, density: float, step: int, ends: tuple[float, float], margin: float
    ) -> tuple[str, float, str]:
        assert self.bounds is not None
        (d_min, d_max), (low, high) = ends, self.bounds
        by_ratio = self.signal == "balance_ratio"
        value, name = (window.balance_ratio, "balance ratio") if by_ratio else (window.mean_sign, "sign of D(x)")
        if step <= self.warmup:
            return KEEP, density, f"warm-up until step {self.warmup}"
        if not window.full:
            return KEEP, density, f"window holds {window.samples} of {window.capacity} samples"
        if value is None or not math.isfinite(value):
            why = (window.reason or "not finite") if by_ratio else "it was not measured"
            return KEEP, density, f"no {name}: {why}"
        above, below = value > high, value < low
        if self.published:
            above, below = value >= high, not value >= high and value <= low
        if not (above or below):
            return KEEP, density, f"{name} {value:.3g} is within {low:.3g} and {high:.3g}"
        bound, weak = high if above else low, above if by_ratio else below
        place = "on" if value == bound else "above" if above else "below"
        why = f"{name} {value:.3g} is {place} {bound:.3g}: D is too {'weak' if weak else 'strong'}"
        if weak:
            if density < d_max - margin:
                return GROW, min(density + self.delta, d_max), why
            at_end = f"{why}, but its density {density:.3g} is at the upper end {d_max:.3g}"
            left_alone = self.published and density > d_max + margin
            return EXCHANGE if self.mode == "strict" and not left_alone else KEEP, density, at_end
        if density > d_min + margin:
            return DROP, max(density - self.delta, d_min), why
        return KEEP, density, f"{why}, but its density {density:.3g} is at the lower end {d_min:.3g}"

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values; ``DensityController(**fields)`` undoes it."""
        return asdict(self)


def check_pair(name: str, pair: Any) -> tuple[float, float]:
    """Two finite numbers as floats; an error that names the argument otherwise."""
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise TypeError(f"{name} must be two numbers, got {pair!r:.50}")
    return (check_number(name, pair[0]), check_number(name, pair[1]))


def check_range(name: str, pair: Any) -> tuple[float, float]:
    """Two densities in order; an error that names the argument otherwise."""
    low, high = check_pair(name, pair)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{name} must be (d_min, d_max) with 0 <= d_min <= d_max <= 1, got {pair}")
    return low, high
