"""What a packed weight answers where code takes it for a tensor: dtypes, shapes, gradients, hooks, copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddst
from ddst import topology as tp
from ddst.nn.packed.parameter import HoldsPackedParameters
from ddst.nn.packed.weight import PackedWeight
from helpers.packed_uses import Own, pack, packed_in


def layer_of(shape: tuple[int, ...] = (21, 11), dtype: torch.dtype = torch.float64) -> ddst.nn.SparseLayer:
    kind: Any = ddst.SparseLinear if len(shape) == 2 else ddst.SparseConv2d
    settings = (shape[1], shape[0], *shape[2:3])
    layer: ddst.nn.SparseLayer = kind(*settings, density=0.5, block=(8, 4), dtype=dtype)
    return layer


def same(packed: Any, dense: Tensor) -> None:
    found = packed.unpacked() if isinstance(packed, PackedWeight) else packed
    assert (packed.dtype, packed.shape) == (dense.dtype, dense.shape)
    torch.testing.assert_close(found, dense)


FACTORS = {
    "float64, no dimension": torch.tensor(2.0, dtype=torch.float64),
    "float64, one entry": torch.full((1, 1), 2.0, dtype=torch.float64),
    "float64, rows": torch.rand(21, 1, dtype=torch.float64) + 0.5,
    "float64, entries": torch.rand(21, 11, dtype=torch.float64) + 0.5,
    "float64, batch": torch.rand(2, 1, 11, dtype=torch.float64) + 0.5,
    "float16, no dimension": torch.tensor(2.0, dtype=torch.float16),
    "float16, columns": torch.rand(11).add(0.5).half(),
    "bfloat16, batch": torch.rand(2, 21, 1).add(0.5).bfloat16(),
    "int, no dimension": torch.tensor(3),
    "int, rows": torch.arange(1, 22)[:, None],
    "int, entries": torch.arange(1, 232).view(21, 11),
    "int, batch": torch.arange(1, 43).view(2, 21, 1),
    "bool, entries": torch.ones(21, 11, dtype=torch.bool),
    "complex, rows": torch.ones(21, 1, dtype=torch.complex64),
}


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtypes_are_promoted_as_torch_promotes_them(factor: str, dtype: torch.dtype) -> None:
    weight, f = layer_of(dtype=dtype).weight, FACTORS[factor]
    dense = weight.unpacked()
    same(weight * f, dense * f)
    same(f * weight, f * dense)
    if f.dtype != torch.bool:
        same(weight / f, dense / f)


def test_a_product_of_another_dtype_computes_in_it() -> None:
    weight, style = layer_of((21, 11, 3), torch.float32).weight, torch.rand(2, 1, 11, 1, 1, dtype=torch.float64)
    x = torch.randn(1, 22, 5, 5, dtype=torch.float64)
    product, dense = weight * style, weight.unpacked() * style
    expected = F.conv2d(x, dense.view(42, 11, 3, 3), groups=2)
    torch.testing.assert_close(F.conv2d(x, product.view(42, 11, 3, 3), groups=2), expected)


SHAPES: dict[str, Callable[[Any], Any]] = {
    "repeat by the size of the dimension": lambda w: w.repeat(21, 1, 1, 1),
    "repeat columns": lambda w: w.repeat(1, 11, 1, 1),
    "repeat, more dimensions": lambda w: w.repeat(3, 1, 1, 1, 1),
    "repeat two": lambda w: w.repeat(2, 2, 1, 1),
    "expand": lambda w: w.expand(2, -1, 11, -1, -1),
    "expand by name": lambda w: w.expand(size=(2, 21, 11, 3, 3)),
    "expand as": lambda w: w.unsqueeze(0).expand_as(torch.empty(4, 21, 11, 3, 3)),
    "names of numpy": lambda w: torch.sum(w, axis=(1, 2, 3), keepdims=True),
    "swapaxes": lambda w: torch.swapaxes(w, axis0=0, axis1=-3),
    "flip by name": lambda w: torch.flip(w, dims=(-1, -2)),
    "permute by name": lambda w: torch.permute(w, dims=(1, 0, -2, -1)),
    "negative": lambda w: w.sum((-1, -3)).mean(-2),
    "no index": lambda w: w.unsqueeze(0)[False],
    "modulo": lambda w: w % 1,
    "floor": lambda w: w // 1,
    "sign": lambda w: +w,
    "base": lambda w: 2**w,
    "powers": lambda w: (w**3).sum() + (w.abs() ** 2.5).sum() + (w.abs() + 1).pow(-1).sum() + w.pow(0).sum(),
    "float_power": lambda w: torch.float_power(w, 2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_names_are_those_of_torch(name: str) -> None:
    weight = layer_of((21, 11, 3)).weight
    same(SHAPES[name](weight), SHAPES[name](weight.unpacked()))


WRONG: dict[str, Callable[[Any], Any]] = {
    "sum": lambda w: w.sum((1, 2, 7)),
    "sum twice": lambda w: w.sum((1, 1)),
    "squeeze": lambda w: w.squeeze(4),
    "unsqueeze": lambda w: w.unsqueeze(6),
    "flatten": lambda w: w.flatten(5),
    "flatten backwards": lambda w: w.flatten(2, 1),
    "permute": lambda w: w.permute(0, 0, 1, 2),
    "transpose": lambda w: w.transpose(0, 4),
    "expand a dimension that has a size": lambda w: w.expand(1, 11, 3, 3),
    "expand by no size": lambda w: w.expand(-1, 21, 11, 3, 3),
    "repeat too few": lambda w: w.repeat(2, 1),
    "view": lambda w: w.view(21, -1, -1),
    "mm": lambda w: torch.mm(w, torch.ones(11, 2, dtype=w.dtype)),
    "narrowing": lambda w: torch.linalg.vector_norm(w, dtype=torch.float32),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_torch_refuses_is_refused(name: str) -> None:
    weight = layer_of((21, 11, 3)).weight
    with pytest.raises((RuntimeError, IndexError)) as expected:
        WRONG[name](weight.unpacked())
    with pytest.raises(expected.type):
        WRONG[name](weight)


def test_matrices_that_do_not_fit_are_refused() -> None:
    weight, x = layer_of().weight, torch.ones(5, 11, dtype=torch.float64)
    for wrong in (lambda: x @ weight, lambda: weight @ x, lambda: torch.mm(x[None], weight.t()),
                  lambda: torch.mv(weight, x.t()), lambda: F.linear(x[:, :5], weight)):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError)):
            wrong()


def test_16_bit_norms_are_summed_in_float32() -> None:
    weight = layer_of(dtype=torch.float16).weight
    for scale in (1e-3, 1e3):  # squares below and above what float16 holds
        product = weight * scale
        same(product.norm(dim=1), product.unpacked().norm(dim=1))


def test_a_root_has_a_gradient_at_the_blocks_alone() -> None:
    layer = layer_of()
    layer.weight.abs().pow(0.5).sum().backward()
    assert layer.values.grad is not None
    assert torch.isfinite(layer.values.grad[tp.inside_slots(layer.slot_blocks, layer.weight_shape, layer.block)]).all()
    outside = ~tp.inside_slots(layer.slot_blocks, layer.weight_shape, layer.block)
    assert torch.equal(layer.values.grad[outside], torch.zeros(int(outside.sum()), dtype=torch.float64))


def under_autocast(use: Callable[..., Any], *tensors: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return use(*tensors)


AUTOCAST: dict[str, Callable[..., Any]] = {
    "linear": lambda w, x, b: F.linear(x, w, b),
    "the other way": lambda w, x, b: F.linear(torch.ones(2, 21), w.t(), b[:11]),
    "addmm": lambda w, x, b: torch.addmm(b, x, w.t()),
    "matmul": lambda w, x, b: x @ w.t(),
    "modulated, bias": lambda w, x, b: F.conv1d(
        x[:2].reshape(1, 22, 1), (w * x[:2, None, :]).reshape(42, 11, 1), b.repeat(2), groups=2
    ),
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_gives_the_dtype_it_gives_dense_weights(name: str) -> None:
    layer = (
        ddst.nn.SparseConv1d(11, 21, 1, density=0.5, block=(8, 4)) if "mod" in name else layer_of(dtype=torch.float32)
    )
    weight, x, bias = layer.weight, torch.randn(5, 11), torch.randn(21)
    weight = weight.squeeze(2) if "mod" in name else weight
    found = under_autocast(AUTOCAST[name], weight, x, bias)
    expected = under_autocast(AUTOCAST[name], weight.unpacked(), x, bias)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)


def test_autocast_leaves_the_sums_of_a_demodulation_in_float32() -> None:
    weight, style = layer_of((21, 11, 3), torch.float32).weight, torch.rand(2, 1, 11, 1, 1) * 100
    found = under_autocast(lambda w: (w * style).square().sum((2, 3, 4)), weight)
    torch.testing.assert_close(found, (weight.unpacked() * style).square().sum((2, 3, 4)))


def test_numbers_and_arrays_of_numpy() -> None:
    weight = layer_of().weight
    for left in (np.float64(0.5), np.float32(0.5), np.int64(2)):
        same(left * weight, weight.unpacked() * float(left))
        assert isinstance(left * weight, PackedWeight)
    np.testing.assert_array_equal(np.asarray(weight.detach()), weight.detach().unpacked().numpy())


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", [(21, 11), (21, 11, 3)])
def test_gradients_are_asked_for_by_weight(shape: tuple[int, ...], dense: bool) -> None:
    """As VQGAN's code bases do, to weigh two losses by their gradients at the last layer."""
    layer = layer_of(shape)
    layer.gives_dense_weight = dense
    x = torch.randn(4, 11, *[5] * (2 * len(shape) - 4), dtype=torch.float64)
    last: Any = layer.weight
    (found,) = torch.autograd.grad(layer(x).square().sum(), last, retain_graph=True, create_graph=True)
    layer(x).square().sum().backward(inputs=[last])
    assert layer.values.grad is not None
    expected = tp.unpack_slots(layer.values.grad, layer.slot_blocks, layer.weight_shape)
    torch.testing.assert_close(found, expected)
    assert found.requires_grad
    torch.testing.assert_close(layer.weight.grad, expected)
    unused = torch.autograd.grad(x.requires_grad_().sum(), [x, layer.weight], allow_unused=True)
    assert unused[1] is None
    if not dense:
        with pytest.raises(RuntimeError, match="product or view"):
            torch.autograd.grad(layer(x).sum(), layer.weight * 2, allow_unused=True)


