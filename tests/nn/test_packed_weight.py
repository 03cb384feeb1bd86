"""A packed weight in code that knows nothing of it: the numbers of the dense weight, and blocks all the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddst
from ddst import topology as tp
from ddst.nn.packed.weight import PackedWeight, regroup
from helpers.packed_uses import Case, Own, check_compiled, check_equal, pack, packed_in, pair_of


def modulated(m: Any, x: Tensor, style: Tensor, up: bool = False) -> Tensor:
    """StyleGAN2's fused form, as many code bases have it, with a weight [1, O, I, k, k]."""
    n, channels, height, width = x.shape
    weight = 0.1 * m.weight * style.view(n, 1, channels, 1, 1)
    demodulation = torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8)
    weight = weight * demodulation.view(n, -1, 1, 1, 1)
    outputs, side = weight.shape[1], weight.shape[3]
    x = x.reshape(1, n * channels, height, width)
    if up:
        weight = weight.transpose(1, 2).reshape(n * channels, outputs, side, side)
        y = F.conv_transpose2d(x, weight, stride=2, groups=n)
    else:
        y = F.conv2d(x, weight.view(n * outputs, channels, side, side), padding=side // 2, groups=n)
    return y.view(n, outputs, *y.shape[2:])


def normalised_first(m: Any, x: Tensor, style: Tensor) -> Tensor:
    """StyleGAN3's form: weights and styles normalised, then modulated and demodulated."""
    n = len(x)
    w = m.weight * m.weight.square().mean([1, 2, 3], keepdim=True).rsqrt()
    style = style * style.square().mean().rsqrt()
    w = w.unsqueeze(0) * style.unsqueeze(1).unsqueeze(3).unsqueeze(4)
    w = w * (w.square().sum(dim=[2, 3, 4]) + 1e-8).rsqrt().unsqueeze(2).unsqueeze(3).unsqueeze(4)
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), w.reshape(-1, *m.weight.shape[1:]), padding=1, groups=n)
    return y.reshape(n, -1, *y.shape[2:])


def own_spectral_norm(m: Any, x: Tensor) -> Tensor:
    """Power iteration in plain torch, as BigGAN's code bases have it."""
    matrix = m.weight.view(m.weight.size(0), -1)
    with torch.no_grad():
        v = F.normalize(torch.matmul(torch.ones(1, matrix.size(0), dtype=x.dtype), matrix), eps=1e-6)
        u = F.normalize(torch.matmul(v, matrix.t()), eps=1e-6)
    sigma = torch.squeeze(torch.matmul(torch.matmul(v, matrix.t()), u.t()))
    return F.conv2d(x, m.weight / sigma, None, 1, 1)


