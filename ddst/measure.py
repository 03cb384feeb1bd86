"""Fair timing on a machine that other work may share, and what the machine reaches at best.

Programs that are compared are timed in turn, so that a slow moment of the machine hits all of them; a speed-up is the
median of the ratios of neighbouring measurements, which is steadier than a ratio of two averages.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Work = Callable[[], object]
Clock = Callable[[], float]


def _synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


# "cpu" counts the seconds the process computed: on a machine that other programs keep busy it leaves out the time
# they took. With one thread the two agree on an idle machine.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time, "cuda": _synchronized}


def clock_of(device: str) -> Clock:
    """The clock that sees all the work of a device type."""
    return CLOCKS["cuda" if device == "cuda" else "wall"]


@dataclass(frozen=True)
class Spread:
    """Median and the 10th and 90th percentile of some measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of at least one sample.

        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.0, high=3.0)
        """
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])

    @classmethod
    def of_ratios(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
        """The spread of the ratios taken pair by pair.

        >>> Spread.of_ratios([4.0, 9.0], [2.0, 3.0]).median
        2.5
        """
        return cls.of([n / d for n, d in zip(numerators, denominators, strict=True)])


@dataclass(frozen=True)
class MedianInterval:
    """Median of some measurements, and where the true median lies with 95 % confidence, whatever their distribution.

    The bounds are the ``k``-th smallest and the ``k``-th largest sample, with the largest ``k`` for which the true
    median is outside with a probability ``2 P(Binomial(n, 1/2) < k)`` of at most 5 %. Fewer than six samples allow no
    such ``k``: the bounds are infinite.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> MedianInterval:
        """The interval of at least one sample.

        >>> MedianInterval.of([float(i) for i in range(1, 16)])
        MedianInterval(median=8.0, low=4.0, high=12.0)
        """
        ordered, k, outside = sorted(samples), 0, 0.0
        while (outside := outside + 2.0 * math.comb(len(ordered), k) / 2.0 ** len(ordered)) <= 0.05:
            k += 1
        low, high = (ordered[k - 1], ordered[-k]) if k else (-math.inf, math.inf)
        return cls(statistics.median(ordered), low, high)

    @classmethod
    def of_ratios(cls, numerators: Sequence[float], denominators: Sequence[float]) -> MedianInterval:
        """The interval of the ratios taken pair by pair."""
        return cls.of([n / d for n, d in zip(numerators, denominators, strict=True)])


def seconds(work: Work, calls: int, clock: Clock = time.perf_counter) -> float:
    """Mean seconds of one call, over some calls in a row."""
    start = clock()
    for _ in range(calls):
        work()
    return (clock() - start) / calls


def calls_for(work: Work, least_seconds: float, clock: Clock = time.perf_counter) -> int:
    """How many calls in a row take at least so long, at most 1000. Also warms up."""
    work()
    return max(1, min(1000, round(least_seconds / max(seconds(work, 1, clock), 1e-7))))


def fastest(
    works: Sequence[Work], clock: Clock = time.perf_counter, rounds: int = 3, least_seconds: float = 2e-3
) -> int:
    """Index of the fastest of some equivalent programs, by the least of some interleaved measurements."""
    best = [min(samples) for samples in interleaved(works, rounds, clock, least_seconds)]
    return best.index(min(best))


def interleaved(
    works: Sequence[Work], repeats: int, clock: Clock = time.perf_counter, least_seconds: float = 2e-3
) -> list[list[float]]:
    """Seconds per call of each program, measured in turn `repeats` times: result[program][repeat]."""
    calls = [calls_for(work, least_seconds, clock) for work in works]
    samples: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for i, work in enumerate(works):
            samples[i].append(seconds(work, calls[i], clock))
    return samples


#: A ratio counts as known when its 95 % interval is no wider than this factor.
#: Widest interval of :func:`paired`, as a factor.
TIGHT = 1.25
#: How many times as often it measures at most.
PATIENCE = 8


def paired(first: Work, second: Work, repeats: int, clock: Clock = time.perf_counter) -> tuple[float, MedianInterval]:
    """``(median seconds of the first, interval of first / second)``, measured in turn until the ratio is known.

    At least six pairs are measured, `repeats` at a time, until the interval is no wider than the factor
    :data:`TIGHT`, at most :data:`PATIENCE` times: on a machine that other programs keep busy it may stay wider.
    """
    ours: list[float] = []
    theirs: list[float] = []
    repeats = max(repeats, 6)
    for _ in range(PATIENCE):
        for samples, more in zip((ours, theirs), interleaved([first, second], repeats, clock), strict=True):
            samples += more
        ratio = MedianInterval.of_ratios(ours, theirs)
        if ratio.high <= TIGHT * ratio.low:
            break
    return statistics.median(ours), ratio


@dataclass(frozen=True)
class Peak:
    """What a device was measured to reach at best: floating-point operations and bytes per second.

    >>> Peak(1e9, 1e9).floor(flops=2e6, bytes=1e6)
    0.002
    """

    flops: float
    bandwidth: float

    def floor(self, flops: float, bytes: float) -> float:
        """``max(flops / peak, bytes / bandwidth)``: seconds below which no program does that much."""
        return max(flops / self.flops, bytes / self.bandwidth)


def peak(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Peak:
    """The fastest dense arithmetic and the fastest copy through memory that torch reaches here; measured once.

    Arithmetic: the best of square matrix products and of a 3×3 convolution in both layouts, which is what a dense
    network could reach at best (the processor's own limit may be a few per cent higher). Bandwidth: reading and
    writing arrays of 64 MB (1 GB on a GPU), both counted; arrays that fit into a cache can be faster, so shares above
    100 % happen.

    Args:
        device: "cpu" or "cuda". dtype: of the arithmetic.

    Returns:
        Figures for the number of threads that torch has now; repeated calls return the first measurement.

    Cost: about half a second, once for each device, dtype and number of threads.
    """
    return _measured_peak(device, dtype, torch.get_num_threads())


@functools.cache
def _measured_peak(device: str, dtype: torch.dtype, threads: int) -> Peak:
    clock = clock_of(device)

    def best(work: Work, repeats: int) -> float:
        work()
        return min(seconds(work, 1, clock) for _ in range(repeats))

    with torch.no_grad():
        rates = []
        for n in (512, 1024) if device == "cpu" else (4096, 8192):
            a = torch.ones(n, n, device=device, dtype=dtype)
            rates.append(2 * n**3 / best(functools.partial(torch.mm, a, a), 8))
        images, channels = (4, 256) if device == "cpu" else (64, 512)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.ones(images, channels, 34, 34, device=device, dtype=dtype).contiguous(memory_format=layout)
            w = torch.ones(channels, channels, 3, 3, device=device, dtype=dtype).contiguous(memory_format=layout)
            work = functools.partial(F.conv2d, x, w)
            rates.append(2 * images * 32 * 32 * 9 * channels**2 / best(work, 6))
        source = torch.ones(2**24 if device == "cpu" else 2**28, device=device)
        target = torch.empty_like(source)
        copied = 2 * source.numel() * source.element_size() / best(lambda: target.copy_(source), 8)
    return Peak(max(rates), copied)
