"""StyleGAN3's generator: Fourier features, modulated convolutions, nonlinearities between a rise and a fall of sampling.

Weights and styles are brought to unit power before they are multiplied, and the input's power is tracked. A layer
samples its input up by two, applies the leaky ReLU, and filters it back; layers between two resolutions go back half
way. Layers of a resolution share one filter, where the paper designs one for each layer.

Source: Karras et al., Alias-Free Generative Adversarial Networks, NeurIPS 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dcgan import doublings


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


class _Input(nn.Module):
    """Sines of fixed random frequencies on a grid of pixels, mixed by a square matrix."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, c: int, side: int) -> None:
        super().__init__()
        self.side, self.weight = side, nn.Parameter(torch.randn(c, c))
        self.register_buffer("frequencies", torch.randn(c, 2) * side / 4)
        self.register_buffer("phases", torch.rand(c) - 0.5)

    def forward(self, n: int) -> Tensor:
        line = (torch.arange(self.side, device=self.phases.device).to(self.phases) + 0.5) / self.side - 0.5
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
        waves = torch.sin(2 * torch.pi * (grid @ self.frequencies.t() + self.phases))
        x = waves @ (self.weight / math.sqrt(len(self.weight))).t()
        return x.permute(2, 0, 1).expand(n, -1, -1, -1)


def _filtered(x: Tensor, line: Tensor, convolve: Callable[..., Tensor]) -> Tensor:
    """Every channel with a filter of 12 taps along columns, then rows; twice (transposed) or half the side."""
    for shape, stride, padding in (((12, 1), (2, 1), (5, 0)), ((1, 12), (1, 2), (0, 5))):
        taps = line.view(1, 1, *shape).expand(x.shape[1], -1, -1, -1)
        x = convolve(x, taps, stride=stride, padding=padding, groups=x.shape[1])
    return x


class _Layer(nn.Module):
    """Modulated convolution, bias, and the leaky ReLU at twice the output's rate, filtered back."""

    filter: Tensor
    power: Tensor

    def __init__(self, c_in: int, c_out: int, side: int, style: int, up: bool) -> None:
        super().__init__()
        self.affine, self.padding, self.up = Linear(style, c_in, start=1.0), side // 2, up
        self.weight = nn.Parameter(torch.randn(c_out, c_in, side, side))
        self.bias = nn.Parameter(torch.zeros(c_out))
        taps = torch.arange(12, dtype=torch.float64) - 5.5
        line = torch.sinc(taps / 2) * torch.kaiser_window(12, False, 5.0, dtype=torch.float64)
        self.register_buffer("filter", (line / line.sum()).to(torch.get_default_dtype()))
        self.register_buffer("power", torch.ones(()))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.power.lerp_(x.square().mean(), 0.001)
        x = modulated_conv2d(x, self.weight, self.affine(w), padding=self.padding, gain=self.power.rsqrt())
        x = x + self.bias[:, None, None]
        for _ in range(2 if self.up else 1):
            x = _filtered(x, 2 * self.filter, F.conv_transpose2d)
        return _filtered(F.leaky_relu(x, 0.2) * math.sqrt(2), self.filter, F.conv2d)


class Generator(nn.Module):
    """G(z): a mapping network, Fourier features of 8x8 pixels, two layers a resolution, a 1x1 layer to the image.

    Args:
        resolution: side of the images, ``8 * 2**k`` pixels. width: channels of every layer.
        latent: length of z and of the styles. depth: of the mapping network (published: 2).
        side: of the kernels, 3 (configuration T) or 1 (R). channels: of the images.

    `forward` takes z `[N, latent]` and returns images `[N, channels, resolution, resolution]`.

    >>> tuple(Generator(resolution=16, width=8, latent=16)(torch.randn(2, 16)).shape)
    (2, 3, 16, 16)
    """

    def __init__(
        self, resolution: int = 32, width: int = 64, latent: int = 64, depth: int = 2, side: int = 3, channels: int = 3
    ) -> None:
        super().__init__()
        self.resolution, self.channels, self.latent = resolution, channels, latent
        self.mapping = nn.Sequential(*(Linear(latent, latent, rate=0.01, act=True) for _ in range(depth)))
        self.input = _Input(width, 8)
        steps = [up for _ in range(doublings(resolution, 8)) for up in (False, True)]
        self.layers = nn.ModuleList(_Layer(width, width, side, latent, up) for up in steps)
        self.style, self.bias = Linear(latent, width, start=1.0), nn.Parameter(torch.zeros(channels))
        self.weight = nn.Parameter(torch.randn(channels, width, 1, 1) / math.sqrt(width))

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt())
        x = self.input(len(w))
        for layer in self.layers:
            x = layer(x, w)
        return modulated_conv2d(x, self.weight, self.style(w), demodulate=False) + self.bias[:, None, None]
