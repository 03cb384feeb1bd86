"""The residual GAN of WGAN-GP at 64 pixels, and at other sides: batch norm in G, no normalisation in D.

Source: Gulrajani et al., Improved Training of Wasserstein GANs, NeurIPS 2017, appendix F.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dcgan import doublings
from .inputs import check_noise
from .sngan import ImageConv2d, _init, _UpBlock


def plan(resolution: int, width: int) -> list[int]:
    """Channels from the 4x4 map to the image's side: ``width`` twice, then half as many at each doubling.

    Raises:
        ValueError: the resolution is no 4 times a power of two, or the width cannot be halved that often.

    >>> plan(64, 512)
    [512, 512, 256, 128, 64]
    """
    count = doublings(resolution)
    if width % 2 ** (count - 1):
        raise ValueError(f"width must be divisible by {2 ** (count - 1)} at resolution {resolution}, got {width}")
    return [width, *(width >> i for i in range(count))]


class Generator(nn.Module):
    """G(z): linear to a 4x4 map, residual up-blocks with batch norm, then batch norm, ReLU, 3x3 convolution and tanh.

    Args:
        resolution: side of the images, ``4 * 2**k`` pixels (published: 64). width: channels of the first map
            (published: 512), see :func:`plan`. channels: of the images. latent: length of z.

    `forward` takes z `[N, latent]` and returns images `[N, channels, resolution, resolution]` in [-1, 1].

    >>> tuple(Generator(resolution=16, width=16)(torch.randn(2, 128)).shape)
    (2, 3, 16, 16)
    """

    def __init__(self, resolution: int = 64, width: int = 512, channels: int = 3, latent: int = 128) -> None:
        super().__init__()
        widths = plan(resolution, width)
        self.resolution, self.channels, self.latent = resolution, channels, latent
        self.linear = nn.Linear(latent, 16 * width)
        self.blocks = nn.Sequential(*(_UpBlock(a, b) for a, b in itertools.pairwise(widths)))
        self.bn, self.to_image = nn.BatchNorm2d(widths[-1]), ImageConv2d(widths[-1], channels, 3)
        _init(self.linear, 1.0)
        _init(self.to_image, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        check_noise(z, self.latent)
        h = self.linear(z).unflatten(1, (-1, 4, 4)).contiguous(memory_format=torch.channels_last)
        return torch.tanh(self.to_image(F.relu(self.bn(self.blocks(h)), inplace=True)))


class _DownBlock(nn.Module):
    """x -> pool(conv(relu(conv(relu(x))))) + conv1x1(pool(x))."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_in, 3, padding=1), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1)
        _init(self.conv1, math.sqrt(2))
        _init(self.conv2, math.sqrt(2))
        _init(self.shortcut, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(F.relu(x))))
        return F.avg_pool2d(h, 2) + self.shortcut(F.avg_pool2d(x, 2))


class Discriminator(nn.Module):
    """D(x): a 3x3 convolution, residual down-blocks to a 4x4 map, a linear layer; nothing mixes images of a batch.

    Args:
        resolution: as the generator's. width: channels of the last map (published: 512). channels: of the images.

    `forward` takes images and returns scores `[N]`.

    >>> tuple(Discriminator(resolution=16, width=16)(torch.zeros(2, 3, 16, 16)).shape)
    (2,)
    """

    def __init__(self, resolution: int = 64, width: int = 512, channels: int = 3) -> None:
        super().__init__()
        widths = plan(resolution, width)[::-1]
        self.resolution, self.channels = resolution, channels
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.Sequential(*(_DownBlock(a, b) for a, b in itertools.pairwise(widths)))
        self.linear = nn.Linear(16 * width, 1)
        _init(self.first, 1.0)
        _init(self.linear, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(self.first(x)).flatten(1)).squeeze(1)
