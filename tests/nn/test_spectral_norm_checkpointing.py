"""Spectral norm under activation checkpointing: gradients and vectors are those of the same steps without it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddst.nn import SparseConv2d, SparseLinear, spectral_norm

Call = Callable[..., Tensor]


def network(noise: float, style: str = "hook") -> nn.Sequential:
    """Two layers with edge blocks; dropout needs the random numbers of the first forward pass in the second."""
    options: dict[str, Any] = {"density": 0.6, "block": 8, "dtype": torch.float64}
    first = spectral_norm(SparseConv2d(6, 12, 3, padding=1, **options), noise=noise, style=style)
    last = spectral_norm(SparseLinear(12 * 16, 5, **options), noise=noise, style=style)
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), last)


def images(factor: float) -> Tensor:
    return factor * torch.linspace(-1, 1, 2 * 6 * 16, dtype=torch.float64).sin().view(2, 6, 4, 4).requires_grad_()


def both_at_once(net: nn.Module, call: Call) -> None:
    (call(net, images(1.0)) - 2 * call(net, images(3.0))).square().sum().backward()


def first_then_second(net: nn.Module, call: Call) -> None:
    ys = [call(net, images(factor)) for factor in (1.0, 3.0)]
    for y in ys:
        y.square().sum().backward()


def second_then_first(net: nn.Module, call: Call) -> None:
    ys = [call(net, images(factor)) for factor in (1.0, 3.0)]
    for y in reversed(ys):
        y.square().sum().backward()


def unused_in_between(net: nn.Module, call: Call) -> None:
    y = call(net, images(1.0))
    with torch.no_grad():
        call(net, images(2.0))
    call(net, images(3.0))
    y.square().sum().backward()


def twice_in_one_segment(net: nn.Module, call: Call) -> None:
    def twice(x: Tensor) -> Tensor:
        return net(x) * net(2 * x)

    call(twice, images(1.0)).sum().backward()


def nested(net: nn.Module, call: Call) -> None:
    def outer(x: Tensor) -> Tensor:
        return call(net, x) + call(net, 2 * x)

    (call(outer, images(1.0)) - call(net, images(3.0))).square().sum().backward()


def kept_graph(net: nn.Module, call: Call) -> None:
    loss = call(net, images(1.0)).square().sum()
    loss.backward(retain_graph=True)
    net(images(3.0))
    loss.backward()


STEPS = [
    both_at_once,
    first_then_second,
    second_then_first,
    unused_in_between,
    twice_in_one_segment,
    nested,
    kept_graph,
]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("step", STEPS)
def test_equals_the_step_without(step: Callable[[nn.Module, Call], None], noise: float, reentrant: bool) -> None:
    plain = network(noise, "hook" if reentrant else "parametrization")
    found = []
    for call in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        net = copy.deepcopy(plain)
        net[2].p = 0.0  # the two draw differently: masks of dropout would differ
        for _ in range(2):  # a second step, with other weights
            net.zero_grad()
            step(net, call)
            torch.optim.SGD(net.parameters(), 0.01).step()
        found.append(({n: p.grad for n, p in net.named_parameters()}, dict(net.named_buffers())))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_after_it_repeats(reentrant: bool) -> None:
    net = network(0.05)
    seen = []
    net[2].register_forward_hook(lambda module, inputs, output: seen.append(output.detach() == 0))
    checkpoint(net, images(1.0), use_reentrant=reentrant).sum().backward()
    assert len(seen) == 2 and torch.equal(*seen)


@pytest.mark.parametrize("reentrant", [False, True])
def test_without_the_random_state_the_present_vectors_are_used_with_a_warning(reentrant: bool) -> None:
    plain = network(0.05)
    plain[2].p = 0.0
    net = copy.deepcopy(plain)
    plain(images(1.0)).square().sum().backward()
    y = checkpoint(net, images(1.0), use_reentrant=reentrant, preserve_rng_state=False)
    with pytest.warns(UserWarning, match="preserve_rng_state=True"):
        y.square().sum().backward()
    # One forward pass before the backward pass: the present vectors are the right ones.
    torch.testing.assert_close(net[0].values.grad, plain[0].values.grad)
    torch.testing.assert_close(net[0].spectral_norm.u, plain[0].spectral_norm.u)


def test_a_plain_training_step_draws_nothing_and_keeps_nothing() -> None:
    net = network(0.05)
    net[2].p = 0.0
    before = torch.get_rng_state()
    net(images(1.0)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert not net[0].spectral_norm._calls._results


def test_results_are_let_go_and_do_not_travel() -> None:
    net = network(0.05)
    calls = net[0].spectral_norm._calls
    with torch.no_grad():
        for _ in range(70):
            net[0](images(1.0))
        assert len(calls._results) == 64
        net[0].values.add_(1.0)
        net[0](images(1.0))
        assert len(calls._results) == 1
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not twin[0].spectral_norm._calls._results
    with torch.inference_mode():
        copy.deepcopy(net)(images(1.0))


@pytest.mark.parametrize("style", ["hook", "parametrization"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_what_lies_outside_the_weight_does_not_count(noise: float, style: str) -> None:
    clean = spectral_norm(SparseConv2d(6, 12, 3, padding=1, density=1.0, block=8), noise=noise, style=style)
    filled = copy.deepcopy(clean)
    with torch.no_grad():
        outside = torch.ones_like(clean.values, dtype=torch.bool)
        outside[:, :, :6] = False
        filled.values[outside] = 9.0
    x = images(1.0).float()
    for _ in range(3):
        torch.testing.assert_close(filled(x), clean(x))
    torch.testing.assert_close(filled.spectral_norm.u, clean.spectral_norm.u)
    assert torch.equal(filled.block_norms(), clean.block_norms())
