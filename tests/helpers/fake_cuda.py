"""A CUDA device that is not there: what asks for it gets the CPU, streams do nothing, and graphs are recorded.

A recorded graph runs its operators again, on the same tensors, as a captured CUDA graph does: nothing of Python is in
it. What waits for the device while a graph is recorded raises, as it does on a device.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ddst.kernels.launch import Launch

NAME = "NVIDIA Pretended"


class OnTheHost(TorchFunctionMode):
    """Makes on the CPU what is asked for on a CUDA device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        return func(*map(_moved, args), **{name: _moved(value) for name, value in (kwargs or {}).items()})


def _moved(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, _moved(device))


class Recorder(TorchDispatchMode):
    """Notes the operators that run, with the tensors that they read and write, and what they overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[place] if place < len(args) else kwargs.get(argument.name)
                self._before += [(t, t.detach().clone()) for t in tree_leaves(written) if isinstance(t, Tensor)]
        result = func(*args, **kwargs)
        if not func.is_view:
            self.steps.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def undo(self) -> None:
        """What is captured has not run: everything is as it was before."""
        for tensor, before in reversed(self._before):
            tensor.detach().copy_(before)
        self._before.clear()


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``. ``made``: all of them, in order."""

    made: ClassVar[list[Graph]] = []
    recording: ClassVar[Recorder | None] = None

    def __init__(self) -> None:
        self._recorder = Recorder()
        self.replays = 0
        Graph.made.append(self)

    def capture_begin(self, *_: Any, **__: Any) -> None:
        Graph.recording = self._recorder
        self._random = torch.get_rng_state()
        self._recorder.__enter__()

    def capture_end(self) -> None:
        Graph.recording = None
        self._recorder.__exit__(None, None, None)
        self._recorder.undo()
        torch.set_rng_state(self._random)

    @property
    def operators(self) -> list[str]:
        """Names of what a replay runs."""
        return [str(step[0]) for step in self._recorder.steps]

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, old in self._recorder.steps:
            given = {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            new = func(*args, **kwargs)
            for kept, fresh in zip(tree_leaves(old), tree_leaves(new), strict=True):
                if isinstance(kept, Tensor) and id(kept) not in given:
                    kept.detach().copy_(fresh)


def _launch(run: Any) -> Any:
    """A launch of one of Triton's kernels: one step of a graph, whatever its interpreter does."""

    def launch(self: Launch, *tensors: Any) -> None:
        trace = sys.gettrace()
        sys.settrace(None)  # the interpreter calls a thousand functions for each, which nobody asks for
        try:
            with _disable_current_modes():
                run(self, *tensors)
        finally:
            sys.settrace(trace)
        if Graph.recording is not None:
            Graph.recording.steps.append((partial(run, self), tensors, {}, None))

    return launch


class Event:
    """Every stretch of time takes ten milliseconds."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 10.0


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torch say that there is one such device."""
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, multi_processor_count=132, L2_cache_size=64, total_memory=2**37
    )
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    fakes: dict[str, Any] = {
        "is_available": lambda: True, "get_device_capability": lambda *_: (9, 0), "current_device": lambda: 0,
        "get_device_properties": lambda *_: properties, "get_device_name": lambda *_: NAME, "synchronize": nothing,
        "empty_cache": nothing, "reset_peak_memory_stats": nothing, "max_memory_allocated": lambda *_: 2**30,
        "Stream": lambda *_: stream, "current_stream": lambda *_: stream, "stream": lambda _: nullcontext(),
        "CUDAGraph": Graph, "Event": Event, "is_current_stream_capturing": lambda: Graph.recording is not None,
        "is_bf16_supported": lambda *_: True, "manual_seed_all": nothing, "device_count": lambda: 1,
        "graph_pool_handle": lambda: None, "set_rng_state": nothing,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "Generator", _Generator)
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *_, **__: ["cpu", "cuda"])
    monkeypatch.setattr(torch._C, "_host_emptyCache", nothing, raising=False)  # which a torch without CUDA lacks
    Graph.made, Graph.recording = [], None
    monkeypatch.setattr(Launch, "__call__", _launch(Launch.__call__))


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """:func:`pretend`, and what is made for the device is made on the CPU."""
    with monkeypatch.context() as patch:
        pretend(patch)
        with OnTheHost():
            yield


__all__ = ["NAME", "Event", "Graph", "OnTheHost", "Recorder", "pretend", "pretended"]
