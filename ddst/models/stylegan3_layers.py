"""Layers of StyleGAN3: modulation of weights brought to unit power, linear layers, filters of single channels.

Source: Karras et al., Alias-Free Generative Adversarial Networks, NeurIPS 2021, appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def modulated_conv2d(
    x: Tensor, weight: Tensor, style: Tensor, demodulate: bool = True, padding: int = 0, gain: Tensor | None = None
) -> Tensor:
    """``x[n] ∗ (W · s[n])`` as one convolution with a group for each sample.

    Args:
        x: `[N, I, H, W]`. weight: `[O, I, k, k]`. style: `[N, I]`. gain: of the input, one number.
        demodulate: bring weight and style to unit power, and each sample's filters to unit norm.

    >>> x, weight, style = torch.randn(2, 4, 5, 5), torch.randn(8, 4, 3, 3), torch.randn(2, 4)
    >>> tuple(modulated_conv2d(x, weight, style, padding=1).shape)
    (2, 8, 5, 5)
    """
    n, c_in = style.shape
    c_out, _, side, _ = weight.shape
    if demodulate:
        weight = weight * weight.square().mean([1, 2, 3], keepdim=True).rsqrt()
        style = style * style.square().mean().rsqrt()
    w = weight.unsqueeze(0) * style[:, None, :, None, None]
    if demodulate:
        w = w * (w.square().sum([2, 3, 4]) + 1e-8).rsqrt()[:, :, None, None, None]
    if gain is not None:
        w = w * gain
    y = F.conv2d(x.reshape(1, n * c_in, *x.shape[2:]), w.reshape(-1, c_in, side, side), padding=padding, groups=n)
    return y.reshape(n, c_out, *y.shape[2:])


class Linear(nn.Module):
    """``x (g W)ᵀ + g' b``, then leaky ReLU if `act`; the gains g are applied where the weight is used.

    >>> tuple(Linear(4, 8)(torch.zeros(2, 4)).shape)
    (2, 8)
    """

    def __init__(self, c_in: int, c_out: int, start: float = 0.0, rate: float = 1.0, act: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in) / rate)
        self.bias = nn.Parameter(torch.full((c_out,), start / rate))
        self.weight_gain, self.bias_gain, self.act = rate / math.sqrt(c_in), rate, act

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.to(x.dtype) * self.weight_gain
        y = torch.addmm((self.bias * self.bias_gain).unsqueeze(0), x, w.t())
        return F.leaky_relu(y, 0.2) * math.sqrt(2) if self.act else y


def filtered(x: Tensor, line: Tensor, convolve: Callable[..., Tensor]) -> Tensor:
    """Every channel with a filter of 12 taps along columns, then rows; twice (transposed) or half the side."""
    for shape, stride, padding in (((12, 1), (2, 1), (5, 0)), ((1, 12), (1, 2), (0, 5))):
        taps = line.view(1, 1, *shape).expand(x.shape[1], -1, -1, -1)
        x = convolve(x, taps, stride=stride, padding=padding, groups=x.shape[1])
    return x
