"""What code bases do with a weight before they use it: which forms stay packed, and that all of them are right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.packed_uses import Case, check_compiled, check_equal


def per_image(x: Tensor, weight: Any, n: int, **settings: Any) -> Tensor:
    """A convolution with a weight [n, O, I, k, k] of its own for each image."""
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight.reshape(-1, *weight.shape[2:]), groups=n, **settings)
    return y.reshape(n, -1, *y.shape[2:])


def one_plus_style(m: Any, x: Tensor, style: Tensor) -> Tensor:
    """Modulation by style + 1, demodulation by sums that keep their dimensions."""
    weight = m.weight[None, :, :, :, :] * (style[:, None, :, None, None] + 1)
    return per_image(x, weight * torch.rsqrt((weight**2).sum(dim=(2, 3, 4), keepdim=True) + 1e-8), len(x), padding=1)


def normed_per_image(m: Any, x: Tensor, style: Tensor) -> Tensor:
    """Demodulation by norms of flattened rows."""
    weight = m.weight.unsqueeze(0) * style.reshape(len(x), 1, -1, 1, 1)
    norms = weight.flatten(2).norm(dim=-1).add(1e-4).view(len(x), -1, 1, 1, 1)
    return per_image(x, weight / norms, len(x), stride=2, dilation=2, padding=2, bias=m.bias.repeat(len(x)))


def resampled(m: Any, x: Tensor, style: Tensor) -> Tensor:
    """Upsampling inside of a grouped convolution: the weight turned, and split and joined again."""
    n, (outputs, channels, height, width) = len(x), m.weight.shape
    w = (m.weight.unsqueeze(0) * style.reshape(n, 1, -1, 1, 1)).reshape(-1, channels, height, width)
    w = w.flip([2, 3]).reshape(n, outputs, channels, height, width).transpose(1, 2)
    w = w.reshape(n * channels, outputs, height, width)
    return F.conv_transpose2d(x.reshape(1, -1, *x.shape[2:]), w, stride=2, padding=1, groups=n)


def scaled_for_half(m: Any, x: Tensor, style: Tensor) -> Tensor:
    """Weights and styles divided by their largest entry, as before 16-bit modulation."""
    w = m.weight * (0.1 / m.weight.norm(math.inf, dim=[1, 2, 3], keepdim=True).add(1e-4))
    style = style / style.norm(math.inf, dim=1, keepdim=True)
    return per_image(x, w.unsqueeze(0) * style[:, None, :, None, None], len(x), padding="same")


def unit_rows(m: Any, x: Tensor) -> Tensor:
    """Rows of norm 1 and a gain, in the dtype of the input."""
    norm = torch.linalg.vector_norm(m.weight, dim=list(range(1, m.weight.ndim)), keepdim=True, dtype=torch.float64)
    norm = torch.add(1e-4, norm.to(x.dtype), alpha=math.sqrt(norm.numel() / m.weight.numel()))
    w = (m.weight / norm) * (m.gain / math.sqrt(m.weight[0].numel()))
    return F.conv2d(x, w.to(x.dtype), padding=(w.shape[-1] // 2,))


def standardised(m: Any, x: Tensor) -> Tensor:
    w = m.weight - m.weight.mean(dim=(1, 2, 3), keepdim=True)
    return F.conv2d(x, w / (w.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-3))


CIRCULAR = nn.Conv2d(11, 21, 3, padding=1, padding_mode="circular")

CONV, LINEAR = ("conv",), ("linear",)
W, V, IMAGE, ROWS = (21, 11, 3, 3), (21, 11), (2, 11, 6, 5), (5, 11)
IMAGE_8, STYLED = (2, 8, 6, 5), (IMAGE, (2, 11))

#: The form, and the functions that got the dense weight.
FORMS: dict[str, tuple[Case, set[str]]] = {
    # Modulated and demodulated.
    "one plus style": (Case(W, STYLED, one_plus_style, CONV), set()),
    "one plus style, one output": (Case((1, 11, 3, 3), STYLED, one_plus_style, CONV), set()),
    "one plus style, one input": (Case((21, 1, 3, 3), ((2, 1, 6, 5), (2, 1)), one_plus_style, CONV), set()),
    "one plus style, one image": (Case(W, ((1, 11, 6, 5), (1, 11)), one_plus_style, CONV), set()),
    "one plus style, as many images as outputs": (Case((2, 11, 3, 3), STYLED, one_plus_style, CONV), set()),
    "one plus style, as many images as inputs": (
        Case((21, 2, 3, 3), ((2, 2, 5, 5), (2, 2)), one_plus_style, CONV),
        set(),
    ),
    "normed per image": (Case(W, STYLED, normed_per_image, CONV, (("bias", (21,)),)), set()),
    "resampled": (Case((21, 11, 4, 4), STYLED, resampled, CONV), set()),
    "resampled, one input": (Case((21, 1, 4, 4), ((2, 1, 6, 5), (2, 1)), resampled, CONV), set()),
    "resampled, one output": (Case((1, 11, 4, 4), STYLED, resampled, CONV), set()),
    "resampled, one image": (Case((21, 11, 4, 4), ((1, 11, 6, 5), (1, 11)), resampled, CONV), set()),
    "scaled for half": (Case(W, STYLED, scaled_for_half, CONV), {"norm"}),
    "a gain per image": (
        Case(W, (IMAGE, (2,)), lambda m, x, g: per_image(x, m.weight * g.view(-1, 1, 1, 1, 1), 2), CONV),
        set(),
    ),
    "rows and columns per image": (
        Case(
            W,
            (IMAGE, (2, 11), (2, 21)),
            lambda m, x, s, d: per_image(
                x, m.weight * s[:, None, :, None, None] / (d[:, :, None, None, None] ** 2 + 1), 2
            ),
            CONV,
        ),
        set(),
    ),
    "expanded first": (
        Case(
            W,
            STYLED,
            lambda m, x, s: per_image(x, m.weight.expand(2, -1, -1, -1, -1) * s[:, None, :, None, None], 2),
            CONV,
        ),
        set(),
    ),
    "repeated": (
        Case(W, (IMAGE,), lambda m, x: F.conv2d(x.reshape(1, -1, 6, 5), m.weight.repeat(2, 1, 1, 1), groups=2), CONV),
        set(),
    ),
    "a matrix per image": (
        Case(V, (ROWS, (5, 11)), lambda m, x, s: torch.bmm(m.weight[None] * s[:, None, :], x[:, :, None]), ()),
        {"bmm"},
    ),
    "every entry per image": (
        Case(V, (ROWS, (5, 21, 11)), lambda m, x, f: torch.einsum("bi,boi->bo", x, m.weight * f), ()),
        {"mul"},
    ),
    # Scaled and normalised.
    "unit rows": (Case(W, (IMAGE,), unit_rows, CONV, (("gain", ()),)), {"__getitem__"}),
    "a number of numpy's": (
        Case(V, (ROWS,), lambda m, x: F.linear(x, np.float64(0.3) * m.weight * np.float32(0.5)), LINEAR),
        set(),
    ),
    "a gate per row": (
        Case(W, (IMAGE,), lambda m, x: F.conv2d(x, torch.sigmoid(m.gate) * m.weight), CONV, (("gate", (21, 1, 1, 1)),)),
        set(),
    ),
    "a mask": (Case(V, (ROWS,), lambda m, x: F.linear(x, (torch.ones(21, 11).tril() > 0) * m.weight), LINEAR), set()),
    "a gain per entry": (Case(V, (ROWS,), lambda m, x: F.linear(x, m.weight / m.gain), LINEAR, (("gain", V),)), set()),
    "integers": (
        Case(V, (ROWS,), lambda m, x: F.linear(x, m.weight / torch.arange(1, 232).view(21, 11) / 3), LINEAR),
        set(),
    ),
    "cosines": (Case(V, (ROWS,), lambda m, x: F.linear(F.normalize(x), F.normalize(m.weight)), LINEAR), set()),
    "root mean squares": (
        Case(
            V,
            (ROWS,),
            lambda m, x: F.linear(x, m.weight / (m.weight.pow(2).mean(axis=1, keepdims=True) + 1e-3).sqrt()),
            LINEAR,
        ),
        set(),
    ),
    "columns normed": (
        Case(
            V,
            (ROWS,),
            lambda m, x: F.linear(x, m.weight / (torch.linalg.norm(m.weight, dim=0, keepdim=True) + 1)),
            LINEAR,
        ),
        set(),
    ),
    "expanded norms": (
        Case(
            V,
            (ROWS,),
            lambda m, x: F.linear(x, m.weight / m.weight.norm(2, 1, True).add(1).expand_as(m.weight)),
            LINEAR,
        ),
        set(),
    ),
    "standardised": (Case(W, (IMAGE,), standardised, ()), {"sub"}),
    "squares by product": (Case(V, (ROWS,), lambda m, x: x.sum() * (m.weight * m.weight).sum(1), ()), set()),
    "odd power": (Case(V, (ROWS,), lambda m, x: F.linear(x, m.weight**3), LINEAR), set()),
    # Used.
    "1x1 as a matrix": (
        Case((21, 11, 1, 1), (IMAGE,), lambda m, x: m.weight.squeeze(3).squeeze(2) @ x.flatten(2), LINEAR),
        set(),
    ),
    "1x1 by index": (
        Case((21, 11, 1, 1), (IMAGE,), lambda m, x: torch.matmul(m.weight[:, :, 0, 0], x.flatten(2)), LINEAR),
        set(),
    ),
    "1x1 squeezed": (Case((21, 11, 1, 1), (ROWS,), lambda m, x: F.linear(x, m.weight.squeeze((2, 3))), LINEAR), set()),
    "unfolded": (Case(W, (IMAGE,), lambda m, x: m.weight.view(21, -1) @ F.unfold(x, 3, padding=1), LINEAR), set()),
    "there and back": (Case(V, (ROWS,), lambda m, x: F.linear(F.linear(x, m.weight), m.weight.t()), LINEAR), set()),
    "two dilations": (
        Case(
            W,
            (IMAGE,),
            lambda m, x: F.conv2d(x, m.weight, padding=1) + F.conv2d(x, m.weight, padding=2, dilation=2),
            CONV,
        ),
        set(),
    ),
    "by keyword": (Case(W, (IMAGE,), lambda m, x: torch.conv2d(input=x, weight=m.weight, stride=(2, 1)), CONV), set()),
    "linear by keyword": (Case(V, (ROWS,), lambda m, x: F.linear(weight=m.weight, input=x), LINEAR), set()),
    "one image without a batch": (Case(W, ((11, 6, 5),), lambda m, x: F.conv2d(x, m.weight), CONV), set()),
    "one signal without a batch": (
        Case((21, 11, 3), ((11, 9),), lambda m, x: F.conv1d(x, m.weight, padding="same"), CONV),
        set(),
    ),
    "channels last": (
        Case(
            W,
            (IMAGE,),
            lambda m, x: F.conv2d(
                x.contiguous(memory_format=torch.channels_last), m.weight.to(memory_format=torch.channels_last)
            ),
            CONV,
        ),
        set(),
    ),
    "circular padding": (Case(W, (IMAGE,), lambda m, x: CIRCULAR._conv_forward(x, m.weight, None), CONV), set()),
    "groups with columns and bias": (
        Case(
            (32, 4, 3, 3),
            ((2, 16, 6, 5),),
            lambda m, x: F.conv2d(x, m.weight * m.c, m.b, 2, 1, 1, 4) + m.weight.sum((0, 2, 3)).sum(),
            CONV,
            (("b", (32,)), ("c", (1, 4, 1, 1))),
        ),
        set(),
    ),
    "turned, in groups": (
        Case((16, 8, 3, 3), (IMAGE_8,), lambda m, x: F.conv_transpose2d(x, m.weight.transpose(0, 1), groups=2), ()),
        {"conv_transpose2d"},
    ),
    "torch.convolution": (
        Case(
            W, (IMAGE,), lambda m, x: torch.convolution(x, m.weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), ()
        ),
        {"convolution"},
    ),
    "aten.convolution": (
        Case(
            W,
            (IMAGE,),
            lambda m, x: torch.ops.aten.convolution(x, m.weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
            (),
        ),
        {"convolution"},
    ),
    "einsum": (Case(V, (ROWS,), lambda m, x: torch.einsum("bi,oi->bo", x, m.weight), ()), {"einsum"}),
    "bilinear": (Case((3, 5, 11), ((4, 5), (4, 11)), lambda m, a, b: F.bilinear(a, b, m.weight), ()), {"bilinear"}),
    "half of the rows": (Case(W, (IMAGE,), lambda m, x: F.conv2d(x, m.weight[:10]), ()), {"__getitem__"}),
    "a chunk": (Case(W, (IMAGE,), lambda m, x: F.conv2d(x, m.weight.chunk(2)[1]), ()), {"chunk"}),
    "joined": (Case(V, (ROWS,), lambda m, x: F.linear(x, torch.cat([m.weight, m.weight * 2])), ()), {"cat"}),
    "low rank added": (
        Case(V, (ROWS,), lambda m, x: F.linear(x, m.weight + m.b @ m.a), (), (("a", (2, 11)), ("b", (21, 2)))),
        {"add"},
    ),
    "taken from": (Case(V, (ROWS,), lambda m, x: F.linear(x, 1 - m.weight), ()), {"rsub"}),
    "divided into": (Case(V, (ROWS,), lambda m, x: F.linear(x, 1 / (m.weight + 9)), ()), {"add"}),
    "in three dimensions": (
        Case((21, 11, 3, 3), (IMAGE,), lambda m, x: F.conv3d(x[:, :, None], m.weight[:, :, None]), ()),
        {"conv3d"},
    ),
    # Asked.
    "sums of absolute values": (
        Case(W, ((2, 2),), lambda m, x: x.sum() * (m.weight.norm(1) + m.weight.norm(math.inf) + m.weight.amax()), ()),
        {"norm", "amax"},
    ),
    "spread": (
        Case(W, ((2, 2),), lambda m, x: x.sum() * (m.weight.std() + m.weight.var((1, 2, 3)).sum()), ()),
        {"std", "var"},
    ),
    "squares of rows": (
        Case(V, ((2, 2),), lambda m, x: x.sum() * ((m.weight @ m.weight.t()) * (1 - torch.eye(21))).pow(2).sum(), ()),
        {"matmul"},
    ),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("density", [0.05, 0.4])
def test_every_form_equals_that_of_the_dense_weight(name: str, density: float) -> None:
    case, dense = FORMS[name]
    uses = check_equal(case, density)
    assert {use.split(" at ")[0] for use in uses.dense} == dense
    assert all("test_packed_forms.py:" in use for use in uses.dense)


# torch.compile traces no product of two packed weights, and no numbers of numpy's.
UNTRACED = {"squares of rows", "squares by product", "a number of numpy's"}


@pytest.mark.parametrize("name", [name for name in FORMS if name not in UNTRACED])
def test_compiled_whole_every_form_is_the_same(name: str) -> None:
    check_compiled(FORMS[name][0])
