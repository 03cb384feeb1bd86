"""Time is short: each part gets its share of what is left, and what it leaves over goes to those after it."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

#: Relative shares of the time, the most valuable parts first. Correctness may take half of it, and fails if that is too
#: little. What earlier runs have proven takes none.
SHARES = {
    "primitives": 15.0,
    "correctness": 90.0,
    "kernels": 26.0,
    "iteration": 20.0,
    "tune": 14.0,
    "host": 2.0,
    "train": 6.0,
    "candidates": 6.0,
}
CUT_OFF = 1  # exit code


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


class ClosingTime:
    """Ends the program at a moment, whatever hangs in it then; what there is to say is said first.

    Args:
        seconds: from entering the block on. say: what is called then, in another thread. leave: ends the program.
    """

    def __init__(self, seconds: float, say: Callable[[], None], leave: Callable[[int], Any] = os._exit) -> None:
        self._timer = threading.Timer(max(0.0, seconds), self._end)
        self._timer.daemon = True
        self._say, self._leave = say, leave

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        try:
            self._say()
        finally:
            for process in multiprocessing.active_children():
                process.kill()
            self._leave(CUT_OFF)
