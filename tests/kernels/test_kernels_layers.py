"""The Triton kernels under everything above them: operators with derivatives, layers, a step of a GAN.

The CPU's dispatch key is served by what serves CUDA tensors (ddst/ops/cuda/dispatch.py), for the length of a test.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from triton.runtime import interpreter

from ddst import SparseConv2d, SparseLinear, backends, kernels
from ddst.gan import DDST
from ddst.nn import set_backend, sparse_layers, spectral_norm
from ddst.ops import conv2d
from ddst.ops.cuda import dispatch
from helpers.problems import ConvProblem
from helpers.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

OPERATORS = [
    f"{kind}{what}" for kind in ("conv2d", "linear") for what in ("", "_input_grad", "_weight_grad", "_block_scores")
]


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the operators that ran on Triton kernels so far."""
    ran: list[str] = []
    library = torch.library.Library("ddst", "IMPL")

    def serve(name: str) -> None:
        kernel = getattr(dispatch, name)

        def counted(*arguments: object) -> torch.Tensor:
            ran.append(name)
            return kernel(*arguments)

        library.impl(name, counted, "CPU", allow_override=True)

    for name in OPERATORS:
        serve(name)
    monkeypatch.setitem(backends._supports, "cpu", lambda problem: (True, "stands in for a CUDA device"))
    yield ran
    library._destroy()


@pytest.mark.usefixtures("poison_outputs")
@pytest.mark.parametrize("channels_last", [False, True])
def test_first_and_second_derivatives_are_those_of_the_dense_layer(on_triton: list[str], channels_last: bool) -> None:
    problem = ConvProblem(channels=(20, 40), block=(16, 16), stride=(2, 1), layout="channels_last")
    if not channels_last:
        problem = ConvProblem(channels=(20, 40), block=(16, 16), stride=(2, 1))
    case = problem.build(torch.float32)
    assert case.bias is not None

    def derivatives(sparse: bool) -> list[torch.Tensor]:
        dtype = torch.float32 if sparse else torch.float64
        x, values, bias = (t.detach().to(dtype).requires_grad_() for t in (case.x, case.values, case.bias))
        if sparse:
            y = conv2d(x, values, bias, case.topology, case.weight_shape, **case.kwargs)
            assert y.is_contiguous(memory_format=torch.channels_last) == channels_last
        else:
            y = case.dense(x, values, bias)
        first = torch.autograd.grad(y, (x, values, bias), case.grad.to(dtype), create_graph=True)
        penalty = first[0].square().sum() + first[1].square().sum()
        return [y, *first, *torch.autograd.grad(penalty, (x, values))]

    for i, (ours, expected) in enumerate(zip(derivatives(True), derivatives(False), strict=True)):
        assert_close(ours.detach(), expected, f"result {i}")
    assert set(on_triton) == {"conv2d", "conv2d_input_grad", "conv2d_weight_grad"}


def gan() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    options = {"density": 0.5, "block": 16}
    generator = nn.Sequential(
        SparseLinear(16, 32 * 4, **options),
        nn.Unflatten(1, (32, 2, 2)),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        SparseConv2d(32, 16, 3, padding=1, **options),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        SparseConv2d(16, 32, 4, stride=2, padding=1, **options),
        nn.ReLU(),
        nn.Flatten(),
        spectral_norm(SparseLinear(32 * 4, 16, **options), noise=0.0),  # does not settle, which would take a minute
    )
    return generator, discriminator


def train(generator: nn.Module, discriminator: nn.Module) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and masks of a few steps of DDST in which blocks move in both networks."""
    adams = [torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.9)) for net in (generator, discriminator)]
    scheduler = DDST(
        generator, discriminator, *adams, total_steps=3, mode="strict", method="rigl", interval_g=1, interval_d=1,
        bounds=(-2.0, -1.0), delta=0.1, br_every=1, br_window=1, warmup=0, seed=0,
    )  # fmt: skip
    numbers = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(2):
        real, noise = torch.randn(3, 16, 4, 4, generator=numbers), torch.randn(3, 16, generator=numbers)
        loss_d = torch.relu(1 - discriminator(real)).mean() + torch.relu(1 + discriminator(generator(noise))).mean()
        adams[1].zero_grad()
        loss_d.backward()
        adams[1].step()
        scores = discriminator(generator(noise))
        adams[0].zero_grad()
        (-scores.mean()).backward()
        adams[0].step()
        losses += [loss_d.item(), -scores.mean().item()]
        scheduler.step(real=real, noise=noise, fake_scores=scores.detach())
    layers = [*sparse_layers(generator).values(), *sparse_layers(discriminator).values()]
    return losses, [layer.block_mask.clone() for layer in layers]


def test_training_is_that_of_the_reference(on_triton: list[str]) -> None:
    networks = gan()
    twins = copy.deepcopy(networks)
    before = [layer.block_mask.clone() for net in networks for layer in sparse_layers(net).values()]
    losses, masks = train(*networks)
    assert set(on_triton) == set(OPERATORS)
    on_triton.clear()
    for net in twins:
        set_backend(net, "reference")
    expected_losses, expected_masks = train(*twins)
    assert on_triton == []
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(masks, expected_masks, strict=True))
    assert not all(torch.equal(ours, old) for ours, old in zip(masks, before, strict=True))


@pytest.mark.parametrize("stride, padding, dilation", [(1, 1, 1), (2, 1, 1), (3, 2, 2)])
def test_no_result_hangs_on_what_versions_of_triton_do_otherwise(
    on_triton: list[str], monkeypatch: pytest.MonkeyPatch, stride: int, padding: int, dilation: int
) -> None:
    """Quotients below zero may be rounded down or towards zero, and there is no maximum or minimum of floating-point
    numbers, in which a NaN may win or lose (docs/notes/triton.md).
    """
    layer = SparseConv2d(40, 24, 3, stride, padding, dilation, density=0.5, block=(16, 16))
    x = torch.randn(2, 40, 9, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    shape = (24, 40, 3, 3)

    def results() -> list[torch.Tensor]:
        y = layer(x)
        gradients = torch.autograd.grad(y.square().sum(), (x, layer.values))
        settings = ((stride,) * 2, (padding,) * 2, (dilation,) * 2)
        scores = kernels.conv2d_block_scores(y.detach(), x.detach(), shape, (16, 16), *settings)
        return [y.detach(), *gradients, scores]

    before = results()
    rounded: list[object] = []

    def divide_down(self: object, lhs: interpreter.TensorHandle, rhs: interpreter.TensorHandle) -> object:
        rounded.append(np.floor_divide(lhs.data, rhs.data))
        return interpreter.TensorHandle(rounded[-1], lhs.dtype.scalar)

    def remain_down(self: object, lhs: interpreter.TensorHandle, rhs: interpreter.TensorHandle) -> object:
        return interpreter.TensorHandle(np.mod(lhs.data, rhs.data), lhs.dtype.scalar)

    def refuse(*arguments: object, **settings: object) -> object:
        raise AssertionError("a maximum or minimum of floating-point numbers")

    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_idiv", divide_down)
    monkeypatch.setattr(builder, "create_srem", remain_down)
    for name in ("create_maximumf", "create_maxnumf", "create_minimumf", "create_minnumf"):
        monkeypatch.setattr(builder, name, refuse)
    monkeypatch.setattr(interpreter.ReduceOps, "min_max", refuse)
    on_triton.clear()
    after = results()
    assert set(on_triton) == {"conv2d", "conv2d_input_grad", "conv2d_weight_grad"}
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert rounded, "no quotient was taken"
