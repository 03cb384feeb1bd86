"""``layer.weight``: the dense weight to read, and to initialise through."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddst
from ddst.nn import SparseLayer, spectral_norm
from helpers.dense import active_entries
from helpers.layers import weight_of

Make = Callable[[], SparseLayer]


def conv() -> SparseLayer:
    return ddst.SparseConv2d(11, 21, (3, 2), density=0.4, block=(8, 4), reserve=0.6)


def linear() -> SparseLayer:
    return ddst.SparseLinear(19, 37, density=0.4, block=(16, 8), reserve=0.6)


both = pytest.mark.parametrize("make", [conv, linear])


def active(layer: SparseLayer) -> Tensor:
    return active_entries(layer.slot_blocks, layer.weight_shape, layer.block)


@both
def test_it_reads_as_the_dense_weight(make: Make) -> None:
    layer = make()
    weight = layer.weight
    assert (tuple(weight.shape), weight.dtype, weight.device) == (
        layer.weight_shape,
        torch.float32,
        layer.values.device,
    )
    assert torch.equal(weight, weight_of(layer))
    assert type(weight + 0) is Tensor and type(weight.flip(0)) is Tensor and type(weight.clone()) is Tensor
    assert nn.init.calculate_gain("relu") * float(weight.norm()) > 0
    assert "weight" not in dict(layer.named_parameters()) and "weight" not in layer.state_dict()


@both
def test_it_is_differentiable(make: Make) -> None:
    layer = make()
    (layer.weight.square().sum() / 2).backward()
    torch.testing.assert_close(layer.values.grad, layer.values.detach())
    with torch.no_grad():
        assert not layer.weight.unpacked().requires_grad


def test_under_spectral_norm_it_is_what_the_layer_computes_with() -> None:
    layer = spectral_norm(ddst.SparseLinear(32, 32, bias=False, density=0.5)).eval()
    x = torch.randn(3, 32)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight), layer(x))


INITIALISERS: dict[str, Callable[[Tensor], Any]] = {
    "normal_": lambda w: nn.init.normal_(w, 5.0, 0.02),
    "uniform_": lambda w: nn.init.uniform_(w, 1.0, 2.0),
    "trunc_normal_": lambda w: nn.init.trunc_normal_(w, 1.0, 0.1),
    "constant_": lambda w: nn.init.constant_(w, 3.0),
    "ones_": nn.init.ones_,
    "zeros_": nn.init.zeros_,
    "xavier_uniform_": nn.init.xavier_uniform_,
    "xavier_normal_": nn.init.xavier_normal_,
    "kaiming_uniform_": nn.init.kaiming_uniform_,
    "kaiming_normal_": nn.init.kaiming_normal_,
    "orthogonal_": nn.init.orthogonal_,
    "dirac_": nn.init.dirac_,
    "sparse_": lambda w: nn.init.sparse_(w, 0.1),
    "eye_": nn.init.eye_,
}


@both
@pytest.mark.parametrize("name", INITIALISERS)
def test_every_initialiser_of_torch_takes_effect_at_active_blocks(make: Make, name: str) -> None:
    if (name in ("eye_", "sparse_") and make is conv) or (name == "dirac_" and make is linear):
        pytest.skip("not for weights of this shape")
    layer = make()
    parameter, slots = layer.values, layer.slot_blocks.clone()
    dense = torch.empty(layer.weight_shape)
    torch.manual_seed(5)
    INITIALISERS[name](dense)
    torch.manual_seed(5)
    INITIALISERS[name](layer.weight)
    assert torch.equal(weight_of(layer), dense * active(layer))
    assert layer.values is parameter and layer.values.grad_fn is None
    assert torch.equal(layer.slot_blocks, slots)
    assert not layer.values[layer.slot_blocks < 0].any()


def test_every_initialiser_that_torch_has_is_tried() -> None:
    known = {name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}
    assert known <= set(INITIALISERS)


WRITES: dict[str, Callable[[SparseLayer], Any]] = {
    "data.normal_": lambda layer: layer.weight.data.normal_(2.0, 0.1),
    "data.fill_": lambda layer: layer.weight.data.fill_(7.0),
    "detach().zero_": lambda layer: layer.weight.detach().zero_(),
    "copy_": lambda layer: torch.no_grad()(layer.weight.copy_)(torch.full(layer.weight_shape, 4.0)),
    "assignment to an index": lambda layer: layer.weight.data.__setitem__(0, 3.0),
    "data =": lambda layer: setattr(layer.weight, "data", torch.full(layer.weight_shape, 6.0)),
}


@both
@pytest.mark.parametrize("how", WRITES)
def test_writing_in_place_sets_the_active_blocks(make: Make, how: str) -> None:
    layer, plain = make(), make()
    plain.load_state_dict(layer.state_dict())
    torch.manual_seed(1)
    WRITES[how](layer)
    expected: Any = nn.Module()
    expected.weight, expected.weight_shape = nn.Parameter(weight_of(plain).detach()), plain.weight_shape
    torch.manual_seed(1)
    WRITES[how](expected)
    assert torch.equal(weight_of(layer), expected.weight * active(layer))
    assert not torch.equal(layer.values, plain.values)


@both
def test_writing_needs_no_grad_as_it_does_for_a_parameter(make: Make) -> None:
    layer = make()
    before = layer.values.detach().clone()
    for write in (lambda w: w.normal_(), lambda w: w.mul_(2), lambda w: w.__setitem__(0, 1.0)):
        with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
            write(layer.weight)
        with pytest.raises(RuntimeError):
            write(nn.Parameter(torch.ones(2, 2)))
    assert torch.equal(layer.values, before)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer.values, 2 * before)


@both
def test_a_copied_layers_weight_is_its_own(make: Make) -> None:
    layer = make()
    twin, before = copy.deepcopy(layer), layer.values.detach().clone()
    nn.init.constant_(twin.weight, 2.0)
    assert torch.equal(layer.values, before)
    assert torch.equal(weight_of(twin), 2.0 * active(twin))
    held = copy.deepcopy(layer.weight.detach())  # a plain copy: writing into it is nobody's business
    held.zero_()
    assert torch.equal(layer.values, before)


def test_apply_of_dcgans_weights_init() -> None:
    net = nn.Sequential(nn.Conv2d(64, 64, 4, 2, 1), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 4, 2, 1))
    ddst.sparsify(net, 0.4)

    def weights_init(module: nn.Module) -> None:
        if hasattr(module, "weight"):
            nn.init.normal_(module.weight, 5.0, 0.02)

    net.apply(weights_init)
    for layer in (net[0], net[2]):
        values = layer.values[layer.slot_blocks >= 0]
        assert abs(float(values.mean()) - 5) < 0.1
