"""R3GAN: bottlenecks with grouped convolutions, biases and leaky ReLUs, no normalisation, the same in both networks.

A wrapper holds each convolution and computes with its weight, cast to the input's type.

Source: Huang, Gokaslan, Kuleshov and Tompkin, The GAN is dead; long live the GAN! A Modern GAN Baseline, NeurIPS 2024.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .inputs import check_noise


class Convolution(nn.Module):
    """``x ∗ W``, W the weight of a layer that is never called itself; a start of variance ``gain² / fan_in``.

    >>> tuple(Convolution(8, 16, 3, groups=2)(torch.zeros(1, 8, 5, 5)).shape)
    (1, 16, 5, 5)
    """

    def __init__(self, c_in: int, c_out: int, side: int, groups: int = 1, gain: float = 1.0) -> None:
        super().__init__()
        self.layer = nn.Conv2d(c_in, c_out, side, 1, (side - 1) // 2, groups=groups, bias=False)
        nn.init.normal_(self.layer.weight, 0.0, gain / math.sqrt(c_in // groups * side**2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            x,
            self.layer.weight.to(x.dtype),
            padding=self.layer.padding,
            groups=self.layer.groups,
        )


class _Activation(nn.Module):
    """A bias for each channel, then leaky ReLU."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.bias[:, None, None].to(x.dtype), 0.2)


class _Block(nn.Module):
    """x + a bottleneck turned inside out: 1x1 to more channels, 3x3 in groups, 1x1 back, which begins at 0."""

    def __init__(self, c: int, expansion: int, groups: int) -> None:
        super().__init__()
        wide, gain = expansion * c, math.sqrt(2 / (1 + 0.2**2)) * 0.5
        self.conv1, self.act1 = Convolution(c, wide, 1, gain=gain), _Activation(wide)
        self.conv2, self.act2 = Convolution(wide, wide, 3, groups, gain), _Activation(wide)
        self.conv3 = Convolution(wide, c, 1, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv3(self.act2(self.conv2(self.act1(self.conv1(x)))))


def _blocks(c: int, count: int, expansion: int, group: int) -> nn.Sequential:
    return nn.Sequential(*(_Block(c, expansion, expansion * c // group) for _ in range(count)))


class Generator(nn.Module):
    """G(z): a learnt 4x4 basis times a linear function of z, then stages of blocks, bilinear upsampling between.

    Args:
        widths: channels of the stages, from 4x4 pixels on, each with twice the side (published: 768 four times, 512,
            256, 128). blocks: of each stage (published: 2). expansion: of channels within a block (published: 2).
        group: channels in a group of the grouped convolutions (published: 16). latent: length of z.
        channels: of the images.

    `forward` takes z `[N, latent]` and returns images `[N, channels, 4 * 2**k, 4 * 2**k]`.

    >>> tuple(Generator((16, 8), blocks=1, group=8)(torch.randn(2, 64)).shape)
    (2, 3, 8, 8)
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 64, 32, 32),
        blocks: int = 2,
        expansion: int = 2,
        group: int = 16,
        latent: int = 64,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.latent = latent
        self.const = nn.Parameter(torch.randn(widths[0], 4, 4))
        self.linear = nn.Linear(latent, widths[0], bias=False)
        self.stages = nn.ModuleList(_blocks(c, blocks, expansion, group) for c in widths)
        self.changes = nn.ModuleList(_change(a, b) for a, b in itertools.pairwise(widths))
        self.to_image = Convolution(widths[-1], channels, 1)

    def forward(self, z: Tensor) -> Tensor:
        check_noise(z, self.latent)
        x = self.stages[0](self.const * self.linear(z)[:, :, None, None])
        for change, stage in zip(self.changes, self.stages[1:], strict=True):
            x = stage(F.interpolate(change(x), scale_factor=2.0, mode="bilinear"))
        return self.to_image(x)


def _change(c_in: int, c_out: int) -> nn.Module:
    return nn.Identity() if c_in == c_out else Convolution(c_in, c_out, 1)


class Discriminator(nn.Module):
    """D(x): the generator's stages in reverse, a 4x4 convolution of each channel by itself, a linear layer.

    Args:
        widths: channels of the stages from the images' side on, each with half the side, the last at 4x4. The rest as
            the generator's.

    `forward` takes images `[N, channels, 4 * 2**k, 4 * 2**k]` and returns scores `[N]`.

    >>> tuple(Discriminator((8, 16), blocks=1, group=8)(torch.zeros(2, 3, 8, 8)).shape)
    (2,)
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 32, 64, 64),
        blocks: int = 2,
        expansion: int = 2,
        group: int = 16,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.resolution, self.channels, c = 2 << len(widths), channels, widths[-1]
        self.from_image = Convolution(channels, widths[0], 1)
        self.stages = nn.ModuleList(_blocks(c, blocks, expansion, group) for c in widths)
        self.changes = nn.ModuleList(_change(a, b) for a, b in itertools.pairwise(widths))
        self.basis, self.linear = nn.Conv2d(c, c, 4, groups=c, bias=False), nn.Linear(c, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages[0](self.from_image(x))
        for change, stage in zip(self.changes, self.stages[1:], strict=True):
            x = stage(change(F.interpolate(x, scale_factor=0.5, mode="bilinear")))
        return self.linear(self.basis(x).flatten(1)).squeeze(1)
