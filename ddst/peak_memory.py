"""How many bytes a training iteration holds at most: weights, what is saved for backward, temporaries, workspaces."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, record_function

_SECOND_CALL = "ddst.peak_memory: the call that counts"


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of repeated work.

    Attributes:
        state: what stays between two calls: weights, buffers, gradients, optimizer state, averages.
        peak: the most that is there at once during a call, the state included.
    """

    state: int
    peak: int


def state_tensors(
    modules: Iterable[nn.Module], optimizers: Iterable[Optimizer] = (), others: Iterable[Tensor] = ()
) -> Iterator[Tensor]:
    """Parameters, their gradients, buffers, the tensors of optimizers, and others; some may come twice."""
    yield from others
    for module in modules:
        for parameter in module.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        yield from module.buffers()
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def peak_memory(
    work: Callable[[], object],
    modules: Sequence[nn.Module],
    optimizers: Sequence[Optimizer] = (),
    device: str = "cpu",
    others: Sequence[Tensor] = (),
) -> PeakMemory:
    """The most bytes that torch holds while `work` runs the way it always does: state, saved tensors, temporaries.

    On the CPU these are the allocator's own events (torch.profiler), so that what an operator takes inside of itself
    counts, and workspaces that torch gives to libraries; memory that an extension takes by malloc does not. On CUDA
    (not run yet) they are the statistics of torch's allocator. Inputs that `work` finds ready do not count.

    Args:
        work: what is repeated, such as a training iteration. It is called three times, and the last one counts. It sets
            gradients anew, and between two calls it keeps nothing else that the next one frees.
        modules, optimizers: what it trains, averages included: their tensors are the state.
        device: "cpu" or "cuda", where `work` allocates.
        others: what else is there all the time.

    Raises:
        ValueError: another device.

    Cost: the three calls, two of them recorded: seconds for networks of many layers.

    >>> layer = nn.Linear(1000, 1, bias=False)
    >>> peak_memory(lambda: layer.weight.detach().clone(), [layer])
    PeakMemory(state=4000, peak=8000)
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    work()  # compiles, fills caches and makes the optimizers' state
    if device == "cuda":
        return _on_cuda(work, modules, optimizers, others)
    # The CPU's allocator tells nothing of blocks that are older than the recording: none of these may be freed in it.
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = None
    gc.collect()
    with quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
        with record_function(_SECOND_CALL):
            work()
    state = _storages(state_tensors(modules, optimizers, others))
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    return _peak(state, list(_walk(recorded.profiler.kineto_results.experimental_event_tree())))


def _peak(state: dict[int, int], events: Sequence[Any]) -> PeakMemory:
    (begun,) = (e.start_time_ns for e in events if e.tag == _EventType.TorchOp and e.name == _SECOND_CALL)
    allocations = sorted((e for e in events if e.tag == _EventType.Allocation), key=lambda e: e.start_time_ns)
    recorded: dict[int, int] = {}
    now = peak = 0
    for event in allocations:
        if str(event.extra_fields.device) != "cpu":
            continue
        now += event.extra_fields.alloc_size
        if event.extra_fields.alloc_size > 0:
            recorded[event.extra_fields.ptr] = event.extra_fields.alloc_size
        else:
            recorded.pop(event.extra_fields.ptr, None)
        if event.start_time_ns < begun:
            peak = now
        peak = max(peak, now)
    older = sum(size for pointer, size in state.items() if pointer not in recorded)
    return PeakMemory(sum(state.values()), older + peak)


def _on_cuda(
    work: Callable[[], object],
    modules: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    others: Sequence[Tensor],
) -> PeakMemory:
    work()
    torch.cuda.synchronize()
    gc.collect()
    state = sum(_storages(state_tensors(modules, optimizers, others)).values())
    rest = torch.cuda.memory_allocated() - state  # inputs, and networks that take no part
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return PeakMemory(state, torch.cuda.max_memory_allocated() - rest)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the storages of tensors, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _walk(events: Iterable[Any]) -> Iterator[Any]:
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        yield event
        waiting += event.children


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Without the profiler's lines about starting and stopping on standard error."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
