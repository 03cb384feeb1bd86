"""Transposed convolutions: the linear form on 1×1 inputs, output_size, gradcheck; 1-D layers copy nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ddst
from ddst.sparsity import network_stats
from helpers.dense import active_entries, unpack_blocks
from helpers.kinds import dense_of
from helpers.tolerances import assert_close

PIXELS: dict[str, tuple[type, tuple[int, ...], dict[str, Any]]] = {
    "ragged": (ddst.SparseConvTranspose2d, (10, 21, 4), {"block": (8, 4)}),
    "whole blocks": (ddst.SparseConvTranspose2d, (16, 16, (4, 3)), {"block": 8, "stride": 3}),
    "one block, no bias": (ddst.SparseConvTranspose2d, (8, 5, 3), {"block": 8, "bias": False}),
    "grouped": (ddst.SparseConvTranspose2d, (16, 24, 2), {"block": 4, "groups": 2}),
    "1-D": (ddst.SparseConvTranspose1d, (10, 21, 5), {"block": (3, 8)}),
    "1-D grouped": (ddst.SparseConvTranspose1d, (12, 18, 5), {"block": (2, 3), "groups": 3}),
}


class Called(TorchDispatchMode):
    """Names of the operators that run below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def make(case: str, density: float = 0.5) -> tuple[Any, Tensor]:
    cls, sizes, options = PIXELS[case]
    layer = cls(*sizes, density=density, dtype=torch.float64, **options)
    return layer, torch.randn(3, sizes[0], *[1] * layer.dims, dtype=torch.float64)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("case", PIXELS)
def test_a_single_pixel_runs_as_a_linear_layer_and_agrees_with_torch(case: str, empty: bool) -> None:
    layer, x = make(case)
    if empty:
        layer.set_block_mask(torch.zeros(layer.mask_shape, dtype=torch.bool))
    dense, x = dense_of(layer), x.requires_grad_()
    with Called() as called:
        layer(x).sum().backward()
    names = {name for name in called.names if name.startswith("ddst")}
    assert names == {"ddst::linear_input_grad", "ddst::linear", "ddst::linear_weight_grad"}
    active = active_entries(layer.block_mask, layer.weight_shape, layer.block)
    results = []
    for module, weight in ((layer, layer.values), (dense, dense.weight)):
        y = module(x)
        one = torch.autograd.grad(y.pow(3).sum(), [x, *module.parameters()], create_graph=True)
        two = torch.autograd.grad(one[0].square().sum(), [x, weight], allow_unused=True, materialize_grads=True)
        results.append([y, *one, *two])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        if want.shape == dense.weight.shape:
            got, want = unpack_blocks(got, layer.slot_blocks, layer.weight_shape), want * active
        assert_close(got, want, f"result {i}")
    last = x.detach().movedim(1, -1).contiguous().movedim(-1, 1)
    assert layer(last).stride() == dense(last).stride() == dense(x).stride()


def test_the_matrix_follows_the_mask_moves_and_is_counted() -> None:
    layer, x = make("ragged", 0.3)
    layer(x)
    index = network_stats(layer).memory.index
    topology, matrix = layer.topologies
    assert index == sum(t.numel() * 4 for t in (topology, matrix, layer.slot_blocks))
    layer.set_block_mask(~layer.block_mask)
    with torch.no_grad():
        layer.weight.normal_()
    assert_close(layer(x), dense_of(layer)(x), "after a change")
    moved = layer.to("meta")
    assert all(topology.is_meta for topology in moved.topologies)
    padded = ddst.SparseConvTranspose2d(8, 8, 4, padding=1, block=4)
    padded(torch.ones(1, 8, 1, 1))
    assert len(padded.topologies) == 1


@pytest.mark.parametrize("settings", [{"padding": 1}, {"output_padding": 1, "stride": 2}, {"dilation": 2}], ids=str)
def test_a_single_pixel_of_another_kind_is_a_convolution(settings: dict[str, Any]) -> None:
    layer = ddst.SparseConvTranspose2d(16, 16, 4, block=4, density=0.5, dtype=torch.float64, **settings)
    x = torch.randn(2, 16, 1, 1, dtype=torch.float64)
    assert_close(layer(x), dense_of(layer)(x), "output")


@pytest.mark.parametrize("sizes", [(9, 11), (10, 12), (2, 16, 10, 11)], ids=str)
def test_output_size_as_in_torch(sizes: tuple[int, ...]) -> None:
    layer = ddst.SparseConvTranspose2d(12, 16, 3, 2, 1, block=4, density=0.5, dtype=torch.float64)
    dense, x = dense_of(layer), torch.randn(2, 12, 5, 6, dtype=torch.float64)
    assert_close(layer(x, output_size=sizes), dense(x, output_size=list(sizes)), "output")
    assert_close(layer(x[0], sizes[-2:]), dense(x[0], list(sizes[-2:])), "unbatched output")
    one = ddst.SparseConvTranspose1d(12, 16, 3, 2, 1, block=4, density=0.5, dtype=torch.float64)
    signal = x[:, :, 0]
    assert_close(one(signal, output_size=[12]), dense_of(one)(signal, output_size=[12]), "1-D output")
    traced = torch.fx.symbolic_trace(_Sized(layer, sizes))
    assert torch.equal(traced(x), layer(x, output_size=sizes))


class _Sized(nn.Module):
    def __init__(self, layer: nn.Module, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.sizes = layer, sizes

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, output_size=self.sizes)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_two_orders_are_numerically_right(size: int, groups: int) -> None:
    layer = ddst.SparseConvTranspose2d(4, 4, 2, 2, groups=groups, block=2, density=0.5, dtype=torch.float64)
    x = torch.randn(2, 4, size, size, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, x)

    inputs = (x, layer.values.detach().requires_grad_(), layer.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_a_size_asked_for_and_on_pixels(dynamic: bool) -> None:
    layer = ddst.SparseConvTranspose2d(12, 16, 3, 2, block=4, density=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for x, sizes in ((torch.randn(2, 12, 5, 6), (12, 13)), (torch.randn(3, 12, 1, 1), None)):
        torch.testing.assert_close(compiled(x, output_size=sizes), layer(x, output_size=sizes))


COPIES = {"aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous", "aten::constant_pad_nd"}


@pytest.mark.parametrize("cls", [ddst.SparseConv1d, ddst.SparseConvTranspose1d])
def test_signals_whose_channels_lie_together_are_not_copied(cls: type) -> None:
    layer = cls(16, 32, 3, padding=1, density=0.5)
    x = torch.randn(2, 20, 16).transpose(1, 2).requires_grad_()
    with Called() as called:
        y = layer(x)
        torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))
    assert not COPIES & set(called.names)
    assert y.stride() == (640, 1, 32)
    assert layer(x.contiguous()).is_contiguous()
