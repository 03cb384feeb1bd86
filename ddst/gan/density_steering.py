"""Carries decisions about D's density out: when one is taken, when D is ready for it, and what changes then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ddst.distributed import check_movable
from ddst.gan.balance import WindowSummary
from ddst.gan.controller import DROP, EXCHANGE, GROW, Decision, DecisionRule
from ddst.sparsity.updater import TopologyUpdater, UpdateReport


class DensitySteering:
    """Every ``ΔT_D`` iterations a rule decides; the next step of D that brings what the change needs makes it.

    Args:
        updater: moves D's blocks. rule: decides.
        interval: ``ΔT_D``. total_steps: of the run; the first and the last iteration never decide.
        fraction: step → share of the blocks that an exchange moves.

    Attributes:
        waiting: a decision that is not carried out yet, as D has made no step, or one without a gradient.
    """

    def __init__(
        self,
        updater: TopologyUpdater,
        rule: DecisionRule,
        interval: int,
        total_steps: int,
        fraction: Callable[[int], float],
    ) -> None:
        self.updater, self.rule = updater, rule
        self.interval, self.total_steps, self.fraction = interval, total_steps, fraction
        self.waiting: Decision | None = None
        assert rule.density_range is not None
        highest = rule.density_range[1]
        reserved = all(layer.reserve == layer.num_blocks for layer in updater.layers.values())
        check_movable(
            updater.layers, "" if reserved else f"D's density may rise to {highest:g} beyond what reserve= set aside"
        )

    def decides_at(self, step: int) -> bool:
        """Whether the rule decides at this iteration."""
        return 1 < step < self.total_steps and step % self.interval == 0

    def step(self, step: int, window: WindowSummary) -> tuple[Decision | None, UpdateReport | None]:
        """One iteration of G is done: decides if it is time, and changes D if it is ready."""
        updater, decision, update = self.updater, None, None
        updater.check_first_state()
        if self.decides_at(step):
            if self.waiting is not None:
                raise RuntimeError(
                    f"no gradient reached a sparse layer of discriminator from step {self.waiting.step} to {step}, or "
                    "none that is finite: call step() after opt_d.step(), once per generator iteration"
                )
            low, high = updater.attainable_density
            decision = self.rule.decide(
                window, updater.density, step, lowest=low, highest=high, resolution=updater.resolution
            )
            if decision.action in (DROP, GROW, EXCHANGE):
                self.waiting = decision
        if self.waiting is not None and step < self.total_steps and self._may_change(self.waiting.action):
            if self.waiting.action in (DROP, GROW):
                update = updater.change_density(self.waiting.new_density, step)
            else:
                update = updater.exchange(min(max(float(self.fraction(step)), 0.0), 1.0), step)
            self.waiting = None
        updater.scores.steps.forget()
        if self.waiting is None:
            updater.scores.cancel()
        if self._asks_before(step + 1) and not updater.scores.requested:
            updater.scores.request()
        return decision, update

    def _may_change(self, action: str) -> bool:
        """Whether D has made a step since the last iteration, with scores where blocks are to grow by them."""
        scores = self.updater.scores
        return scores.steps.any and (action == DROP or self.updater.growth == "random" or scores.arrived)

    def load(self, updater: Mapping[str, Any], waiting: Mapping[str, Any] | None, step: int) -> None:
        """Restores the updater's state and the decision that waits after `step`, of a run that may be longer now."""
        self.updater.load_state_dict(updater)
        self.waiting = None if waiting is None else Decision.from_dict(waiting)
        scores = self.updater.scores
        if self.waiting is None and not self._asks_before(step + 1):
            scores.cancel()
        elif not scores.requested:
            scores.request()

    def _asks_before(self, step: int) -> bool:
        """Whether the iteration `step` is to bring scores for a decision that may need them."""
        return self.decides_at(step) and step > self.rule.warmup