IMAGE = (2, 11, 6, 5)
CASES = {
    "times a number": Case((21, 11, 3, 3), (IMAGE,), lambda m, x: F.conv2d(x, m.weight * 0.3, padding=1), ("conv",)),
    "by name": Case((21, 11, 3, 3), (IMAGE,), lambda m, x: F.conv2d(x, weight=m.weight, stride=2), ("conv",)),
    "gain, bias": Case(
        (21, 11, 3, 2), (IMAGE,), lambda m, x: F.conv2d(x, m.gain * m.weight, m.bias, dilation=2), ("conv",),
        (("gain", (21, 1, 1, 1)), ("bias", (21,))),
    ),
    "columns": Case(
        (21, 11, 3, 3), (IMAGE,), lambda m, x: F.conv2d(x, m.weight / m.scale, padding="same"), ("conv",),
        (("scale", (1, 11, 1, 1)),),
    ),
    "entries": Case(
        (21, 11, 3, 3), (IMAGE,), lambda m, x: F.conv2d(x, m.weight * m.window), ("conv",), (("window", (1, 1, 3, 3)),)
    ),
    "its dtype": Case((21, 11, 1, 1), (IMAGE,), lambda m, x: F.conv2d(x, m.weight.to(x.dtype)), ("conv",)),
    "groups": Case((32, 4, 3, 3), ((2, 16, 6, 5),), lambda m, x: F.conv2d(x, m.weight, groups=4), ("conv",)),
    "row norms": Case(
        (21, 11, 3, 3), (IMAGE,),
        lambda m, x: F.conv2d(x, m.weight / (m.weight.flatten(1).norm(dim=1) + 1e-3).view(-1, 1, 1, 1)), ("conv",),
    ),
    "whole norm": Case(
        (21, 11, 3, 3), (IMAGE,), lambda m, x: F.conv2d(x, m.weight / torch.linalg.vector_norm(m.weight)), ("conv",)
    ),
    "normalised": Case(
        (21, 11, 3, 3), (IMAGE,), lambda m, x: F.conv2d(x, F.normalize(m.weight.flatten(1), dim=1).view_as(m.weight)),
        ("conv",),
    ),
    "weight norm": Case(
        (21, 11, 3, 3), (IMAGE,), lambda m, x: F.conv2d(x, torch._weight_norm(m.weight, m.g, 0)), ("conv",),
        (("g", (21, 1, 1, 1)),),
    ),
    "own spectral norm": Case((21, 11, 3, 3), (IMAGE,), own_spectral_norm, ("conv", "linear")),
    "transposed": Case(
        (11, 21, 4, 4), (IMAGE,), lambda m, x: F.conv_transpose2d(x, m.weight * 2, stride=2, padding=1), ("conv",)
    ),
    "turned": Case(
        (21, 11, 3, 3), (IMAGE,),
        lambda m, x: F.conv_transpose2d(x, m.weight.transpose(0, 1), stride=2, output_padding=1), ("conv",),
    ),
    "turned convolution": Case(
        (11, 21, 3, 3), (IMAGE,), lambda m, x: F.conv2d(x, m.weight.permute(1, 0, 2, 3)), ("conv",)
    ),
    "flipped": Case((21, 11, 3, 2), (IMAGE,), lambda m, x: F.conv2d(x, m.weight.flip([2, 3])), ("conv",)),
    "conv1d": Case((21, 11, 5), ((2, 11, 9),), lambda m, x: F.conv1d(x, -m.weight, stride=2, padding=3), ("conv",)),
    "conv_transpose1d": Case(
        (11, 21, 4), ((2, 11, 9),), lambda m, x: F.conv_transpose1d(x, m.weight, stride=2, padding=1), ("conv",)
    ),
    "linear": Case(
        (21, 11), ((3, 4, 11),), lambda m, x: F.linear(x, m.weight * 0.1, m.bias), ("linear",), (("bias", (21,)),)
    ),
    "addmm": Case(
        (21, 11), ((5, 11),), lambda m, x: torch.addmm(m.bias.unsqueeze(0), x, m.weight.t()), ("linear",),
        (("bias", (21,)),),
    ),
    "matmul": Case((21, 11), ((5, 11),), lambda m, x: x.matmul(m.weight.T) + x @ m.weight.t(), ("linear",)),
    "the other side": Case((21, 11), ((11, 5),), lambda m, x: (m.weight @ x) + torch.mm(m.weight, x), ("linear",)),
    "input side": Case((11, 21), ((5, 11),), lambda m, x: x @ m.weight, ("linear",)),
    "vector": Case((21, 11), ((11,),), lambda m, x: torch.mv(m.weight, x) + F.linear(x, m.weight), ("linear",)),
    "matrix of taps": Case(
        (21, 11, 3, 2), ((4, 66),), lambda m, x: F.linear(x, m.weight.reshape(21, -1)), ("linear",)
    ),
    "modulated": Case((1, 21, 11, 3, 3), (IMAGE, (2, 11)), modulated, ("conv",)),
    "modulated, one image": Case((1, 21, 11, 3, 3), ((1, 11, 6, 5), (1, 11)), modulated, ("conv",)),
    "modulated 1x1": Case((1, 21, 11, 1, 1), (IMAGE, (2, 11)), modulated, ("conv",)),
    "modulated up": Case((1, 21, 11, 3, 3), (IMAGE, (2, 11)), lambda m, x, s: modulated(m, x, s, True), ("conv",)),
    "normalised first": Case((21, 11, 3, 3), (IMAGE, (2, 11)), normalised_first, ("conv",)),
    "unknown function": Case((21, 11), ((5, 11),), lambda m, x: torch.einsum("bi,oi->bo", x, m.weight), ()),
    "sum with a tensor": Case(
        (21, 11), ((5, 11),), lambda m, x: F.linear(x, m.weight + m.more), (), (("more", (21, 11)),)
    ),
    "penalty on rows": Case(
        (21, 11, 3, 3), ((2, 2),),
        lambda m, x: x.sum() * torch.mm(m.weight.view(21, -1), m.weight.view(21, -1).t()).sum(), (),
    ),
    "means": Case(
        (21, 11, 3, 3), ((2, 2),),
        lambda m, x: x.sum()
        * (m.weight.mean((0, 2, 3)).sum() + m.weight.abs().sum() + m.weight.square().mean(1).sum()),
        (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_every_use_equals_that_of_the_dense_weight(name: str, density: float) -> None:
    uses = check_equal(CASES[name], density)
    assert bool(uses.dense) == (not CASES[name].kinds)
    assert all("test_packed_weight.py:" in use for use in uses.dense)


# torch.compile traces neither torch._weight_norm nor a product of two packed weights.
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("weight norm", "penalty on rows")])
def test_compiled_whole_it_does_the_same(name: str) -> None:
    check_compiled(CASES[name])


def test_a_product_that_torch_compile_turns_round_is_refused_where_it_could_be_meant() -> None:
    module = Own((16, 16), lambda m, x: m.weight @ x)
    pack(module, "weight", block=(4, 4))
    x = torch.randn(16, 16, dtype=torch.float64)
    expected = module(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="does not tell x @ weight from weight @ x"):
        torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    module.use = lambda m, x: torch.matmul(m.weight, x)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)


SCORED = [name for name, case in CASES.items() if case.kinds and "norm" not in name and "modulated" not in name]


