"""What one iteration of a scheduler saw and did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ddst.gan.balance import BalanceSample
from ddst.gan.controller import Decision
from ddst.sparsity.updater import UpdateReport


@dataclass(frozen=True)
class StepReport:
    """What one call of :meth:`ddst.DDST.step` saw and did.

    Attributes:
        step: generator iteration, from 1.
        sample: the balance measurement, every ``br_every`` iterations, else None.
        decision: of the density controller, every ``interval_d`` iterations, else None.
        generator_update, discriminator_update: what changed in the topology, else None.
        density_g, density_d: afterwards.
    """

    step: int
    sample: BalanceSample | None
    decision: Decision | None
    generator_update: UpdateReport | None
    discriminator_update: UpdateReport | None
    density_g: float
    density_d: float

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold."""
        parts = (self.sample, self.decision, self.generator_update, self.discriminator_update)
        names = ("sample", "decision", "generator_update", "discriminator_update")
        nested = {name: None if part is None else part.as_dict() for name, part in zip(names, parts, strict=True)}
        return {"step": self.step, **nested, "density_g": self.density_g, "density_d": self.density_d}
