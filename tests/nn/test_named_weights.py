"""Penalties that flatten parameters to rows, on the weights of a sparse model in their dense shapes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddst
from ddst import topology as tp
from ddst.nn import PackedWeight, SparseLayer
from ddst.nn.packed.parameter import HoldsPackedParameters
from helpers.packed_uses import Own


def network() -> nn.Sequential:
    torch.manual_seed(0)
    inner = Own((32, 32, 3, 3), lambda m, x: F.conv2d(x, m.weight * 0.1, padding=1)).float()
    return nn.Sequential(
        nn.Conv2d(32, 32, 3, padding=1), inner, nn.utils.spectral_norm(nn.Conv2d(32, 64, 1)), nn.Flatten(),
        nn.Linear(64 * 16, 32), nn.Linear(32, 3),
    )  # fmt: skip


def orthogonal(model: nn.Module) -> torch.Tensor:
    """What BigGAN's code bases add to a loss: products of rows with other rows."""
    total = torch.zeros(())
    for _, weight in ddst.named_weights(model):
        rows = weight.view(weight.shape[0], -1)
        total = total + ((rows @ rows.t()) * (1 - torch.eye(len(rows)))).square().sum()
    return total


def test_a_penalty_on_rows_is_that_of_the_dense_model() -> None:
    model = network()
    ddst.sparsify(model, 0.4, sample=torch.randn(2, 32, 4, 4))
    assert isinstance(model[1], HoldsPackedParameters) and isinstance(model[2], SparseLayer)
    dense = ddst.densify(copy.deepcopy(model))
    assert [n for n, _ in ddst.named_weights(model)] == ["0.weight", "1.weight", "2.weight", "4.weight", "5.weight"]
    for (_, mine), (_, theirs) in zip(ddst.named_weights(model), ddst.named_weights(dense), strict=True):
        assert mine.shape == theirs.shape and isinstance(theirs, nn.Parameter)
    assert isinstance(dict(ddst.named_weights(model))["1.weight"], PackedWeight)
    found, expected = orthogonal(model), orthogonal(dense)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    layer = model[1].packed_weight
    wanted = tp.pack_slots(dense[1].weight.grad, layer.slot_blocks, layer.block)
    torch.testing.assert_close(layer.values.grad, wanted)


def test_gradients_are_changed_by_name() -> None:
    """The other form of it: the gradient of the penalty is added to the gradients, without a graph."""
    layer = ddst.SparseLinear(32, 16, density=0.5)
    layer(torch.ones(1, 32)).sum().backward()
    assert layer.values.grad is not None
    before = layer.values.grad.clone()
    with torch.no_grad():
        for name, weight in ddst.named_weights(layer):
            assert name == "weight"
            rows = weight.view(weight.shape[0], -1)
            added = 2 * torch.mm(torch.mm(rows, rows.t()) * (1 - torch.eye(16)), rows)
            assert weight.grad is not None
            weight.grad.data += 0.1 * added.view(weight.shape)
    wanted = tp.pack_slots(0.1 * added, layer.slot_blocks, layer.block)
    torch.testing.assert_close(layer.values.grad, before + wanted)


def test_under_a_norm_it_is_what_is_trained() -> None:
    layer = ddst.nn.weight_norm(ddst.SparseLinear(32, 16, density=0.5))
    with torch.no_grad():
        layer.weight_norm.g.mul_(3)
    found = dict(ddst.named_weights(layer))["weight"]
    assert isinstance(found, PackedWeight)
    expected = tp.unpack_slots(layer.values, layer.slot_blocks, layer.weight_shape)
    torch.testing.assert_close(found.unpacked(), expected)
    assert not torch.allclose(found.unpacked(), layer.weight.unpacked())


def test_what_is_no_module_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="model must be"):
        ddst.named_weights("x")