@pytest.mark.parametrize("dense", [False, True])
def test_what_is_written_into_a_gradient_is_kept(dense: bool) -> None:
    layer = layer_of()
    layer.gives_dense_weight = dense
    layer(torch.randn(4, 11, dtype=torch.float64)).sum().backward()
    assert layer.values.grad is not None
    before, values = layer.values.grad.clone(), layer.values.detach().clone()
    assert layer.weight.grad is not None
    layer.weight.grad.mul_(0.5)
    layer.weight.grad.data.mul_(0.5)
    torch.testing.assert_close(layer.values.grad, before / 4)
    layer.weight.grad = torch.ones(21, 11, dtype=torch.float64)
    inside = tp.inside_slots(layer.slot_blocks, layer.weight_shape, layer.block)
    assert torch.equal(layer.values.grad, inside.double())
    layer.weight.grad.zero_()
    assert not layer.values.grad.any() and torch.equal(layer.values, values)
    layer.weight.grad = None
    assert layer.values.grad is None
    if not dense:
        with pytest.raises(RuntimeError, match="shape of the weight"):
            layer.weight.grad = torch.ones(3)


def test_hooks_that_would_never_run_are_refused() -> None:
    layer = layer_of()
    for name, arguments in (
        ("register_hook", (print,)),
        ("retain_grad", ()),
        ("register_post_accumulate_grad_hook", (print,)),
    ):
        with pytest.raises(TypeError, match="call it on the layer's values"):
            getattr(layer.weight, name)(*arguments)


