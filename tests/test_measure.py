"""Spreads, interleaving and the counted floor, with clocks that are set by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ddst import measure
from ddst.measure import MedianInterval, Peak, Spread


class FakeTime:
    """A clock that programs advance."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def program(self, name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            self.now += seconds
            self.order.append(name)

        return work


def test_spread_is_median_and_tenths() -> None:
    assert Spread.of([float(i) for i in range(11)]) == Spread(5.0, 1.0, 9.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of_ratios([2.0, 8.0, 3.0], [1.0, 2.0, 3.0]) == Spread(2.0, 1.0, 4.0)


def test_interleaved_takes_turns_and_counts_per_call() -> None:
    clock = FakeTime()
    works = [clock.program("a", 0.5), clock.program("b", 0.125)]
    samples = measure.interleaved(works, 3, clock, least_seconds=0.25)
    assert samples == [[0.5] * 3, [0.125] * 3]
    # b is called twice in a row, so that a measurement takes long enough; the first two of each warm up.
    assert "".join(clock.order) == "aa" + "bb" + "abb" * 3


def test_the_medians_interval_is_of_order_statistics() -> None:
    def ranks(n: int) -> tuple[float, float]:
        interval = MedianInterval.of([float(i) for i in range(n, 0, -1)])
        return interval.low, interval.high

    # Ranks of the sign test, as printed in tables of the binomial distribution.
    assert [ranks(n) for n in (6, 9, 15, 20, 25)] == [(1, 6), (2, 8), (4, 12), (6, 15), (8, 18)]
    assert ranks(5) == (-math.inf, math.inf)
    assert MedianInterval.of_ratios([2.0] * 6, [1.0] * 5 + [4.0]) == MedianInterval(2.0, 0.5, 2.0)


def test_the_interval_covers_the_median() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.empty(2000, 15).log_normal_(0.0, generator=generator)  # skewed, its median is 1
    inside = [i.low <= 1.0 <= i.high for i in map(MedianInterval.of, samples.tolist())]
    assert 0.95 <= sum(inside) / len(inside) <= 0.98


def test_paired_goes_on_until_the_ratio_is_known() -> None:
    clock = FakeTime()
    seconds, ratio = measure.paired(clock.program("a", 3.0), clock.program("b", 2.0), 1, clock)
    assert (seconds, ratio) == (3.0, MedianInterval(1.5, 1.5, 1.5))
    assert len(clock.order) == 2 * (6 + 2)  # two of each warm up

    noisy, calls = FakeTime(), iter(range(10**6))

    def jumps() -> None:
        noisy.now += 1.0 if next(calls) % 2 else 100.0

    _, ratio = measure.paired(jumps, noisy.program("b", 1.0), 7, noisy)
    assert (ratio.low, ratio.high) == (1.0, 100.0)
    assert noisy.order.count("b") == measure.PATIENCE * (7 + 2)


def test_fastest_goes_by_the_least_time() -> None:
    clock = FakeTime()
    works = [clock.program("slow", 3.0), clock.program("fast", 1.0), clock.program("middle", 2.0)]
    assert measure.fastest(works, clock, least_seconds=1.0) == 1


def test_calls_in_a_row_are_limited() -> None:
    clock = FakeTime()
    assert measure.calls_for(clock.program("short", 1e-9), 1.0, clock) == 1000
    assert measure.calls_for(clock.program("long", 9.0), 1.0, clock) == 1


def test_floor_is_the_larger_of_arithmetic_and_memory() -> None:
    peak = Peak(flops=100.0, bandwidth=10.0)
    assert peak.floor(flops=200.0, bytes=1.0) == 2.0
    assert peak.floor(flops=200.0, bytes=50.0) == 5.0


def test_peak_is_positive_and_measured_once() -> None:
    first = measure.peak("cpu", torch.float32)
    assert first.flops > 0
    assert first.bandwidth > 0
    assert measure.peak("cpu", torch.float32) is first
