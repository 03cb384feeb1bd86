"""FastGAN: gated up-blocks, small maps that scale the channels of large ones, a discriminator that also decodes.

Source: Liu, Zhu, Song and Elgammal, Towards Faster and Stabilized GAN Training for High-fidelity Few-shot Image
Synthesis, ICLR 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from .dcgan import doublings


def _conv(c_in: int, c_out: int, side: int, stride: int = 1, padding: int = 0, bias: bool = False) -> nn.Module:
    return spectral_norm(nn.Conv2d(c_in, c_out, side, stride, padding, bias=bias))


class _Noise(nn.Module):
    """Adds the same noise to every channel, times a learnt number that begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.strength * torch.randn(len(x), 1, *x.shape[2:], dtype=x.dtype, device=x.device)


def _up(c_in: int, c_out: int, noisy: bool) -> nn.Module:
    """Nearest upsampling, then one gated convolution, or two with noise."""
    layers: list[nn.Module] = [nn.Upsample(scale_factor=2)]
    for c in (c_in, c_out) if noisy else (c_in,):
        layers += [_conv(c, 2 * c_out, 3, 1, 1), *([_Noise()] if noisy else []), nn.BatchNorm2d(2 * c_out), nn.GLU(1)]
    return nn.Sequential(*layers)


class _Excite(nn.Module):
    """``large · s(small)``, s a 4x4 convolution of the pooled small map and a sigmoid: skip-layer excitation."""

    def __init__(self, c_small: int, c_large: int) -> None:
        super().__init__()
        convs = (_conv(c_small, c_large, 4), nn.SiLU(), _conv(c_large, c_large, 1), nn.Sigmoid())
        self.main = nn.Sequential(nn.AdaptiveAvgPool2d(4), *convs)

    def forward(self, small: Tensor, large: Tensor) -> Tensor:
        return large * self.main(small)


class Generator(nn.Module):
    """G(z): a transposed convolution to 4x4, then blocks that double the map; every second one has noise.

    Args:
        resolution: side of the images, ``8 * 2**k`` pixels from 32 on.
        width: channels at the full resolution, doubled at every smaller map up to 16 times.
        channels: of the images. latent: length of z (published: 256).

    `forward` takes z `[N, latent]` and returns images of the full and of half the resolution, both in [-1, 1].

    >>> [tuple(image.shape) for image in Generator(32, width=8)(torch.randn(2, 64))]
    [(2, 3, 32, 32), (2, 3, 16, 16)]
    """

    def __init__(self, resolution: int = 32, width: int = 16, channels: int = 3, latent: int = 64) -> None:
        super().__init__()
        self.resolution, self.channels, self.latent = resolution, channels, latent
        count = doublings(resolution)
        if count < 3:
            raise ValueError(f"resolution must be at least 32, got {resolution}")
        widths = [width * min(2**i, 16) for i in reversed(range(count + 1))]
        first = spectral_norm(nn.ConvTranspose2d(latent, 2 * widths[0], 4, bias=False))
        self.first = nn.Sequential(first, nn.BatchNorm2d(2 * widths[0]), nn.GLU(1))
        self.up = nn.ModuleList(_up(widths[i], widths[i + 1], noisy=i % 2 == 1) for i in range(count))
        # The last two maps are excited by those of an eighth of their side.
        self.excite = nn.ModuleList(_Excite(widths[i - 3], widths[i]) for i in (count - 1, count) if i >= 3)
        self.to_half, self.to_image = _conv(widths[-2], channels, 1), _conv(widths[-1], channels, 3, 1, 1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        maps = [self.first(z[:, :, None, None])]
        for i, up in enumerate(self.up, start=1):
            x, excite = up(maps[-1]), i - (len(self.up) + 1 - len(self.excite))
            maps.append(self.excite[excite](maps[i - 3], x) if excite >= 0 else x)
        return torch.tanh(self.to_image(maps[-1])), torch.tanh(self.to_half(maps[-2]))


class _Down(nn.Module):
    """Halves a map twice over: strided convolutions, and a pooled 1x1 convolution; the mean of both."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        act = nn.LeakyReLU(0.2)
        first = (_conv(c_in, c_out, 4, 2, 1), nn.BatchNorm2d(c_out), act)
        self.main = nn.Sequential(*first, _conv(c_out, c_out, 3, 1, 1), nn.BatchNorm2d(c_out), act)
        self.direct = nn.Sequential(nn.AvgPool2d(2), _conv(c_in, c_out, 1), nn.BatchNorm2d(c_out), act)

    def forward(self, x: Tensor) -> Tensor:
        return (self.main(x) + self.direct(x)) / 2


class Discriminator(nn.Module):
    """D(x): down-blocks with skip-layer excitation to an 8x8 map of scores, and a decoder that must restore the image.

    Args:
        resolution: side of the images, ``8 * 2**k`` pixels from 32 on. channels: of the images.
        width: channels after the first convolution, doubled by every block up to 8 times.

    `forward` takes images and returns scores `[N, 25]` and the restored images at 32x32 pixels.

    >>> scores, restored = Discriminator(32, width=8)(torch.zeros(2, 3, 32, 32))
    >>> tuple(scores.shape), tuple(restored.shape)
    ((2, 25), (2, 3, 32, 32))
    """

    def __init__(self, resolution: int = 32, width: int = 16, channels: int = 3) -> None:
        super().__init__()
        self.resolution, self.channels = resolution, channels
        count = doublings(resolution, 8)
        widths = [width * min(2**i, 8) for i in range(count)]
        self.first = nn.Sequential(_conv(channels, width, 4, 2, 1), nn.LeakyReLU(0.2))
        self.down = nn.ModuleList(_Down(widths[i], widths[i + 1]) for i in range(count - 1))
        self.excite, c = _Excite(width, widths[-1]), widths[-1]
        head = (_conv(c, 2 * c, 1), nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2))
        self.score = nn.Sequential(*head, _conv(2 * c, 1, 4, 1, 0))
        self.decode = nn.Sequential(*(_up(c, c, False) for _ in range(2)), _conv(c, channels, 3, 1, 1), nn.Tanh())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = h = self.first(x)
        for down in self.down:
            h = down(h)
        restored = self.decode(F.adaptive_avg_pool2d(h, 8))
        return self.score(self.excite(first, h)).flatten(1), restored
