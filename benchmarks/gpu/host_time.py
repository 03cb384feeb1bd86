"""What a call costs the host, in microseconds: many calls in a row on tensors so small that the device keeps up."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import ddst
from ddst.benchmarks.gpu import calls
from ddst.benchmarks.gpu.problems import Shape, Tensors
from ddst.measure import clock_of

SMALL = Shape("small", blocks=(2, 2), batch=2, size=(8, 8), mask="0.5")


def measure(device: str, number: int = 400, rounds: int = 7, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """The part "host": backend -> call -> seconds, and the same of dense torch.

    Each figure is the median over some rounds of the mean of ``number`` calls between two looks at the clock, the
    device's work not waited for. "layer" is ``ddst.SparseConv2d`` under ``torch.no_grad``, "step" its forward and
    backward pass.
    """
    tensors = Tensors.make(SMALL, (32, 32), dtype, device, 0)
    layer = ddst.SparseConv2d(64, 64, 3, padding=1, density=0.5, block=(32, 32), device=device, dtype=dtype)
    dense = torch.nn.Conv2d(64, 64, 3, padding=1, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    x = tensors.input.detach().clone(memory_format=torch.channels_last)
    weight = dense.weight.detach()
    plain: dict[str, Callable[[], object]] = {
        "forward": lambda: F.conv2d(x, weight, None, 1, 1),
        "layer": lambda: dense(x),
        "step": lambda: _step(dense, x),
    }
    found: dict[str, dict[str, float]] = {
        "dense": {name: _seconds(w, device, number, rounds) for name, w in plain.items()}
    }
    for backend, reason in calls.usable(device, dtype, (32, 32)).items():
        if reason is not None:
            continue
        layer.backend = backend
        works: dict[str, Callable[[], object]] = {
            op: calls.bound(*tensors.arguments(op), backend) for op in ("forward", "dgrad", "wgrad")
        }
        works |= {"layer": lambda: layer(x), "step": lambda: _step(layer, x)}
        found[backend] = {name: _seconds(work, device, number, rounds) for name, work in works.items()}
    return {"seconds": found, "wrong": []}


def _step(layer: torch.nn.Module, x: torch.Tensor) -> None:
    layer.zero_grad()
    with torch.enable_grad():
        layer(x).sum().backward()


def _seconds(work: Callable[[], object], device: str, number: int, rounds: int) -> float:
    done = clock_of(device)
    samples = []
    with torch.no_grad():
        for _ in range(20):
            work()
        for _ in range(rounds):
            done()  # nothing is waiting on the device
            start = clock_of("cpu")()
            for _ in range(number):
                work()
            samples.append((clock_of("cpu")() - start) / number)
    return statistics.median(samples)
