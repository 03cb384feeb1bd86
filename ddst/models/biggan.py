"""BigGAN: a class-conditional residual GAN with attention, spectral norm in both networks, a projection discriminator.

Source: Brock, Donahue and Simonyan, Large Scale GAN Training for High Fidelity Natural Image Synthesis, ICLR 2019;
Miyato and Koyama, cGANs with Projection Discriminator, ICLR 2018.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from .biggan_layers import Attention, Make
from .inputs import check_noise, embedded


class _ClassNorm(nn.Module):
    """Batch norm whose gain and shift are linear functions of a condition."""

    def __init__(self, c: int, condition: int, make: Make) -> None:
        super().__init__()
        self.gain, self.shift = make.linear(condition, c, bias=False), make.linear(condition, c, bias=False)
        self.norm = nn.BatchNorm2d(c, affine=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.norm(x) * (1 + self.gain(condition))[:, :, None, None] + self.shift(condition)[:, :, None, None]


class _UpBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, condition: int, make: Make) -> None:
        super().__init__()
        self.norm1, self.norm2 = _ClassNorm(c_in, condition, make), _ClassNorm(c_out, condition, make)
        self.conv1, self.conv2, self.short = make.conv(c_in, c_out), make.conv(c_out, c_out), make.conv(c_in, c_out, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.norm1(x, condition)), scale_factor=2.0))
        return self.conv2(F.relu(self.norm2(h, condition))) + self.short(F.interpolate(x, scale_factor=2.0))


class _DownBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, down: bool, make: Make) -> None:
        super().__init__()
        self.down = down
        self.conv1, self.conv2, self.short = make.conv(c_in, c_out), make.conv(c_out, c_out), make.conv(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(F.relu(x)))) + self.short(x)
        return F.avg_pool2d(h, 2) if self.down else h


class Generator(nn.Module):
    """G(z, y): every block gets a piece of z and the class's shared embedding as the condition of its batch norms.

    Args:
        multipliers: of `width`, for the 4x4 map and after each block, which double it (published at 128 pixels: 16, 16,
            8, 4, 2, 1). width: published 96. classes: of y. embedding: its size. latent: of each piece of z.
        attention: side of the map that has attention. channels: of images. norm: "torch" or "own" spectral norm.

    `forward` takes z `[N, latent · len(multipliers)]`, y `[N]` (int64), and returns images in [-1, 1].

    >>> G = Generator(multipliers=(2, 1), width=8, attention=8)
    >>> tuple(G(torch.randn(2, G.latent), torch.tensor([0, 1])).shape)
    (2, 3, 8, 8)
    """

    def __init__(
        self,
        multipliers: Sequence[int] = (4, 4, 2, 1),
        width: int = 16,
        classes: int = 10,
        embedding: int = 32,
        latent: int = 16,
        attention: int = 16,
        channels: int = 3,
        norm: str = "torch",
    ) -> None:
        super().__init__()
        make, widths = Make(norm), [width * m for m in multipliers]
        self.classes, self.latent = classes, latent * len(widths)
        self.embed = nn.Embedding(classes, embedding)
        self.linear = make.linear(latent, 16 * widths[0])
        self.blocks, self.attention = nn.ModuleList(), nn.ModuleList()
        for i, (c_in, c_out) in enumerate(itertools.pairwise(widths)):
            self.blocks.append(_UpBlock(c_in, c_out, embedding + latent, make))
            self.attention.append(Attention(c_out, make) if 8 << i == attention else nn.Identity())
        self.norm, self.to_image = nn.BatchNorm2d(widths[-1]), make.conv(widths[-1], channels)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        check_noise(z, self.latent)
        first, *pieces = z.chunk(len(self.blocks) + 1, 1)
        x, label = self.linear(first).unflatten(1, (-1, 4, 4)), embedded(self.embed, y)
        for block, attention, piece in zip(self.blocks, self.attention, pieces, strict=True):
            x = attention(block(x, torch.cat([label, piece], 1)))
        return torch.tanh(self.to_image(F.relu(self.norm(x))))


class Discriminator(nn.Module):
    """D(x, y) = w · h(x) + embed(y) · h(x), h the sum over pixels of residual blocks.

    Args:
        multipliers: of `width`, after each block (the last one does not halve the map). The rest as the generator's.

    `forward` takes images `[N, channels, H, W]` and classes `[N]`, and returns scores `[N]`.

    >>> tuple(Discriminator(multipliers=(1, 2), width=8)(torch.zeros(2, 3, 16, 16), torch.tensor([0, 1])).shape)
    (2,)
    """

    def __init__(
        self,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        width: int = 16,
        classes: int = 10,
        resolution: int = 32,
        attention: int = 16,
        channels: int = 3,
        norm: str = "torch",
    ) -> None:
        super().__init__()
        self.resolution, self.channels, self.classes = resolution, channels, classes
        make, widths = Make(norm), [channels, *(width * m for m in multipliers)]
        self.blocks = nn.Sequential()
        for i, (c_in, c_out) in enumerate(itertools.pairwise(widths)):
            self.blocks.append(_DownBlock(c_in, c_out, i < len(multipliers) - 1, make))
            if resolution >> (i + 1) == attention:
                self.blocks.append(Attention(c_out, make))
        self.linear, self.embed = make.linear(widths[-1], 1), nn.Embedding(classes, widths[-1])
        spectral_norm(self.embed)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.relu(self.blocks(x)).sum((2, 3))
        return self.linear(h).squeeze(1) + (embedded(self.embed, y) * h).sum(1)
