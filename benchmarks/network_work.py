"""What a network's step is made of: weights, multiply-adds, the share of time they take, and which run sparse."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ddst.measure import Clock
from ddst.models.registry import Inputs, train_step
from ddst.nn import sparse_layers


def weight_count(network: nn.Module) -> int:
    """Numbers that activations are multiplied by: matrices and kernels, not embeddings, norms, learnt inputs (`const`).

    >>> weight_count(nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.Embedding(5, 5)))
    296
    """
    tables = {id(p) for m in network.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return sum(
        p.numel()
        for name, p in network.named_parameters()
        # A column is the norms of a weight's rows, which weight norm keeps beside its directions.
        if p.dim() > 1 and p.numel() > len(p) and id(p) not in tables and name.rpartition(".")[2] != "const"
    )


def forward_macs(network: nn.Module, inputs: Inputs) -> int:
    """Multiply-adds of a forward pass, of a sparse layer those of active blocks. Each gradient pass has as many.

    >>> import torch
    >>> forward_macs(nn.Linear(8, 4), (torch.zeros(3, 8),))
    96
    """
    # torch's formula for the weight gradient of a grouped convolution counts every group as often as there are groups.
    with FlopCounterMode(display=False) as counted:
        network(*inputs)
    return counted.get_total_flops() // 2


class _Called(TorchDispatchMode):
    """Calls ``seen`` before every operator and ``done`` after it."""

    def __init__(self, seen: Callable[[Any, tuple[Any, ...]], None], done: Callable[[Any], None]) -> None:
        super().__init__()
        self.seen, self.done = seen, done

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen(func, args)
        result = func(*args, **(kwargs or {}))
        self.done(func)
        return result


def layers_on_sparse_operators(network: nn.Module, inputs: Inputs) -> set[str]:
    """Names of the sparse layers whose blocks an operator of ddst was called with in a forward pass."""
    topologies: set[int] = set()

    def note(func: Any, args: tuple[Any, ...]) -> None:
        names = [argument.name for argument in func._schema.arguments]
        if "topology" in names:  # no operator of torch has one
            topologies.add(args[names.index("topology")].data_ptr())

    with _Called(note, lambda func: None):
        network(*inputs)
    layers = sparse_layers(network).items()
    return {name for name, layer in layers if topologies & {vector.data_ptr() for vector in layer.topologies}}


def multiplying_share(network: nn.Module, inputs: Inputs, repeats: int, clock: Clock = time.perf_counter) -> float:
    """The share of a training step's time that convolutions and matrix products take: median of some steps.

    What watching costs, some microseconds an operator, counts as the rest.
    """
    spent = started = 0.0

    def start(func: Any, args: tuple[Any, ...]) -> None:
        nonlocal started
        started = clock()

    def stop(func: Any) -> None:
        nonlocal spent
        if func._overloadpacket in flop_registry:
            spent += clock() - started

    shares = []
    for _ in range(repeats + 1):
        spent, begun = 0.0, clock()
        with _Called(start, stop):
            train_step(network, inputs)
        shares.append(spent / (clock() - begun))
    return statistics.median(shares[1:])  # the first step warms up


def floor(share: float, left: float) -> float:
    """``1 / (1 − share + share · left)``: the speed-up of a step that spends `share` of its time on multiply-adds,
    when `left` of them are left and take as long, each, as before.

    >>> floor(0.9, 0.2)
    3.571...
    """
    return 1 / (1 - share + share * left)
