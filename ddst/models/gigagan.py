"""GigaGAN, unconditional and small: convolutions that choose their kernel by the style, with attention between.

Source: Kang et al., Scaling up GANs for Text-to-Image Synthesis, CVPR 2023; attention by distances: Kim, Papamakarios
and Mnih, The Lipschitz Constant of Self-Attention, ICML 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dcgan import doublings


class AdaptiveConv2d(nn.Module):
    """``x[n] ∗ W'[n]``, W' a mean of kernels chosen by the style, times ``1 + s[n, i]``, of unit norm over i and taps.

    Args:
        c_in, c_out, side: of the convolution. style: length of w. kernels: to choose from. demodulate: to unit norm.

    `forward` takes x `[N, c_in, H, W]` and w `[N, style]`.

    >>> tuple(AdaptiveConv2d(4, 8, 3, 6, kernels=2)(torch.randn(2, 4, 5, 5), torch.randn(2, 6)).shape)
    (2, 8, 5, 5)
    """

    def __init__(self, c_in: int, c_out: int, side: int, style: int, kernels: int = 1, demodulate: bool = True) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(kernels, c_out, c_in, side, side) * (2 / (c_in * side**2)) ** 0.5)
        self.modulation = nn.Linear(style, c_in)
        self.choice = nn.Linear(style, kernels) if kernels > 1 else None
        self.demodulate = demodulate

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        n, c_in, height, width = x.shape
        weights = self.weights
        if self.choice is not None:
            shares = self.choice(w).softmax(-1)
            weights = (weights * shares[:, :, None, None, None, None]).sum(1)
        weights = weights * (self.modulation(w) + 1)[:, None, :, None, None]
        if self.demodulate:
            weights = weights * weights.square().sum((2, 3, 4), keepdim=True).clamp(min=1e-8).rsqrt()
        side = weights.shape[-1]
        y = F.conv2d(x.reshape(1, n * c_in, height, width), weights.flatten(0, 1), padding=side // 2, groups=n)
        return y.view(n, -1, height, width)


class Attention(nn.Module):
    """``x + O(V · softmax(−|q − k|²))`` over pixels, keys the queries, then ``x + F(x)``: 1x1 convolutions, GELU."""

    def __init__(self, c: int, head: int = 16) -> None:
        super().__init__()
        self.head, self.norm = head, nn.GroupNorm(1, c)
        self.query, self.value = nn.Conv2d(c, c, 1, bias=False), nn.Conv2d(c, c, 1, bias=False)
        self.out = nn.Conv2d(c, c, 1, bias=False)
        self.feed = nn.Sequential(nn.GroupNorm(1, c), nn.Conv2d(c, 2 * c, 1), nn.GELU(), nn.Conv2d(2 * c, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        query, value = (f(h).unflatten(1, (-1, self.head)).flatten(3).transpose(2, 3) for f in (self.query, self.value))
        squares = query.square().sum(-1)
        # −|q − k|² up to a term that is the same for all keys of a query.
        near = (2 * query @ query.transpose(2, 3) - squares[:, :, None]) * self.head**-0.5
        mixed = (near.softmax(-1) @ value).transpose(2, 3).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.feed(x)


class Generator(nn.Module):
    """G(z): a mapping network; at every side from 4 on two adaptive convolutions, attention where the map is small.

    Args:
        resolution: side of the images, ``4 * 2**k`` pixels. width: channels of every map, a multiple of 16.
        latent: length of z and of the styles. depth: of the mapping network. attention: the largest side with it.
        kernels: that each convolution chooses from (published: 1 to 8). channels: of the images.

    `forward` takes z `[N, latent]` and returns images `[N, channels, resolution, resolution]`.

    >>> tuple(Generator(resolution=8, width=16, latent=16)(torch.randn(2, 16)).shape)
    (2, 3, 8, 8)
    """

    def __init__(
        self,
        resolution: int = 32,
        width: int = 64,
        latent: int = 64,
        depth: int = 4,
        attention: int = 16,
        kernels: int = 1,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.resolution, self.channels, self.latent = resolution, channels, latent
        layers = [layer for _ in range(depth) for layer in (nn.Linear(latent, latent), nn.LeakyReLU(0.2))]
        self.mapping, self.const = nn.Sequential(*layers), nn.Parameter(torch.randn(width, 4, 4))
        self.convs, self.attention, self.to_image = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in range(doublings(resolution) + 1):
            self.convs.extend(AdaptiveConv2d(width, width, 3, latent, kernels) for _ in range(2))
            self.attention.append(Attention(width) if 4 << level <= attention else nn.Identity())
            self.to_image.append(AdaptiveConv2d(width, channels, 1, latent, 1, demodulate=False))

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z)
        x, image = self.const.expand(len(w), -1, -1, -1), torch.zeros((), dtype=w.dtype, device=w.device)
        for level, (attention, to_image) in enumerate(zip(self.attention, self.to_image, strict=True)):
            if level:
                x, image = (F.interpolate(t, scale_factor=2.0, mode="bilinear") for t in (x, image))
            for conv in self.convs[2 * level : 2 * level + 2]:
                x = F.leaky_relu(conv(x, w), 0.2)
            x = attention(x)
            image = image + to_image(x, w)
        return image


class Discriminator(nn.Module):
    """D(x): residual convolutions, attention where the map is small, and a score from every side below the largest.

    Args:
        resolution, width, attention, channels: as the generator's.

    `forward` takes images and returns scores `[N, log2(resolution / 4)]`, each of the whole map.

    >>> tuple(Discriminator(resolution=16, width=16)(torch.zeros(2, 3, 16, 16)).shape)
    (2, 2)
    """

    def __init__(self, resolution: int = 32, width: int = 64, attention: int = 16, channels: int = 3) -> None:
        super().__init__()
        self.resolution, self.channels = resolution, channels
        sides = [resolution >> i for i in range(1, doublings(resolution) + 1)]
        act = nn.LeakyReLU(0.2)
        self.from_image = nn.Conv2d(channels, width, 1)
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), act, nn.Conv2d(width, width, 3, 1, 1), act) for _ in sides
        )
        self.down = nn.ModuleList(nn.Conv2d(4 * width, width, 1) for _ in sides)
        self.attention = nn.ModuleList(Attention(width) if side <= attention else nn.Identity() for side in sides)
        self.scores = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3), act, nn.Conv2d(width, 1, 1)) for _ in sides
        )

    def forward(self, x: Tensor) -> Tensor:
        x, scores = self.from_image(x), []
        for conv, down, attention, score in zip(self.convs, self.down, self.attention, self.scores, strict=True):
            x = attention(down(F.pixel_unshuffle(x + conv(x), 2)))
            scores.append(score(x).mean((1, 2, 3)))
        return torch.stack(scores, 1)
