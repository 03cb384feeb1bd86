"""However a step is computed, the same blocks move as in the plain one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ddst
from ddst.nn import sparse_layers

Forward = Callable[[nn.Module], Callable[[Tensor], Tensor]]


def masks(wrap: Forward, norm: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """The masks before and after two exchanges, with the model called as ``wrap`` says."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 64))
    if norm:
        nn.utils.parametrizations.spectral_norm(net[0])
    ddst.sparsify(net, 0.4, distribution="uniform")
    first = [layer.block_mask for layer in sparse_layers(net).values()]
    assert len(first) == 2
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    training = ddst.SparseTraining(net, optimizer, total_steps=40, interval=4)
    forward, data = wrap(net), torch.Generator().manual_seed(1)
    for _ in range(10):
        optimizer.zero_grad()
        x = torch.randn(4, 16, 4, 4, generator=data)
        (forward(x) - 1).square().mean().backward()
        optimizer.step()
        training.step()
    return first, [layer.block_mask for layer in sparse_layers(net).values()]


@contextlib.contextmanager
def _copies():
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        yield


def with_hooks(net: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with _copies():
            return net(x)

    return forward


def with_checkpoints(reentrant: bool) -> Forward:
    return lambda net: lambda x: checkpoint(net, x.requires_grad_(), use_reentrant=reentrant)


WAYS: dict[str, Forward] = {
    "hooks that copy what is saved": with_hooks,
    "checkpointing": with_checkpoints(False),
    "reentrant checkpointing": with_checkpoints(True),
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_blocks_move(way: str, norm: bool) -> None:
    first, plain = masks(lambda net: net, norm)
    assert not any(torch.equal(a, b) for a, b in zip(first, plain, strict=True))
    for expected, got in zip(plain, masks(WAYS[way], norm)[1], strict=True):
        assert torch.equal(got, expected)


def test_the_same_blocks_move_compiled_and_two_graphs_are_enough() -> None:
    """One graph without scores and one with them: an exchange at an equal count makes no new one."""
    _, plain = masks(lambda net: net)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        _, compiled = masks(lambda net: torch.compile(net, fullgraph=True, backend="aot_eager"))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    finally:
        torch._dynamo.reset()
    for expected, got in zip(plain, compiled, strict=True):
        assert torch.equal(got, expected)
    assert graphs == 2
