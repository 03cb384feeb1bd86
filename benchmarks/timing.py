"""Fair timing of two programs on a machine that other work may share: pairs, interleaved, and the median of ratios.

A ratio is taken from two measurements made one right after the other, so that a slow moment of the machine hits both
sides; the median over many pairs is then steadier than a ratio of two averages.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Work = Callable[[], object]
Clock = Callable[[], float]

# "cpu" counts the seconds the process computed: on a machine that other programs keep busy it leaves out the time
# they took. With one thread the two agree on an idle machine.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Spread:
    """Median and the 10th and 90th percentile of some measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of at least one sample."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


def seconds(work: Work, calls: int, clock: Clock = time.perf_counter) -> float:
    """Mean seconds of one call, over some calls in a row."""
    start = clock()
    for _ in range(calls):
        work()
    return (clock() - start) / calls


def calls_for(work: Work, least_seconds: float) -> int:
    """How many calls in a row take at least so long, at most 1000. Also warms up."""
    work()
    return max(1, min(1000, round(least_seconds / max(seconds(work, 1), 1e-7))))


def fastest(
    works: Sequence[Work], clock: Clock = time.perf_counter, rounds: int = 3, least_seconds: float = 2e-3
) -> int:
    """Index of the fastest of some equivalent programs, by the least of some interleaved measurements."""
    calls = [calls_for(work, least_seconds) for work in works]
    best = [float("inf")] * len(works)
    for _ in range(rounds):
        for i, work in enumerate(works):
            best[i] = min(best[i], seconds(work, calls[i], clock))
    return best.index(min(best))


def interleaved(
    works: Sequence[Work], repeats: int, clock: Clock = time.perf_counter, least_seconds: float = 2e-3
) -> list[list[float]]:
    """Seconds per call of each program, measured in turn `repeats` times: result[program][repeat]."""
    calls = [calls_for(work, least_seconds) for work in works]
    samples: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for i, work in enumerate(works):
            samples[i].append(seconds(work, calls[i], clock))
    return samples
