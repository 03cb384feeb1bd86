"""SparseLinear against nn.Linear: constructor, forward, conversion, initialisation, repr."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import ddst
from helpers.dense import active_entries, block_norms, unpack_blocks
from helpers.layers import weight_of
from helpers.tolerances import assert_close


def twins(bias: bool = True, block: Any = (8, 4), density: float = 0.5) -> tuple[ddst.SparseLinear, nn.Linear]:
    """A sparse layer, and a dense one of the same arguments and weight, filled in by hand."""
    layer = ddst.SparseLinear(21, 34, bias, dtype=torch.float64, density=density, block=block)
    dense = nn.Linear(21, 34, bias, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(weight_of(layer))
        if dense.bias is not None:
            dense.bias.copy_(layer.bias)
    return layer, dense


def test_signature_is_that_of_linear_plus_density_and_block() -> None:
    ours = inspect.signature(ddst.SparseLinear.__init__).parameters
    theirs = inspect.signature(nn.Linear.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name
    assert {n: (p.default, p.kind) for n, p in ours.items() if n not in theirs} == {
        "density": (0.1, inspect.Parameter.KEYWORD_ONLY),
        "block": ((16, 16), inspect.Parameter.KEYWORD_ONLY),
        "reserve": (None, inspect.Parameter.KEYWORD_ONLY),
    }


def test_defaults_and_attributes() -> None:
    layer = ddst.SparseLinear(100, 70)
    assert (layer.in_features, layer.out_features, layer.weight_shape) == (100, 70, (70, 100))
    assert layer.block_mask.shape == (5, 7)
    assert layer.nnz == int(layer.block_mask.sum()) == 4  # 10 % of 35, to within a block
    assert layer.values.shape == (4, 16, 16)
    assert layer.bias.shape == (70,)
    assert layer.topology.dtype == torch.int32
    assert ddst.SparseLinear(8, 8, bias=False).bias is None
    assert ddst.SparseLinear(8, 8, dtype=torch.float64).values.dtype == torch.float64
    assert ddst.SparseLinear(64, 64, density=1e-9).nnz == 1
    assert ddst.SparseLinear(64, 64, density=1.0).density == 1.0
    assert ddst.SparseLinear(64, 64, block=32).block == (32, 32)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,), (2, 0, 4)], ids=str)
def test_forward_and_gradients_equal_the_dense_layer(lead: tuple[int, ...], bias: bool, backend: str) -> None:
    layer, dense = twins(bias)
    layer.backend = backend
    x = torch.randn(*lead, 21, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), dense(x)
    assert_close(y, expected, "output")
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    want = torch.autograd.grad(expected, [x, *dense.parameters()], upstream)
    assert_close(got[0], want[0], "gradient of input")
    masked = want[1] * active_entries(layer.block_mask, layer.weight_shape, layer.block)
    assert_close(unpack_blocks(got[1], layer.slot_blocks, layer.weight_shape), masked, "gradient of values")
    if bias:
        assert_close(got[2], want[2], "gradient of bias")


@pytest.mark.parametrize("bias", [True, False])
def test_to_dense_and_back(bias: bool) -> None:
    layer, twin = twins(bias)
    layer.eval()
    dense = layer.to_dense()
    assert type(dense) is nn.Linear
    assert not dense.training
    assert repr(dense) == repr(twin)
    assert torch.equal(dense.weight, twin.weight)
    x = torch.randn(3, 21, dtype=torch.float64)
    assert torch.equal(dense(x), twin(x))
    back = ddst.SparseLinear.from_dense(dense, block_mask=layer.block_mask, block=layer.block)
    assert torch.equal(back.values, layer.values)
    assert torch.equal(back(x), layer(x))
    assert not back.training
    full = ddst.SparseLinear.from_dense(twin, density=1.0, block=(3, 7))
    assert_close(full(x), twin(x), "density 1")


def test_from_dense_keeps_the_blocks_of_largest_norm() -> None:
    dense = nn.Linear(100, 90)
    layer = ddst.SparseLinear.from_dense(dense, density=0.25)
    norms = block_norms(dense.weight.detach(), (16, 16))
    assert layer.nnz == round(0.25 * norms.numel())
    assert norms[layer.block_mask].min() >= norms[~layer.block_mask].max()
    assert torch.equal(layer.dense_weight(), dense.weight * active_entries(layer.block_mask, (90, 100), (16, 16)))
    assert torch.equal(layer.bias, dense.bias)


@pytest.mark.parametrize(
    "module, options, error, named",
    [
        (nn.Conv2d(4, 4, 1), {}, TypeError, "module"),
        (nn.Bilinear(4, 4, 4), {}, TypeError, "module"),
        (nn.Linear(4, 4), {"density": 2.0}, ValueError, "density"),
        (nn.Linear(4, 4), {"block_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, ValueError, "block_mask"),
        (nn.Linear(4, 4), {"block": (0, 4)}, ValueError, "block"),
    ],
)
def test_from_dense_names_the_wrong_argument(
    module: nn.Module, options: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        ddst.SparseLinear.from_dense(module, **options)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"in_features": 0}, "in_features"),
        ({"out_features": -1}, "out_features"),
        ({"out_features": 4.0}, "out_features"),
        ({"density": 0}, "density"),
        ({"density": 1.5}, "density"),
        ({"density": float("nan")}, "density"),
        ({"block": 0}, "block"),
        ({"block": (65, 1)}, "block"),
        ({"block": "16x16"}, "block"),
    ],
    ids=str,
)
def test_constructor_names_the_wrong_argument(change: dict[str, Any], named: str) -> None:
    arguments: dict[str, Any] = {"in_features": 8, "out_features": 8, **change}
    with pytest.raises((ValueError, TypeError), match=named):
        ddst.SparseLinear(**arguments)


@pytest.mark.parametrize("shape", [(5, 20), (), (21, 5)])
def test_wrong_input_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises((ValueError, RuntimeError), match="input"):
        twins()[0](torch.zeros(shape, dtype=torch.float64))


def test_repr_shows_the_layer() -> None:
    text = repr(ddst.SparseLinear(100, 70, bias=False, block=(8, 4), density=0.5))
    for part in ("SparseLinear(", "in_features=100", "out_features=70", "bias=False", "density=0.5", "(8, 4)"):
        assert part in text
    assert "bias" not in repr(ddst.SparseLinear(100, 70))


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_weights_have_the_variance_of_a_dense_layer_of_the_connected_fan_in(density: float) -> None:
    torch.manual_seed(0)
    layer = ddst.SparseLinear(600, 330, density=density)
    weight = layer.dense_weight().detach()
    fan_in = active_entries(layer.block_mask, layer.weight_shape, layer.block).sum(1)
    assert (fan_in > 0).all()
    assert (weight.abs().amax(1) <= fan_in.rsqrt() * (1 + 1e-6)).all()
    for row, count in zip(weight.square().sum(1).split(16), fan_in.split(16), strict=True):
        assert row.mean().item() == pytest.approx(1 / 3, rel=5 * (0.8 / count.sum().item()) ** 0.5)
    assert (layer.bias.abs() <= fan_in.rsqrt() * (1 + 1e-6)).all()
    assert (layer.bias * fan_in.sqrt()).square().mean().item() == pytest.approx(1 / 3, rel=0.25)
