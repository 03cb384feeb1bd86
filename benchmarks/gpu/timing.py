"""Timing on a device: programs are captured into CUDA graphs and replayed in turn, between two events.

A graph holds several calls in a row, so that the time of one call is the device's own, without launches from the host.
*Warm*: all calls use the same tensors, which stay in the L2 cache where they fit. *Cold*: each call has tensors of its
own, so many that the cache has lost them when they come round again.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

Work = Callable[[], Any]
TARGET = 2e-3  # seconds that one replay is to take, so that the events' resolution (0.5 µs) does not matter
MOST_CALLS = 100


class Captured(Protocol):
    """A program made ready: `replay` runs it again on the same memory; `outputs` are what its last calls returned."""

    outputs: Sequence[Any]

    def replay(self) -> None: ...


class Watch(Protocol):
    """How a device captures and times. The clock of the tests is another one."""

    def capture(self, works: Sequence[Work], keep: int | None = None) -> Captured: ...

    def seconds(self, captured: Captured) -> float: ...


class CudaGraph:
    """Some calls captured in one CUDA graph, after they ran on its stream (kernels compiled, algorithms chosen).

    Args:
        works: the calls. keep: how many of their results stay alive at a time; the memory of older ones is used again
            by the calls after them. None: all.

    Not ``torch.cuda.graph``, which collects garbage and empties the allocator's cache each time: a tenth of a second
    for each of a thousand captures.
    """

    def __init__(self, works: Sequence[Work], keep: int | None = None, warmups: int = 3) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for work in {id(work): work for work in works}.values():
                for _ in range(warmups):
                    work()
            torch.cuda.synchronize()
            with _no_collection():  # it could destroy another graph, which no capture permits
                self._graph.capture_begin()
                try:
                    self.outputs = _last_results(works, keep)
                finally:
                    self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self) -> None:
        self._graph.replay()


def _last_results(works: Iterable[Work], keep: int | None) -> deque[Any]:
    kept: deque[Any] = deque(maxlen=keep)
    for work in works:
        kept.append(work())
    return kept


@contextmanager
def _no_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class CudaWatch:
    """Graphs and events."""

    def capture(self, works: Sequence[Work], keep: int | None = None) -> CudaGraph:
        return CudaGraph(works, keep)

    def seconds(self, captured: Captured) -> float:
        """Seconds of one replay on the device."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        captured.replay()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3


class Rerun:
    """What stands for a graph on the CPU: `replay` calls again and writes the results into the first outputs."""

    def __init__(self, works: Sequence[Work], keep: int | None = None) -> None:
        self._works = list(works)
        self.outputs = _last_results(works, keep)

    def replay(self) -> None:
        results = [work() for work in self._works]
        for output, result in zip(self.outputs, results[len(results) - len(self.outputs) :], strict=True):
            if isinstance(output, Tensor):
                output.copy_(result)


class HostWatch:
    """The same on the CPU."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def capture(self, works: Sequence[Work], keep: int | None = None) -> Rerun:
        return Rerun(works, keep)

    def seconds(self, captured: Captured) -> float:
        start = self._clock()
        captured.replay()
        return self._clock() - start


def watch_of(device: str) -> Watch:
    """The watch of a device type."""
    return CudaWatch() if device == "cuda" else HostWatch()


class Program:
    """Something to time: calls that are captured once, all alike in cost.

    Args:
        watch: of the device. works: the different calls; one for warm, one for each set of tensors for cold.
        target: seconds a replay should take at least; the calls are repeated until they do.
    """

    def __init__(self, watch: Watch, works: Sequence[Work], target: float = TARGET) -> None:
        self._watch = watch
        # One result less than there are works stays alive while the next is made: each work has memory of its own for
        # its result, and comes back to it in the next round; a single work always writes the same.
        keep = len(works) - 1
        once = watch.capture(works, keep)
        watch.seconds(once)
        estimate = max(min(watch.seconds(once) for _ in range(2)), 1e-7)
        rounds = max(1, min(MOST_CALLS // len(works), round(target / estimate)))
        self._calls = rounds * len(works)
        self._captured = once if rounds == 1 else watch.capture([*works] * rounds, keep)
        watch.seconds(self._captured)

    def seconds(self) -> float:
        """Mean seconds of one call, in one replay."""
        return self._watch.seconds(self._captured) / self._calls


def in_turn(programs: Sequence[Program], rounds: int) -> list[list[float]]:
    """Seconds per call of each program, measured in turn: result[program][round]."""
    samples: list[list[float]] = [[] for _ in programs]
    for _ in range(rounds):
        for program, own in zip(programs, samples, strict=True):
            own.append(program.seconds())
    return samples


def sets_needed(bytes_of_one: float, cache: float, most: int = 16) -> int:
    """How many sets of tensors push each other out of a cache: at least two, together three times its size.

    >>> sets_needed(10e6, 60e6), sets_needed(500e6, 60e6)
    (16, 2)
    """
    return max(2, min(most, -(-int(3 * cache) // max(1, int(bytes_of_one)))))


@contextmanager
def precision(mode: str) -> Iterator[None]:
    """float32 products as "tf32" or "ieee" (full), on torch's side and, as they follow torch's flags, on ours."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = mode == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def cudnn_benchmark(on: bool) -> Iterator[None]:
    """Whether cuDNN times its algorithms the first time it sees a shape, and takes the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Convolutions by torch's own matrix products: for float64, where cuDNN may have nothing for a window."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def forget(device: str, collect: bool = True) -> None:
    """Gives back the memory of graphs and tensors that are gone."""
    if collect:
        gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
