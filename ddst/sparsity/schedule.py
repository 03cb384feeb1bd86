"""How large a share of the active blocks an update exchanges, as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ddst._arguments import check_int, check_number, check_one_of

FINAL_FRACTION = 0.005
SHARE = "(a share of the active blocks)"
SHAPES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class DropSchedule:
    """``ζ(t) = ζ1 + (ζ0 − ζ1) · s(t / T)``: the drop fraction from ``ζ0`` at step 0 to ``ζ1`` at step ``T``.

    ``s(u)`` is ``(1 + cos πu) / 2`` for "cosine", ``1 − u`` for "linear" and 1 for "constant". Steps outside
    ``0 … T`` get the value at the nearer end.

    Args:
        initial: ``ζ0``, a share of the active blocks, 0 … 1.
        total_steps: ``T``, at least 1.
        shape: "cosine", "linear" or "constant".
        final: ``ζ1``; where ``initial`` is smaller, ``initial`` is used, so that a schedule never rises.

    Raises:
        ValueError: an argument outside its range.

    Source: Evci et al., *Rigging the Lottery* (2020), section 3 (cosine); ``ζ1 = 0.005`` is the paper's of DDST.

    >>> schedule = DropSchedule(0.5, 1000)
    >>> [round(schedule(t), 4) for t in (0, 500, 1000)]
    [0.5, 0.2525, 0.005]
    """

    initial: float
    total_steps: int
    shape: str = "cosine"
    final: float = FINAL_FRACTION

    def __post_init__(self) -> None:
        for name in ("initial", "final"):
            check_number(name, getattr(self, name), 0, 1, note=SHARE)
        check_int("total_steps", self.total_steps, 1)
        check_one_of("shape", self.shape, SHAPES)

    def __call__(self, step: int) -> float:
        """The drop fraction at a step."""
        check_number("step", step)
        final = min(self.final, self.initial)
        done = min(max(step / self.total_steps, 0.0), 1.0)
        if self.shape == "constant":
            return self.initial
        left = (1 + math.cos(math.pi * done)) / 2 if self.shape == "cosine" else 1 - done
        # Both ends exactly, without the rounding of a product and a sum.
        return self.initial if left == 1 else final if left == 0 else final + (self.initial - final) * left


def falling_steps(drop_fraction_steps: int | None, default: int) -> int:
    """Steps over which a drop fraction falls.

    >>> falling_steps(None, 3000), falling_steps(1000, 3000)
    (3000, 1000)
    """
    return default if drop_fraction_steps is None else check_int("drop_fraction_steps", drop_fraction_steps, 1)


def make_schedule(
    schedule: str | Callable[[int], float],
    initial: float,
    total_steps: int,
    name: str = "drop_fraction",
    final: float = FINAL_FRACTION,
) -> Callable[[int], float]:
    """A schedule from its name, or the user's own function of the step.

    >>> make_schedule("linear", 0.3, 10)(10), make_schedule(lambda step: 0.1, 0.3, 10)(3)
    (0.005, 0.1)
    """
    if callable(schedule):
        return schedule
    if not isinstance(schedule, str) or schedule not in SHAPES:
        error = ValueError if isinstance(schedule, str) else TypeError
        raise error(f"schedule must be a function of the step or one of {', '.join(SHAPES)}, got {schedule!r:.50}")
    initial = check_number(name, initial, 0, 1, note=SHARE)
    final = check_number("drop_fraction_end", final, 0, 1, note=SHARE)
    return DropSchedule(initial, total_steps, schedule, final)
