"""SparseConv2d against nn.Conv2d: constructor, forward over its options, conversion, initialisation, repr."""

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

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "bias": False},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": (3, 5), "padding": "valid", "dilation": (2, 1)},
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2},
    {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
    {"kernel_size": (4, 3), "padding": "same", "padding_mode": "reflect", "bias": False},
]


def twins(geometry: dict[str, Any], block: Any = (8, 4), density: float = 0.5) -> tuple[ddst.SparseConv2d, nn.Conv2d]:
    """A sparse layer, and a dense one of the same arguments and weight, filled in by hand."""
    layer = ddst.SparseConv2d(9, 20, **geometry, density=density, block=block, dtype=torch.float64)
    dense = nn.Conv2d(9, 20, **geometry, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(weight_of(layer))
        if dense.bias is not None:
            dense.bias.copy_(layer.bias)
    return layer, dense


def test_signature_is_that_of_conv2d_plus_density_and_block() -> None:
    ours = inspect.signature(ddst.SparseConv2d.__init__).parameters
    theirs = inspect.signature(nn.Conv2d.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name
    assert {n: (p.default, p.kind) for n, p in ours.items() if n not in theirs} == {
        "density": (0.1, inspect.Parameter.KEYWORD_ONLY),
        "block": ((16, 16), inspect.Parameter.KEYWORD_ONLY),
        "reserve": (None, inspect.Parameter.KEYWORD_ONLY),
    }


def test_defaults_and_attributes() -> None:
    layer = ddst.SparseConv2d(64, 48, 3)
    assert layer.weight_shape == (48, 64, 3, 3)
    assert layer.block == (16, 16)
    assert layer.block_mask.shape == (3, 4, 3, 3)
    assert layer.block_mask.dtype == torch.bool
    assert layer.num_blocks == 108
    assert layer.nnz == int(layer.block_mask.sum()) == 11  # 10 % of 108, to within a block
    assert layer.values.shape == (11, 16, 16)
    assert layer.values.dtype == torch.get_default_dtype()
    assert isinstance(layer.values, nn.Parameter)
    assert layer.bias.shape == (48,)
    assert layer.density == pytest.approx(11 / 108)
    assert (layer.stride, layer.padding, layer.dilation) == ((1, 1), (0, 0), (1, 1))
    assert layer.topology.dtype == torch.int32
    assert layer.spectral_norm is None
    assert not layer.scores_requested
    assert ddst.SparseConv2d(8, 8, 3, bias=False).bias is None
    assert sum(1 for _ in layer.parameters()) == 2


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_forward_and_gradients_equal_the_dense_layer(geometry: dict[str, Any], backend: str) -> None:
    layer, dense = twins(geometry)
    layer.backend = backend
    x = torch.randn(2, 9, 7, 8, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), dense(x)
    assert_close(y, expected, "output")
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    want = torch.autograd.grad(expected, [x, *dense.parameters()], upstream)
    assert_close(got[0], want[0], "gradient of input")
    masked = want[1] * active_entries(layer.block_mask, layer.weight_shape, layer.block)
    assert_close(unpack_blocks(got[1], layer.slot_blocks, layer.weight_shape), masked, "gradient of values")
    if dense.bias is not None:
        assert_close(got[2], want[2], "gradient of bias")


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_unbatched_input_and_empty_batch_as_in_torch(geometry: dict[str, Any]) -> None:
    layer, dense = twins(geometry)
    x = torch.randn(9, 7, 8, dtype=torch.float64)
    assert_close(layer(x), dense(x), "unbatched output")
    if geometry.get("padding_mode", "zeros") == "zeros":  # torch's F.pad refuses an empty batch in other modes
        empty = torch.zeros(0, 9, 7, 8, dtype=torch.float64, requires_grad=True)
        y = layer(empty)
        assert y.shape == dense(empty).shape
        y.sum().backward()
        assert layer.values.grad is not None
        assert not layer.values.grad.any()
        assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_of_the_output_is_that_of_conv2d(
    geometry: dict[str, Any], memory_format: torch.memory_format
) -> None:
    layer, dense = twins(geometry)
    x = torch.randn(2, 9, 7, 8, dtype=torch.float64).to(memory_format=memory_format)
    y, expected = layer(x), dense(x)
    for wanted in (torch.contiguous_format, torch.channels_last):
        assert y.is_contiguous(memory_format=wanted) == expected.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_to_dense_and_back(geometry: dict[str, Any]) -> None:
    layer, twin = twins(geometry)
    layer.eval()
    dense = layer.to_dense()
    assert type(dense) is nn.Conv2d
    assert not dense.training
    assert repr(dense) == repr(twin)
    assert torch.equal(dense.weight, twin.weight)
    x = torch.randn(2, 9, 7, 8, dtype=torch.float64)
    assert torch.equal(dense(x), twin(x))
    back = ddst.SparseConv2d.from_dense(dense, block_mask=layer.block_mask, block=layer.block)
    assert not back.training
    assert torch.equal(back.values, layer.values)
    assert torch.equal(back.block_mask, layer.block_mask)
    assert torch.equal(back(x), layer(x))
    assert back.extra_repr() == layer.extra_repr()
    full = ddst.SparseConv2d.from_dense(twin, density=1.0, block=(3, 7))
    assert full.density == 1.0
    assert_close(full(x), twin(x), "density 1")


def test_from_dense_keeps_the_blocks_of_largest_norm() -> None:
    dense = nn.Conv2d(40, 24, 3)
    layer = ddst.SparseConv2d.from_dense(dense, density=0.3)
    norms = block_norms(dense.weight.detach(), (16, 16))
    assert layer.nnz == round(0.3 * norms.numel())
    assert norms[layer.block_mask].min() >= norms[~layer.block_mask].max()
    kept = dense.weight * active_entries(layer.block_mask, layer.weight_shape, layer.block)
    assert torch.equal(layer.dense_weight(), kept)
    assert torch.equal(layer.bias, dense.bias)
    assert ddst.SparseConv2d.from_dense(dense).nnz == round(0.1 * norms.numel())


def test_from_dense_follows_dtype_mode_and_frozen_weights() -> None:
    dense = nn.Conv2d(8, 8, 1, bias=False).double().requires_grad_(False).eval()
    layer = ddst.SparseConv2d.from_dense(dense, density=0.5, block=4)
    assert layer.values.dtype == torch.float64
    assert not layer.values.requires_grad
    assert not layer.training
    assert layer.bias is None


@pytest.mark.parametrize(
    "module, options, error, named",
    [
        (nn.Conv2d(4, 4, 3, groups=2), {}, ValueError, "groups"),
        (nn.Linear(4, 4), {}, TypeError, "module"),
        (nn.ConvTranspose2d(4, 4, 3), {}, TypeError, "module"),
        (nn.Conv2d(4, 4, 3), {"density": 0.0}, ValueError, "density"),
        (nn.Conv2d(4, 4, 3), {"block_mask": torch.ones(4, 1, 3, 3, dtype=torch.bool)}, ValueError, "block_mask"),
        (nn.Conv2d(4, 4, 3), {"block_mask": torch.ones(1, 1, 3, 3)}, TypeError, "block_mask"),
        (
            nn.Conv2d(4, 4, 3),
            {"block_mask": torch.ones(1, 1, 3, 3, dtype=torch.bool), "density": 0.5},
            ValueError,
            "density",
        ),
        (nn.Conv2d(4, 4, 3), {"block": 65}, ValueError, "block"),
    ],
)
def test_from_dense_names_the_wrong_argument(
    module: nn.Module, options: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        ddst.SparseConv2d.from_dense(module, **options)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"in_channels": 0}, "in_channels"),
        ({"out_channels": -3}, "out_channels"),
        ({"in_channels": 2.5}, "in_channels"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size"),
        ({"stride": 0}, "stride"),
        ({"stride": (1, -2)}, "stride"),
        ({"padding": -1}, "padding"),
        ({"padding": "full"}, "padding"),
        ({"padding": "same", "stride": 2}, "padding"),
        ({"dilation": 0}, "dilation"),
        ({"groups": 2}, "groups"),
        ({"groups": 0}, "groups"),
        ({"padding_mode": "mirror"}, "padding_mode"),
        ({"density": 0.0}, "density"),
        ({"density": -0.1}, "density"),
        ({"density": 1.01}, "density"),
        ({"density": float("nan")}, "density"),
        ({"density": "dense"}, "density"),
        ({"block": 0}, "block"),
        ({"block": 65}, "block"),
        ({"block": (16, 0)}, "block"),
        ({"block": (128, 16)}, "block"),
        ({"block": (16,)}, "block"),
        ({"block": (16, 16, 1)}, "block"),
        ({"block": 1.5}, "block"),
    ],
    ids=str,
)
def test_constructor_names_the_wrong_argument(change: dict[str, Any], named: str) -> None:
    arguments: dict[str, Any] = {"in_channels": 8, "out_channels": 8, "kernel_size": 3, **change}
    with pytest.raises((ValueError, TypeError), match=named):
        ddst.SparseConv2d(**arguments)


