"""ESRGAN: super-resolution by residual-in-residual dense blocks, and Real-ESRGAN's discriminator, a U-Net.

Source: Wang et al., ESRGAN: Enhanced Super-Resolution Generative Adversarial Networks, ECCV Workshops 2018; Wang, Xie,
Dong and Shan, Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data, ICCV Workshops 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


class _Dense(nn.Module):
    """Five 3x3 convolutions, each of the input and all outputs before; x + 0.2 · the last."""

    def __init__(self, c: int, growth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c + i * growth, growth if i < 4 else c, 3, padding=1) for i in range(5))
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_normal_(conv.weight)
            conv.weight.data.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for conv in self.convs:
            y = conv(torch.cat(features, 1))
            features.append(F.leaky_relu(y, 0.2))
        return x + 0.2 * y


class _DenseInDense(nn.Module):
    """x + 0.2 · three dense blocks."""

    def __init__(self, c: int, growth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Dense(c, growth) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.blocks(x)


class Generator(nn.Module):
    """G(x): blocks at the small side, then nearest upsampling and a 3x3 convolution for each factor of 2.

    Args:
        width: channels of the trunk (published: 64). growth: of the dense blocks (published: 32).
        blocks: of three dense blocks each (published: 23). doublings: 2 for four times the side.
        resolution: side of the small images that it is trained on. channels: of the images.

    `forward` takes images `[N, channels, H, W]` and returns images `[N, channels, 2**doublings · H, …]`.

    >>> tuple(Generator(width=16, growth=8, blocks=1)(torch.zeros(1, 3, 8, 8)).shape)
    (1, 3, 32, 32)
    """

    def __init__(
        self,
        width: int = 32,
        growth: int = 16,
        blocks: int = 2,
        doublings: int = 2,
        resolution: int = 16,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.resolution, self.channels = resolution, channels
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.trunk = nn.Sequential(*(_DenseInDense(width, growth) for _ in range(blocks)))
        self.trunk.append(nn.Conv2d(width, width, 3, padding=1))
        self.up = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(doublings))
        self.sharp, self.last = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.trunk(x)
        for up in self.up:
            x = F.leaky_relu(up(F.interpolate(x, scale_factor=2.0, mode="nearest")), 0.2)
        return self.last(F.leaky_relu(self.sharp(x), 0.2))


class Discriminator(nn.Module):
    """D(x): a U-Net with a score for every pixel: three 4x4 convolutions down, three 3x3 up, spectral norm within.

    Args:
        width: channels at the images' side, doubled by each convolution down (published: 64).
        resolution: side of the images that it is trained on, a multiple of 8. channels: of the images.

    `forward` takes images `[N, channels, H, W]` and returns scores `[N, 1, H, W]`.

    >>> tuple(Discriminator(width=8)(torch.zeros(2, 3, 16, 16)).shape)
    (2, 1, 16, 16)
    """

    def __init__(self, width: int = 16, resolution: int = 32, channels: int = 3) -> None:
        super().__init__()
        self.resolution, self.channels = resolution, channels
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(
            spectral_norm(nn.Conv2d(width << i, width << i + 1, 4, 2, 1, bias=False)) for i in range(3)
        )
        self.up = nn.ModuleList(
            spectral_norm(nn.Conv2d(width << i + 1, width << i, 3, padding=1, bias=False)) for i in reversed(range(3))
        )
        self.last = nn.Sequential(
            *(spectral_norm(nn.Conv2d(width, width, 3, padding=1, bias=False)), nn.LeakyReLU(0.2)),
            *(spectral_norm(nn.Conv2d(width, width, 3, padding=1, bias=False)), nn.LeakyReLU(0.2)),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        maps = [F.leaky_relu(self.first(x), 0.2)]
        for down in self.down:
            maps.append(F.leaky_relu(down(maps[-1]), 0.2))
        x = maps.pop()
        for up in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
            x = F.leaky_relu(up(x), 0.2) + maps.pop()
        return self.last(x)
