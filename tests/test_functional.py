"""The modulated convolution by name equals the form with a weight for each image, packed or dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddst
from ddst import topology as tp
from ddst.functional import modulated_conv2d
from helpers.packed_uses import Own, pack, packed_in


def for_each_image(
    x: Tensor, weight: Tensor, style: Tensor, demodulate: bool, stride: int, padding: int, up: int
) -> Tensor:
    weights = weight * style[:, None, :, None, None]
    if demodulate:
        weights = weights / (weights.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    images = []
    for image, w in zip(x, weights, strict=True):
        if up > 1:
            images.append(F.conv_transpose2d(image, w.transpose(0, 1), stride=up, padding=padding))
        else:
            images.append(F.conv2d(image, w, stride=stride, padding=padding))
    return torch.stack(images)


def derivatives(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    first = torch.autograd.grad(y, inputs, direction, create_graph=True)
    return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first[:2]), inputs, allow_unused=True)]


SETTINGS = [(True, 1, 1, 1), (False, 2, 0, 1), (True, 2, 1, 1), (True, 1, 0, 2), (False, 1, 1, 2)]


@pytest.mark.parametrize(("demodulate", "stride", "padding", "up"), SETTINGS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["layer", "weight", "leading", "tensor"])
def test_it_equals_a_weight_for_each_image(
    kind: str, batch: int, demodulate: bool, stride: int, padding: int, up: int
) -> None:
    torch.manual_seed(0)
    layer = ddst.SparseConv2d(11, 21, 3, density=0.4, block=(8, 4), dtype=torch.float64)
    module = Own((1, 21, 11, 3, 3), lambda m: m.weight)
    pack(module, "weight", 0.4)
    packed: Any = packed_in(module) if kind == "leading" else layer
    given: Any = {
        "layer": layer, "weight": layer.weight, "leading": module.weight, "tensor": layer.dense_weight().detach()
    }[kind]  # fmt: skip
    if kind == "tensor":
        given.requires_grad_()
    x = torch.randn(batch, 11, 6, 5, dtype=torch.float64, requires_grad=True)
    style = (torch.rand(batch, 11, dtype=torch.float64) + 0.5).requires_grad_()
    y = modulated_conv2d(x, given, style, demodulate=demodulate, stride=stride, padding=padding, up=up)
    dense = packed.dense_weight().detach().requires_grad_()
    expected = for_each_image(x, dense, style, demodulate, stride, padding, up)
    found = derivatives(y, [x, style, given if kind == "tensor" else packed.values])
    for mine, theirs in zip(found, derivatives(expected, [x, style, dense]), strict=True):
        if mine.dim() == 3:
            theirs = tp.pack_slots(theirs, packed.slot_blocks, packed.block)
        torch.testing.assert_close(mine, theirs)
    assert not packed.weight_uses.dense
    assert packed.weight_uses.packed == ({"conv"} if kind != "tensor" else set())


def test_a_weight_that_was_scaled_stays_packed_and_compiles() -> None:
    module = Own((21, 11, 3, 3), lambda m, x, s: modulated_conv2d(x, m.weight * 0.1, s, padding=1))
    pack(module, "weight")
    x, style = torch.randn(2, 11, 6, 5, dtype=torch.float64), torch.rand(2, 11, dtype=torch.float64)
    expected = module(x, style)
    assert not packed_in(module).weight_uses.dense
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x, style), expected)


def test_autocast_convolves_in_16_bits_and_demodulates_in_32() -> None:
    layer = ddst.SparseConv2d(16, 16, 3, density=0.5, block=8)
    x, style = torch.randn(2, 16, 6, 6), torch.rand(2, 16) * 100
    with torch.autocast("cpu", torch.bfloat16):
        y = modulated_conv2d(x, layer, style)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), modulated_conv2d(x, layer, style), rtol=0.05, atol=0.1)


X, STYLE = torch.ones(2, 16, 5, 5), torch.ones(2, 16)
WEIGHT = torch.ones(8, 16, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((X[0], WEIGHT, STYLE), "input must have 4 dimensions"),
        ((X[:, :8], WEIGHT, STYLE), "input must have the weight's 16 channels"),
        ((X, WEIGHT, STYLE[:1]), r"style must have the shape \(2, 16\), got \(1, 16\)"),
        ((X, nn.Conv2d(16, 8, 3), STYLE), "weight must be a SparseConv2d, a packed weight or a tensor, got Conv2d"),
        ((X, WEIGHT[0], STYLE), r"weight must have the shape \[C_out, C_in, kH, kW\]"),
        ((X, ddst.SparseConv2d(32, 32, 3, groups=2), STYLE), "groups=2"),
    ],
)
def test_errors_name_the_argument(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        modulated_conv2d(*arguments)


def test_stride_and_up_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="stride must be 1 where up is above 1"):
        modulated_conv2d(X, WEIGHT, STYLE, stride=2, up=2)