def test_a_weight_with_hooks_stays_dense_and_says_why() -> None:
    plain, own = nn.Linear(32, 32), Own((32, 32), lambda m, x: F.linear(x, m.weight))
    model = nn.Sequential(plain, own.float(), nn.Linear(32, 32))
    plain.weight.register_hook(torch.zeros_like)
    own.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", torch.zeros_like(p)))
    report = ddst.sparsify(model, 0.9, sample=torch.ones(2, 32))
    model(torch.ones(2, 32)).sum().backward()
    for module in (plain, own):
        assert module.weight.grad is not None and not module.weight.grad.any()
    assert [layer.name for layer in report.layers if "hooks are registered" in str(layer.reason)] == ["0", "1.weight"]


class Rounded(torch.autograd.Function):
    """Somebody's straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, weight: Any) -> Any:
        return (weight * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient


def test_an_autograd_function_does_not_take_it_for_a_constant() -> None:
    module = Own((21, 11), lambda m, x: F.linear(x, Rounded.apply(m.weight)))
    x = torch.randn(3, 11, dtype=torch.float64)
    pack(module, "weight")
    with pytest.raises(TypeError, match=r"handed to a torch\.autograd\.Function, which takes tensors only"):
        module(x)
    packed_in(module).gives_dense_weight = True
    module(x).sum().backward()
    assert packed_in(module).values.grad is not None and packed_in(module).values.grad.any()


def test_a_checkpoint_is_no_function_of_somebody() -> None:
    """It computes with the weight again, in which parts are under no_grad as they were at first."""
    module = Own((21, 11), own_spectral_norm)
    pack(module, "weight")
    x, weight = torch.randn(3, 11, dtype=torch.float64, requires_grad=True), module.weight
    for use in (module, lambda x: own_spectral_norm(Holder(weight), x)):
        packed_in(module).values.grad = None
        torch.utils.checkpoint.checkpoint(use, x, use_reentrant=True).sum().backward()
        assert packed_in(module).values.grad is not None and packed_in(module).values.grad.any()


@dataclass
class Holder:
    weight: Any


def own_spectral_norm(m: Any, x: Tensor) -> Tensor:
    weight = m.weight
    with torch.no_grad():
        v = F.normalize(torch.ones(21, dtype=x.dtype) @ weight, dim=0)
        u = F.normalize(weight @ v, dim=0)
    return F.linear(x, weight / (u @ (weight @ v)))


def test_sparsify_sees_that_an_autograd_function_needs_a_tensor() -> None:
    module = Own((32, 32), lambda m, x: F.linear(x, Rounded.apply(m.weight)))
    x = torch.randn(3, 32, dtype=torch.float64)
    ddst.sparsify(module, 0.5, sample=x)
    assert packed_in(module).gives_dense_weight
    module(x).sum().backward()
    assert packed_in(module).values.grad is not None


def test_a_stale_weight_in_a_list_raises() -> None:
    layer = layer_of((32, 32))
    weight = layer.weight
    layer.set_block_mask(~layer.block_mask)
    with pytest.raises(RuntimeError, match="have moved"):
        torch.cat([weight, weight])


def test_saved_and_copied_products_are_tensors() -> None:
    layer = layer_of()
    product = layer.weight * 2
    file = io.BytesIO()
    torch.save({"weight": layer.weight, "product": product}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for copied in (loaded["product"], copy.deepcopy(product), copy.copy(product)):
        assert type(copied) is Tensor
        torch.testing.assert_close(copied, product.detach().unpacked())
    torch.testing.assert_close(loaded["weight"], layer.dense_weight().detach())


def test_a_graph_break_may_lie_between_weight_and_use() -> None:
    module = Own((21, 11), lambda m, x: use_after_break(m, x))
    pack(module, "weight")
    x = torch.randn(3, 11, dtype=torch.float64)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, backend="eager")(x), module(x))


def use_after_break(m: Any, x: Tensor) -> Tensor:
    weight = m.weight * 2
    torch._dynamo.graph_break()
    return F.linear(x, weight)


def test_function_transforms_and_modes() -> None:
    module = Own((21, 11), lambda m, x, s: F.linear(x, m.weight * s))
    pack(module, "weight")
    x, styles = torch.randn(3, 11, dtype=torch.float64), torch.rand(4, 11, dtype=torch.float64)
    expected = torch.stack([module(x, style) for style in styles])
    torch.testing.assert_close(torch.vmap(lambda s: module(x, s))(styles), expected)
    values = {"packed_weight.values": packed_in(module).values.detach() * 2}
    torch.testing.assert_close(torch.func.functional_call(module, values, (x, styles[0])), expected[0] * 2)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(module(x, styles[0]), expected[0].detach())


def scale_before_each_call(module: nn.Module, scale: float) -> None:
    """An equalised learning rate as ports of the progressive GAN have it: a hook that computes the weight."""
    weight = module._parameters.pop("weight")
    assert weight is not None
    module.register_parameter("weight_orig", nn.Parameter(weight.detach()))
    module.register_forward_pre_hook(lambda m, _: setattr(m, "weight", m.weight_orig * scale))


def test_a_hook_that_scales_the_weight() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    for convolution in (model[0], model[2]):
        scale_before_each_call(convolution, 0.3)
    x = torch.randn(2, 32, 8, 8)
    report = ddst.sparsify(model, 0.3, sample=x)
    assert all(isinstance(model[i], HoldsPackedParameters) for i in (0, 2)), str(report)
    y = model(x)
    y.square().mean().backward()
    assert all(model[i].packed_weight_orig.values.grad.any() for i in (0, 2))
    assert all("conv" in model[i].packed_weight_orig.weight_uses.packed for i in (0, 2))
    torch.testing.assert_close(ddst.densify(copy.deepcopy(model))(x), y)


def test_clipping_and_averages_of_a_wasserstein_critic() -> None:
    layer = layer_of()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.data.clamp_(-0.01, 0.01)
        for mine, theirs in zip(other.parameters(), layer.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)
    assert float(layer.values.abs().max()) <= 0.01 and float(layer.weight.abs().max()) <= 0.01
    torch.testing.assert_close(other.weight.unpacked(), other.dense_weight())
