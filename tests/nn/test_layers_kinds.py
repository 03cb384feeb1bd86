"""Transposed, 1-D and grouped convolutions against torch's: values, gradients of two orders, layouts, conversion."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ddst
from ddst.nn import SparseLayer
from helpers.dense import active_entries, block_norms, unpack_blocks
from helpers.kinds import GROUPED, UNGROUPED, Which, dense_of, input_of, make_sparse
from helpers.layers import weight_of
from helpers.tolerances import assert_close

every = pytest.mark.parametrize("which", [*UNGROUPED, *GROUPED], ids=str)
FIRST: list[Which] = [("ConvTranspose2d", 1, 1), ("Conv1d", 1, 1), ("ConvTranspose1d", 1, 1), ("Conv2d", 0, 2)]
FIRST += [("ConvTranspose2d", 2, 2), ("Conv1d", 2, 3), ("ConvTranspose1d", 2, 2)]
first = pytest.mark.parametrize("which", FIRST, ids=str)
NEW = ("Conv1d", "ConvTranspose1d", "ConvTranspose2d")


@pytest.mark.parametrize("name", NEW)
def test_signature_is_that_of_torch_plus_density_and_block(name: str) -> None:
    ours = inspect.signature(getattr(ddst, f"Sparse{name}").__init__).parameters
    theirs = inspect.signature(getattr(nn, name).__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for key, parameter in theirs.items():
        assert (ours[key].default, ours[key].kind) == (parameter.default, parameter.kind), key
    assert list(ours)[len(theirs) :] == ["density", "block", "reserve"]
    assert list(inspect.signature(getattr(ddst, f"Sparse{name}").forward).parameters) == list(
        inspect.signature(getattr(nn, name).forward).parameters
    )


@every
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_forward_and_gradients_of_two_orders_equal_torch(which: Which, backend: str) -> None:
    layer = make_sparse(which, dtype=torch.float64)
    layer.backend = backend
    dense = dense_of(layer)
    assert layer.weight_shape == tuple(dense.weight.shape)
    x = input_of(layer).requires_grad_()
    active = active_entries(layer.block_mask, layer.weight_shape, layer.block)
    grads = []
    for module in (layer, dense):
        y = module(x)
        if module is layer:
            upstream = torch.randn_like(y)
        one = torch.autograd.grad((y * upstream).sum() + y.pow(3).sum(), [x, *module.parameters()], create_graph=True)
        two = torch.autograd.grad(one[0].square().sum(), [x, *module.parameters()], allow_unused=True)
        grads.append((y, *one, *two))
    weights = [i for i, t in enumerate(grads[1]) if t is not None and t.shape == dense.weight.shape]
    assert len(weights) == 2
    for i, (got, want) in enumerate(zip(*grads, strict=True)):
        if want is None:
            assert got is None
        elif i in weights:
            assert_close(unpack_blocks(got, layer.slot_blocks, layer.weight_shape), want * active, f"weight, {i}")
        else:
            assert_close(got, want, f"result {i}")


@every
def test_unbatched_input_and_empty_batch_as_in_torch(which: Which) -> None:
    layer = make_sparse(which, dtype=torch.float64)
    dense, x = dense_of(layer), input_of(layer)
    assert_close(layer(x[0]), dense(x[0]), "unbatched output")
    if layer.padding_mode == "zeros":  # torch's F.pad refuses an empty batch in other modes
        y = layer(x[:0])
        assert y.shape == dense(x[:0]).shape
        y.sum().backward()
        assert layer.values.grad is not None
        assert not layer.values.grad.any()


@every
def test_an_input_whose_channels_lie_together_gives_such_an_output(which: Which) -> None:
    layer = make_sparse(which, dtype=torch.float64)
    if layer.padding_mode != "zeros":
        return  # what F.pad returns decides
    dense, x = dense_of(layer), input_of(layer)
    plain = layer(x)
    assert plain.is_contiguous()
    last = x.movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    y = layer(last)
    assert y.movedim(1, -1).is_contiguous()
    assert_close(y, plain.detach(), "the other layout")
    if x.dim() == 4:  # torch makes the inputs of its 1-D layers contiguous
        assert y.stride() == dense(last).stride()
    (gradient,) = torch.autograd.grad(y, last, torch.ones_like(y))
    assert gradient.movedim(1, -1).is_contiguous()


@first
def test_the_layout_of_the_dense_weight_counts_as_in_torch(which: Which) -> None:
    dense = dense_of(make_sparse(which))
    with torch.no_grad():
        dense.weight = nn.Parameter(dense.weight.movedim(1, -1).contiguous().movedim(-1, 1))
    layer = type(make_sparse(which)).from_dense(dense, density=1.0, block=2)
    x = input_of(layer)
    want = dense(x)
    assert layer(x).stride() == layer.to_dense()(x).stride() == want.stride()
    assert_close(layer(x), want.double(), "output")


@every
def test_to_dense_and_back(which: Which) -> None:
    layer = make_sparse(which, dtype=torch.float64).eval()
    twin, dense = dense_of(layer), layer.to_dense()
    assert type(dense) is type(twin)
    assert repr(dense) == repr(twin)
    assert not dense.training
    assert torch.equal(dense.weight, twin.weight)
    x = input_of(layer)
    assert torch.equal(dense(x), twin(x))
    back = type(layer).from_dense(dense, block_mask=layer.block_mask, block=layer.block)
    assert torch.equal(back.values, layer.values)
    assert torch.equal(back(x), layer(x))
    assert back.extra_repr() == layer.extra_repr()
    assert ("groups" in repr(layer)) == (layer.groups > 1)
    norms = block_norms(twin.weight.detach(), layer.block)
    by_norm = type(layer).from_dense(twin, density=0.25, block=layer.block)
    assert norms[by_norm.block_mask].min() >= norms[~by_norm.block_mask].max()


@every
def test_a_mask_moves_and_everything_still_fits(which: Which) -> None:
    layer = make_sparse(which, dtype=torch.float64)
    old = layer.dense_weight().detach()
    new = torch.rand(layer.mask_shape) < 0.5
    layer.set_block_mask(new)
    assert torch.equal(weight_of(layer), old * active_entries(new, layer.weight_shape, layer.block))
    with torch.no_grad():
        layer.weight.normal_()
    x = input_of(layer)
    assert_close(layer(x), dense_of(layer)(x), "after the change")
    empty = layer.set_block_mask(torch.zeros_like(new))
    assert empty.dropped == int(new.sum())
    assert_close(layer(x), dense_of(layer)(x), "without a block")
    assert layer.active_weights == layer.nnz == 0


@first
def test_copies_and_state_dicts_keep_what_a_layer_computes(which: Which) -> None:
    layer = make_sparse(which)
    layer.set_block_mask(torch.rand(layer.mask_shape) < 0.5)
    x, y = (x := input_of(layer)), layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    other = make_sparse(which)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    other = make_sparse(which)
    other.set_block_mask(layer.block_mask)
    other.load_state_dict(layer.to_dense().state_dict())
    assert torch.equal(other(x), y)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), y)
    assert_close(copy.deepcopy(layer).double()(x.double()), dense_of(layer).double()(x.double()), "as float64")


@first
def test_an_average_follows(which: Which) -> None:
    layer = make_sparse(which)
    average = copy.deepcopy(layer)
    ddst.follow(average, layer)
    layer.set_block_mask(~layer.block_mask)
    assert torch.equal(average.slot_blocks, layer.slot_blocks)
    assert torch.equal(average.topology, layer.topology)
    x = input_of(layer)
    with torch.no_grad():
        average.values.copy_(layer.values)
    assert torch.equal(average(x), layer(x))


@first
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_and_autocast(which: Which, dtype: torch.dtype) -> None:
    layer = make_sparse(which)
    x, dense = input_of(layer), dense_of(layer)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    rounded = copy.deepcopy(layer).to(dtype)
    wide = dense_of(rounded.double())(x.to(dtype).double())
    assert_close(y, wide, "autocast")
    y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert_close(y, wide, "16 bits")
    assert dense.weight.dtype == torch.float32


@first
def test_compiled_whole_it_computes_the_same(which: Which) -> None:
    layer = make_sparse(which)
    x = input_of(layer).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for module in (layer, compiled):
        y = module(x)
        grads = torch.autograd.grad(y.pow(2).sum(), [x, *layer.parameters()])
        if module is layer:
            expected = (y, *grads)
    for got, want in zip((y, *grads), expected, strict=True):
        torch.testing.assert_close(got, want)


@first
def test_on_meta_and_traced(which: Which) -> None:
    layer = make_sparse(which)
    x = input_of(layer)
    meta = make_sparse(which, device="meta")
    y = meta(x.to("meta"))
    assert (y.shape, y.stride()) == (layer(x).shape, layer(x).stride())
    real = meta.to_empty(device="cpu")
    real.load_state_dict(layer.state_dict())
    assert torch.equal(real(x), layer(x))
    model = nn.Sequential(layer, nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    assert torch.equal(traced(x), model(x))


@first
def test_weights_begin_with_the_output_variance_of_torch(which: Which) -> None:
    name, _, groups = which
    settings = {"stride": 2, "kernel_size": 4} if "Transpose" in name else {"kernel_size": 3}
    sizes = (64 * groups, 48 * groups)
    torch.manual_seed(0)
    sparse = getattr(ddst, f"Sparse{name}")(*sizes, **settings, groups=groups, density=0.2, bias=False)
    dense = getattr(nn, name)(*sizes, **settings, groups=groups, bias=False)
    x = input_of(sparse, 4, 40)
    assert sparse(x).var().item() == pytest.approx(dense(x).var().item(), rel=0.15)
    full = getattr(ddst, f"Sparse{name}")(*sizes, **settings, groups=groups, density=1.0)
    bound = dense.weight.abs().max().item()
    assert full.dense_weight().abs().max().item() == pytest.approx(bound, rel=0.01)
    assert full.bias.abs().max().item() <= bound * 1.01
    assert full.bias.shape == (sizes[1],)


@first
def test_torch_counts_the_operations_of_a_full_layer_as_of_the_dense_one(which: Which) -> None:
    layer = make_sparse(which, density=1.0, block=2)
    counts = []
    for module in (layer, dense_of(layer)):
        with FlopCounterMode(display=False) as counter:
            y = module(input_of(layer).requires_grad_())
            if layer.groups == 1:  # torch counts no groups in the weight gradient
                y.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@first
def test_explain_knows_the_layer(which: Which) -> None:
    layer = make_sparse(which)
    found = ddst.explain(layer, input_of(layer), measure=False)
    assert found.backend == "cpu"
    assert set(found.forms) == {"forward", "input gradient", "weight gradient"}


def test_explain_swaps_the_passes_of_a_transposed_layer() -> None:
    sparse: dict[str, SparseLayer] = {
        "Conv2d": ddst.SparseConv2d(32, 32, 4, 2, 1, block=(16, 4), density=0.5),
        "ConvTranspose2d": ddst.SparseConvTranspose2d(32, 32, 4, 2, 1, block=(16, 4), density=0.5),
    }
    slow = {name: ddst.explain(layer, torch.randn(1, 32, 8, 8), measure=False).slow for name, layer in sparse.items()}
    assert slow == {"Conv2d": ("input gradient",), "ConvTranspose2d": ("forward",)}
    assert ddst.explain(sparse["ConvTranspose2d"], torch.randn(1, 32, 8, 8)).rates["forward"].flops == (
        2 * sparse["ConvTranspose2d"].active_weights * 64
    )


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("ConvTranspose2d", {"padding": "same"}, "padding"),
    ("ConvTranspose2d", {"padding_mode": "reflect"}, "padding_mode"),
    ("ConvTranspose2d", {"output_padding": -1}, "output_padding"),
    ("ConvTranspose2d", {"kernel_size": (3, 3, 3)}, "kernel_size"),
    ("ConvTranspose1d", {"kernel_size": (3, 3)}, "kernel_size"),
    ("Conv1d", {"stride": (1, 1)}, "stride"),
    ("Conv1d", {"padding": "half"}, "padding"),
    ("Conv1d", {"groups": 3}, "in_channels must be divisible by groups=3"),
    ("Conv2d", {"groups": 2}, "block must divide the channels of a group, 8 along"),
    ("ConvTranspose1d", {"groups": 4, "block": (4, 8)}, "block must divide the channels of a group, 4 along"),
]


@pytest.mark.parametrize("name, change, named", WRONG, ids=str)
def test_wrong_arguments_are_named(name: str, change: dict[str, Any], named: str) -> None:
    settings = {"kernel_size": 3, **change}
    with pytest.raises((ValueError, TypeError), match=named):
        getattr(ddst, f"Sparse{name}")(16, 16, **settings)


def test_wrong_inputs_are_named() -> None:
    one, two = ddst.SparseConv1d(16, 16, 3), ddst.SparseConvTranspose2d(16, 16, 3, output_padding=1)
    for bad in (torch.randn(2, 8, 9), torch.randn(16), torch.randn(1, 2, 16, 9)):
        with pytest.raises(ValueError, match=r"input must be \[N, 16, T\] or \[16, T\]"):
            one(bad)
    with pytest.raises(ValueError, match="output_padding must be smaller than stride or dilation"):
        two(torch.randn(2, 16, 4, 4))
    two.output_padding = (0, 0)
    with pytest.raises(ValueError, match=r"output_size must be from \(6, 6\) to \(6, 6\)"):
        two(torch.randn(2, 16, 4, 4), output_size=(7, 6))
    with pytest.raises(ValueError, match="output_size must have 2 or 4 entries"):
        two(torch.randn(2, 16, 4, 4), output_size=(7,))
    with pytest.raises(ValueError, match="16 channels"):
        two(torch.randn(2, 8, 4, 4))
    with pytest.raises(ValueError, match="at least one position"):
        ddst.SparseConvTranspose2d(16, 16, 3, padding=2)(torch.randn(2, 16, 1, 1))