@pytest.mark.parametrize("shape", [(2, 7, 6, 6), (6, 6), (1, 2, 8, 6, 6), (7, 6, 6), (2, 8, 2, 6)])
def test_wrong_input_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises((ValueError, RuntimeError), match="input"):
        ddst.SparseConv2d(8, 8, 3, block=4)(torch.zeros(shape))


def test_repr_shows_what_differs_from_the_defaults() -> None:
    plain = repr(ddst.SparseConv2d(64, 48, 3))
    for text in ("SparseConv2d(", "64, 48", "kernel_size=(3, 3)", "stride=(1, 1)", "density=0.102", "(16, 16)"):
        assert text in plain
    for text in ("padding", "dilation", "bias", "padding_mode"):
        assert text not in plain
    options = {"padding": 2, "dilation": 3, "bias": False, "padding_mode": "circular", "block": (8, 4)}
    full = repr(ddst.SparseConv2d(64, 48, (1, 2), **options))
    for text in ("kernel_size=(1, 2)", "padding=(2, 2)", "dilation=(3, 3)", "bias=False", "circular", "(8, 4)"):
        assert text in full


@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
def test_weights_have_the_variance_of_a_dense_layer_of_the_connected_fan_in(density: float) -> None:
    # nn.Conv2d draws from +-1/sqrt(fan_in): an output of unit-variance input has variance fan_in / (3 fan_in) = 1/3.
    torch.manual_seed(0)
    layer = ddst.SparseConv2d(120, 200, 3, density=density)
    weight = layer.dense_weight().detach()
    connected = active_entries(layer.block_mask, layer.weight_shape, layer.block)
    fan_in = connected.flatten(1).sum(1)
    assert fan_in.unique().numel() > 1 or density == 1.0  # rows differ, so a common scale would not do
    bound = fan_in.rsqrt()
    assert (weight.flatten(1).abs().amax(1) <= bound * (1 + 1e-6)).all()
    output_variance = weight.square().flatten(1).sum(1)
    per_row = output_variance.split(16)
    for row, count in zip(per_row, fan_in.split(16), strict=True):
        # Mean of 16 * fan_in squares of uniform numbers: relative standard deviation sqrt(0.8 / number).
        assert row.mean().item() == pytest.approx(1 / 3, rel=5 * (0.8 / count.sum().item()) ** 0.5)
    dense = nn.Conv2d(120, 200, 3).weight.detach().square().flatten(1).sum(1)
    assert output_variance.mean().item() == pytest.approx(dense.mean().item(), rel=0.03)
    assert (layer.bias.abs() <= bound * (1 + 1e-6)).all()
    assert (layer.bias / bound).square().mean().item() == pytest.approx(1 / 3, rel=0.3)


