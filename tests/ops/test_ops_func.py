"""Transforms of torch.func through sparse layers: the derivatives of the dense layer, nested ones too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import ddst
from ddst.nn import SparseLayer
from ddst.topology import unpack_slots

# vmap has no rule for the operators, and loops.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def by_reference(layer: SparseLayer) -> SparseLayer:
    layer.backend = "reference"
    return layer


LAYERS = pytest.mark.parametrize(
    "layer, shape",
    [
        (ddst.SparseLinear(6, 10, density=0.5, block=4), (2, 6)),
        (by_reference(ddst.SparseLinear(6, 10, density=0.5, block=4)), (2, 6)),
        (ddst.SparseConv2d(4, 6, 3, padding=1, density=0.5, block=4), (2, 4, 3, 3)),
    ],
    ids=["linear", "linear-reference", "conv2d"],
)
Function = Callable[[Tensor], Tensor]


def number(layer: Any) -> Function:
    return lambda x: layer(x).sin().sum()


TRANSFORMS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "grad": lambda f, x, t: grad(number(f))(x),
    "vjp": lambda f, x, t: vjp(f, x)[1](f(x).cos())[0],
    "jvp": lambda f, x, t: jvp(f, (x,), (t,)),
    "jacrev": lambda f, x, t: jacrev(f)(x),
    "jacfwd": lambda f, x, t: jacfwd(f)(x),
    "hessian": lambda f, x, t: hessian(number(f))(x),
    "jacrev of jacrev": lambda f, x, t: jacrev(jacrev(number(f)))(x),
    "jacfwd of jacfwd": lambda f, x, t: jacfwd(jacfwd(number(f)))(x),
    "grad of grad": lambda f, x, t: grad(lambda y: grad(number(f))(y).square().sum())(x),
    "grad of jvp": lambda f, x, t: grad(lambda y: jvp(f, (y,), (t,))[1].square().sum() + number(f)(y))(x),
    "grad of vmap": lambda f, x, t: grad(lambda y: vmap(lambda s: number(f)(s[None]))(y).sum())(x),
    "vmap of grad": lambda f, x, t: vmap(lambda s: grad(number(f))(s[None]))(x),
    "without gradients outside": lambda f, x, t: torch.no_grad()(grad(number(f)))(x),
}


@LAYERS
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_those_of_the_dense_layer(
    transform: Callable[[Any, Tensor, Tensor], Any], layer: SparseLayer, shape: tuple[int, ...]
) -> None:
    layer = layer.double()
    x, tangent = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(transform(layer, x, tangent), transform(layer.to_dense(), x, tangent))


@LAYERS
def test_ordinary_gradients_of_a_transform(layer: SparseLayer, shape: tuple[int, ...]) -> None:
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    got, expected = (torch.autograd.grad(grad(number(f))(x).square().sum(), x) for f in (layer, layer.to_dense()))
    torch.testing.assert_close(got, expected)


@LAYERS
def test_parameters_by_functional_call(layer: SparseLayer, shape: tuple[int, ...]) -> None:
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)

    def of(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
        held = {name: p.detach() for name, p in net.named_parameters()}

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(net, parameters, (x,)).sin().sum()

        return held, grad(loss)(held, x), loss

    (held, got, loss), (_, expected, _) = of(layer), of(layer.to_dense())
    torch.testing.assert_close(got["bias"], expected["bias"])
    active = unpack_slots(torch.ones_like(layer.values), layer.slot_blocks, layer.weight_shape)
    dense = unpack_slots(got["values"], layer.slot_blocks, layer.weight_shape)
    torch.testing.assert_close(dense, expected["weight"] * active)
    # Of second order: a product with the Hessian along values, by finite differences.
    along = torch.randn_like(held["values"]) * (got["values"] != 0)

    def slope(distance: float) -> Tensor:
        return grad(loss)({**held, "values": held["values"] + distance * along}, x)["values"]

    _, product = jvp(lambda values: grad(loss)({**held, "values": values}, x)["values"], (held["values"],), (along,))
    torch.testing.assert_close(product, (slope(1e-5) - slope(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)


def network(backend: str = "auto") -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8))
    ddst.sparsify(net, 0.5, block=4, backend=backend)
    return net


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(net, parameters, (x,)).square().sum()

    return grad(loss)({name: p.detach() for name, p in net.named_parameters()})


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_growth_scores_come_from_transforms_too(backend: str) -> None:
    net = network(backend)
    twin = copy.deepcopy(net)
    before = net[0].block_mask
    for model in (net, twin):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        training = ddst.SparseTraining(model, optimizer, total_steps=20, interval=3)
        for step in range(7):
            x = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            if model is net:
                for name, gradient in gradients(model, x).items():
                    model.get_parameter(name).grad = gradient
            else:
                model(x).square().sum().backward()
            optimizer.step()
            training.step()
    assert not torch.equal(net[0].block_mask, before)
    for name, entry in twin.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], entry, msg=name)


def test_compiled() -> None:
    net, x = network(), torch.randn(2, 4, 3, 3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gradients(net, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), gradients(net, x))


def test_a_copy_that_was_called_with_other_parameters_first_is_still_found_to_train() -> None:
    net, x = network(), torch.randn(2, 4, 3, 3)
    own = copy.deepcopy(net)
    gradients(own, x)
    own(x).sum().backward()
    for layer in (net[0], net[3]):
        layer.set_block_mask(~layer.block_mask)
    with torch.no_grad():
        own[0].values.add_(1)
    own(x)  # a model of its own, no average


def test_spectral_norm_in_evaluation_mode() -> None:
    """A limit in docs/layers.md: in training mode it writes its vectors, which torch refuses inside a transform."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)))
    ddst.sparsify(net, 0.5, block=4)
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="in-place"):
        gradients(net, x)
    got = gradients(net.eval(), x)
    net(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)
