"""Layers of StyleGAN2: scaled where they use their weight, modulated by a style, blurred against aliasing.

Source: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020, section 2.2 and appendix B;
equalised learning rate: Karras et al., Progressive Growing of GANs, ICLR 2018, section 4.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EqualLinear(nn.Module):
    """``x (s W)ᵀ + r b``, ``s = r / sqrt(in)``, W from N(0, 1/r²): r is the learning rate's factor.

    >>> tuple(EqualLinear(4, 8)(torch.zeros(2, 4)).shape)
    (2, 8)
    """

    def __init__(self, c_in: int, c_out: int, start: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in) / rate)
        self.bias = nn.Parameter(torch.full((c_out,), start / rate))
        self.scale, self.rate = rate / math.sqrt(c_in), rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * self.rate)


class EqualConv2d(nn.Module):
    """``x ∗ (s W) + b``, ``s = 1 / sqrt(in · k²)``, W from N(0, 1).

    >>> tuple(EqualConv2d(4, 8, 3, padding=1)(torch.zeros(1, 4, 5, 5)).shape)
    (1, 8, 5, 5)
    """

    def __init__(self, c_in: int, c_out: int, side: int, stride: int = 1, padding: int = 0, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, side, side))
        self.bias = nn.Parameter(torch.zeros(c_out)) if bias else None
        self.scale, self.stride, self.padding = 1 / math.sqrt(c_in * side**2), stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, bias=self.bias, stride=self.stride, padding=self.padding)


class Blur(nn.Module):
    """Every channel with the binomial 4x4 filter, which sums to ``gain``.

    >>> tuple(Blur()(torch.zeros(1, 2, 5, 5), (2, 1)).shape), tuple(Blur().up(torch.zeros(1, 2, 5, 5)).shape)
    ((1, 2, 5, 5), (1, 2, 10, 10))
    """

    kernel: Tensor

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", gain * line[:, None] * line)

    def _each(self, x: Tensor) -> Tensor:
        return self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)

    def forward(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        before, after = padding
        return F.conv2d(F.pad(x, (before, after, before, after)), self._each(x), groups=x.shape[1])

    def up(self, x: Tensor) -> Tensor:
        """Twice the side: zeros between the pixels, then the filter, of gain 4."""
        return F.conv_transpose2d(x, self._each(x), stride=2, padding=1, groups=x.shape[1])


class ModulatedConv2d(nn.Module):
    """``x ∗ W'``, ``W'[n, o, i] = s[n, i] W[o, i]``, demodulated: divided by its norm over i and taps.

    The style s is a linear function of w. ``up`` doubles the side by a transposed convolution of stride 2 and a blur.

    Args:
        c_in, c_out, side: of the convolution. style: length of w. demodulate, up: whether it does.
        fused: makes every sample's weight, and convolves the batch as groups of one image. Else activations are
            multiplied by s before, and by the inverse norms after, one convolution with the shared weight. Equal.

    `forward` takes x `[N, c_in, H, W]` and w `[N, style]`.

    >>> layer, x, w = ModulatedConv2d(4, 8, 3, 6, up=True), torch.randn(2, 4, 5, 5), torch.randn(2, 6)
    >>> y = layer(x, w)
    >>> layer.fused = False
    >>> tuple(y.shape), torch.allclose(layer(x, w), y, atol=1e-5)
    ((2, 8, 10, 10), True)
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        side: int,
        style: int,
        demodulate: bool = True,
        up: bool = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, c_out, c_in, side, side))
        self.modulation = EqualLinear(style, c_in, start=1.0)
        self.scale, self.padding = 1 / math.sqrt(c_in * side**2), side // 2
        self.demodulate, self.up, self.fused = demodulate, up, fused
        self.blur = Blur(gain=4.0) if up else None

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.modulation(w)
        # As many groups as images would be the one number of images that an exported program takes.
        grouped = self.fused and not torch.compiler.is_exporting()
        return self._grouped(x, style) if grouped else self._scaled(x, style)

    def _grouped(self, x: Tensor, style: Tensor) -> Tensor:
        n, c_in, height, width = x.shape
        c_out, side = self.weight.shape[1], self.weight.shape[-1]
        weight = self.scale * self.weight * style.view(n, 1, c_in, 1, 1)
        if self.demodulate:
            norms = torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8)
            weight = weight * norms.view(n, c_out, 1, 1, 1)
        x = x.reshape(1, n * c_in, height, width)
        if self.blur is None:
            y = F.conv2d(x, weight.view(n * c_out, c_in, side, side), padding=self.padding, groups=n)
            return y.view(n, c_out, *y.shape[2:])
        weight = weight.transpose(1, 2).reshape(n * c_in, c_out, side, side)
        y = F.conv_transpose2d(x, weight, stride=2, groups=n)
        return self.blur(y.view(n, c_out, *y.shape[2:]), (1, 1))

    def _scaled(self, x: Tensor, style: Tensor) -> Tensor:
        weight = self.scale * self.weight.squeeze(0)
        x = x * style[:, :, None, None]
        if self.blur is None:
            y = F.conv2d(x, weight, padding=self.padding)
        else:
            y = self.blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), (1, 1))
        if self.demodulate:
            squares = (weight.unsqueeze(0) * style[:, None, :, None, None]).square().sum([2, 3, 4])
            y = y * torch.rsqrt(squares + 1e-8)[:, :, None, None]
        return y
