"""Spreads, interleaving and the counted floor, with clocks that are set by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ddst import measure
from ddst.measure import Peak, Spread


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
