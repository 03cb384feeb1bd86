"""Time is short: each part gets its share of what is left, and what it leaves over goes to those after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

#: Relative shares of the time. Correctness comes first, may take more than half of it, and fails if that is too little.
SHARES = {
    "primitives": 15.0,
    "correctness": 90.0,
    "tune": 14.0,
    "kernels": 22.0,
    "host": 2.0,
    "iteration": 14.0,
    "train": 6.0,
    "candidates": 6.0,
}


class Deadline:
    """A moment after which no new piece of work is begun."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - self._clock())

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return self._clock() >= self._end


class Budget:
    """Deals out a number of seconds to the parts of a run.

    >>> budget = Budget(100.0, ["correctness", "kernels"], {"correctness": 3.0, "kernels": 1.0}, clock=lambda: 0.0)
    >>> budget.deadline("correctness").left, budget.deadline("kernels").left
    (75.0, 100.0)
    """

    def __init__(
        self,
        seconds: float,
        parts: Iterable[str],
        shares: Mapping[str, float] = SHARES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._shares = clock, dict(shares)
        self._waiting = list(parts)
        self._whole = Deadline(seconds, clock)

    def deadline(self, part: str) -> Deadline:
        """The end of a part that begins now: ``left · share / (shares of it and all that have not begun)``."""
        share = self._shares[part]
        self._waiting = [name for name in self._waiting if name != part]
        total = share + sum(self._shares[name] for name in self._waiting)
        return Deadline(self._whole.left * share / total, self._clock)
