"""StyleGAN3's generator: Fourier features, modulated convolutions, nonlinearities at twice the sampling rate.

Weights and styles are brought to unit power before they are multiplied, and the input's power is tracked. A layer
samples its input up by two, applies the leaky ReLU, and filters it back, one that doubles the side half of the way. All
layers have one filter, where the paper designs one for each.

Source: Karras et al., Alias-Free Generative Adversarial Networks, NeurIPS 2021.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dcgan import doublings
from .stylegan3_layers import Linear, filtered, modulated_conv2d


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
        self.register_buffer("filter", (line / line.sum()).float())
        self.register_buffer("power", torch.ones(()))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.power.lerp_(x.square().mean(), 0.001)
        x = modulated_conv2d(x, self.weight, self.affine(w), padding=self.padding, gain=self.power.rsqrt())
        x = x + self.bias[:, None, None]
        for _ in range(2 if self.up else 1):
            x = filtered(x, 2 * self.filter, F.conv_transpose2d)
        return filtered(F.leaky_relu(x, 0.2) * math.sqrt(2), self.filter, F.conv2d)


class _ToImage(nn.Module):
    """1x1 modulated convolution without demodulation, bias."""

    def __init__(self, c_in: int, channels: int, style: int) -> None:
        super().__init__()
        self.affine, self.bias = Linear(style, c_in, start=1.0), nn.Parameter(torch.zeros(channels))
        self.weight = nn.Parameter(torch.randn(channels, c_in, 1, 1) / math.sqrt(c_in))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return modulated_conv2d(x, self.weight, self.affine(w), demodulate=False) + self.bias[:, None, None]


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
        self.to_image = _ToImage(width, channels, latent)

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt())
        x = self.input(len(w))
        for layer in self.layers:
            x = layer(x, w)
        return self.to_image(x, w)
