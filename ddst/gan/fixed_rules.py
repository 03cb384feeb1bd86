"""Rules for D's density that look at no measurement: a linear ramp, and an exchange of blocks at a constant density."""

from __future__ import annotations

from dataclasses import dataclass

from ddst._arguments import check_int
from ddst.gan.balance import WindowSummary
from ddst.gan.controller import DROP, EXCHANGE, GROW, KEEP, DecisionRule, check_range


@dataclass(frozen=True)
class DensityRamp(DecisionRule):
    """``d ← d + (d_end − d) · ΔT / (T − t + ΔT)``: a straight line from wherever D starts to ``d_end`` at step T.

    Every decision aims at the end from where D is, so a decision that was made up for later, or a run that was
    lengthened, still ends there.

    Args:
        end: ``d_end``. total_steps: ``T``. interval: ``ΔT``, steps between decisions.

    Raises:
        ValueError: an argument outside its range.

    Source: the linear schedule of D's density that the authors' code of *Balanced Training for Sparse GANs* has.

    >>> ramp, window = DensityRamp(0.5, total_steps=100, interval=10), WindowSummary(0, 1, 0.0, 0.0, None)
    >>> [round(ramp.decide(window, density, step).new_density, 3) for density, step in ((0.1, 10), (0.14, 20))]
    [0.14, 0.18]
    """

    end: float
    total_steps: int
    interval: int
    density_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_int("total_steps", self.total_steps, 1)
        check_int("interval", self.interval, 1)
        check_range("end", (self.end, self.end))
        object.__setattr__(self, "density_range", (0.0, 1.0))

    def _choose(
        self, window: WindowSummary, density: float, step: int, ends: tuple[float, float], margin: float
    ) -> tuple[str, float, str]:
        end = min(max(self.end, ends[0]), ends[1])
        share = min(self.interval / max(self.total_steps - step + self.interval, self.interval), 1.0)
        wanted = density + (end - density) * share
        why = f"on the line to {end:.3g} at step {self.total_steps}"
        if abs(wanted - density) <= margin:
            return KEEP, density, f"{why}; the change is less than a block"
        return GROW if wanted > density else DROP, wanted, why


@dataclass(frozen=True)
class ConstantDensity(DecisionRule):
    """``d ← d``: blocks of D are exchanged at every decision, as sparse training of one network does.

    >>> ConstantDensity().decide(WindowSummary(0, 1, 0.0, 0.0, None), 0.3, 10).action
    'exchange'
    """

    density_range: tuple[float, float] | None = (0.0, 1.0)

    def _choose(
        self, window: WindowSummary, density: float, step: int, ends: tuple[float, float], margin: float
    ) -> tuple[str, float, str]:
        return EXCHANGE, density, "blocks are exchanged at a constant density"