def test_measured_output_variance_equals_that_of_a_dense_layer() -> None:
    torch.manual_seed(1)
    x = torch.randn(8, 128, 12, 12)
    sparse = ddst.SparseConv2d(128, 64, 3, density=0.2, bias=False)(x).var().item()
    dense = nn.Conv2d(128, 64, 3, bias=False)(x).var().item()
    assert sparse == pytest.approx(dense, rel=0.1)


def test_new_layer_covers_every_block_row_and_column_and_follows_the_seed() -> None:
    torch.manual_seed(3)
    layer = ddst.SparseConv2d(160, 96, 3, density=0.12)
    assert layer.block_mask.flatten(1).any(1).all()
    assert layer.block_mask.transpose(0, 1).flatten(1).any(1).all()
    torch.manual_seed(3)
    again = ddst.SparseConv2d(160, 96, 3, density=0.12)
    assert torch.equal(layer.block_mask, again.block_mask)
    assert torch.equal(layer.values, again.values)
    torch.manual_seed(4)
    assert not torch.equal(ddst.SparseConv2d(160, 96, 3, density=0.12).block_mask, layer.block_mask)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("channels", [1, 32])
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last])
def test_output_layout_follows_the_dense_weight_too(
    input_format: torch.memory_format, weight_format: torch.memory_format, kernel: int, channels: int, backend: str
) -> None:
    dense = nn.Conv2d(channels, 32, kernel).to(memory_format=weight_format)
    layer = ddst.SparseConv2d.from_dense(dense, density=1.0, block=(16, 1))
    layer.backend = backend
    x = torch.randn(2, channels, 6, 5).contiguous(memory_format=input_format)
    want = dense(x)
    assert layer(x).stride() == want.stride()
    assert layer.to_dense()(x).stride() == want.stride()
    assert_close(layer(x), want.double(), "output")