@pytest.mark.parametrize("name", [*SCORED, "unknown function"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_growth_scores_are_norms_of_the_dense_gradient(name: str, backend: str) -> None:
    """Of the weight that the operators see: factors that were multiplied in before are not undone."""
    case = CASES[name]
    module, dense = pair_of(case)
    packed = packed_in(module)
    packed.backend = backend
    inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in case.inputs)
    packed.request_scores()
    y = module(*inputs)
    y.square().sum().backward()
    dense(*inputs).square().sum().backward()
    assert dense.weight.grad is not None
    gradient = dense.weight.grad.reshape(packed.weight_shape)
    expected = torch.linalg.vector_norm(tp.as_blocks(gradient, packed.block), dim=(-2, -1))
    found = packed.take_scores()
    assert found.shape == packed.block_mask.shape
    if not case.parameters and "number" not in name and "linear" not in name and name != "transposed":
        torch.testing.assert_close(found, expected)
    else:  # scaled, by one number or by several: the same blocks have none
        assert torch.equal(found == 0, expected == 0)


def test_blocks_move_and_the_module_follows() -> None:
    module, _ = pair_of(CASES["times a number"])
    packed, x = packed_in(module), torch.randn(*IMAGE, dtype=torch.float64)
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    training = ddst.SparseTraining(nn.Sequential(module), optimizer, total_steps=40, interval=2)
    before = packed.block_mask
    for _ in range(8):
        optimizer.zero_grad()
        (module(x) - 1).square().mean().backward()
        optimizer.step()
        training.step()
    assert not torch.equal(packed.block_mask, before)
    torch.testing.assert_close(module(x), F.conv2d(x, packed.dense_weight() * 0.3, padding=1))


def test_a_weight_that_was_read_before_blocks_moved_raises() -> None:
    layer = ddst.SparseLinear(32, 32, density=0.5)
    weight, snapshot = layer.weight, layer.weight.clone()
    layer.set_block_mask(~layer.block_mask)
    with pytest.raises(RuntimeError, match=r"read layer\.weight anew"):
        F.linear(torch.ones(1, 32), weight)
    assert type(snapshot) is Tensor


def test_writing_into_a_product_raises() -> None:
    layer = ddst.SparseLinear(32, 32, density=0.5)
    for write in (lambda w: w.mul_(2), lambda w: w.zero_(), lambda w: nn.init.normal_(w)):
        with pytest.raises(RuntimeError, match="product or view of a packed weight"), torch.no_grad():
            write(layer.weight * 2)
    with pytest.raises(TypeError, match=r"unpacked\(\)"):
        nn.Parameter(layer.weight)
    layer.weight.requires_grad_(False)
    assert not layer.values.requires_grad


def test_autocast_computes_in_the_dtype_that_the_dense_layer_would() -> None:
    module = Own((16, 16, 3, 3), lambda m, x: F.conv2d(x, m.weight * 0.5)).float()
    pack(module, "weight")
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(2, 16, 5, 5)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("sizes", "shape", "axes"),
    [
        ([("o", 8), ("i", 4), ("t0", 1), ("t1", 1)], (8, 4, 1, 1), (("o",), ("i",), ("t0",), ("t1",))),
        ([("o", 8), ("i", 4), ("t0", 1), ("t1", 1)], (8, 4), (("o",), ("i", "t0", "t1"))),
        ([("o", 1), ("i", 4), ("t0", 3)], (1, 12), (("o",), ("i", "t0"))),
        ([("o", 8), ("i", 4)], (1, 8, 4), ((), ("o",), ("i",))),
        ([("n", 2), ("o", 8), ("i", 4)], (16, 4), (("n", "o"), ("i",))),
        ([("o", 8), ("i", 4)], (4, 8), None),
        ([("o", 8), ("i", 4)], (8, 2, 2), None),
        ([("o", 8), ("i", 4)], (8,), None),
    ],
)  # fmt: skip
def test_regroup(sizes: list[tuple[str, int]], shape: tuple[int, ...], axes: Any) -> None:
    assert regroup(sizes, shape) == axes


def test_what_it_says_of_itself() -> None:
    layer = ddst.SparseConv2d(11, 21, (3, 2), density=0.4, block=(8, 4))
    weight = layer.weight
    assert isinstance(weight, PackedWeight)
    assert (weight.shape, weight.dim(), weight.ndim, weight.size(1)) == (torch.Size((21, 11, 3, 2)), 4, 4, 11)
    assert (weight.dtype, weight.device, weight.numel(), len(weight)) == (torch.float32, torch.device("cpu"), 1386, 21)
    assert weight.requires_grad and weight.is_leaf and weight.is_floating_point() and weight.grad is None
    layer(torch.randn(1, 11, 6, 6)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, tp.unpack_slots(layer.values.grad, layer.slot_blocks, (21, 11, 3, 2)))
    assert float(weight.detach().unpacked().norm()) == pytest.approx(float(weight.detach().norm()))
    assert torch.equal(weight[None, :, :][0].unpacked(), weight.unpacked())
    assert torch.equal(weight[:, 3].detach(), weight.unpacked()[:, 3])
    with pytest.raises(AttributeError):
        weight.nothing  # noqa: B018
