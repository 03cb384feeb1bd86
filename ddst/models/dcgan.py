"""DCGAN: stacks of strided 4x4 convolutions, transposed in the generator.

Source: Radford, Metz and Chintala, Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
Networks, ICLR 2016.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from .inputs import check_noise


def bottom_of(resolution: int) -> int:
    """The side of the smallest map: 6 where ``resolution`` is 6 times a power of two, else 4.

    >>> bottom_of(64), bottom_of(48)
    (4, 6)
    """
    return 6 if resolution % 6 == 0 else 4


def doublings(resolution: int, bottom: int = 4) -> int:
    """How often a map doubles its side from ``bottom`` to ``resolution`` pixels.

    Raises:
        ValueError: ``resolution`` is not ``bottom`` times a power of two, at least twice ``bottom``.

    >>> doublings(64)
    4
    """
    ratio, rest = divmod(resolution, bottom)
    if rest or ratio < 2 or ratio & (ratio - 1):
        raise ValueError(f"resolution must be {bottom} times a power of two, got {resolution}")
    return ratio.bit_length() - 1


def init(module: nn.Module) -> None:
    """The published start, for ``network.apply``: N(0, 0.02²) weights of convolutions, N(1, 0.02²) of batch norms."""
    name = type(module).__name__
    if "Conv" in name:
        nn.init.normal_(module.weight, 0.0, 0.02)  # type: ignore[arg-type]
    elif "BatchNorm" in name:
        nn.init.normal_(module.weight, 1.0, 0.02)  # type: ignore[arg-type]
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]


class Generator(nn.Module):
    """G(z): z as a 1x1 map, transposed convolutions that double it, batch norm and ReLU between, tanh.

    Args:
        resolution: side of the images, ``4 * 2**k`` (published: 64) or ``6 * 2**k`` pixels.
        width: channels before the last layer; each layer further in has twice as many (published: 128, commonly 64).
        channels: of the images. latent: length of z.

    `forward` takes z `[N, latent]` and returns images `[N, channels, resolution, resolution]` in [-1, 1].

    >>> import torch
    >>> tuple(Generator(resolution=16, width=8)(torch.randn(2, 100)).shape)
    (2, 3, 16, 16)
    """

    def __init__(self, resolution: int = 32, width: int = 32, channels: int = 3, latent: int = 100) -> None:
        super().__init__()
        self.resolution, self.channels, self.latent = resolution, channels, latent
        bottom = bottom_of(resolution)
        widths = [width << i for i in reversed(range(doublings(resolution, bottom)))]
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent, widths[0], bottom, bias=False)]
        for c_in, c_out in itertools.pairwise(widths):
            layers += [nn.BatchNorm2d(c_in), nn.ReLU(True), nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(True), nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False)]
        self.main = nn.Sequential(*layers, nn.Tanh())
        self.apply(init)

    def forward(self, z: Tensor) -> Tensor:
        check_noise(z, self.latent)
        return self.main(z[:, :, None, None])


class Discriminator(nn.Module):
    """D(x): convolutions that halve the map, batch norm and leaky ReLU between, one 4x4 convolution to the score.

    Args:
        resolution: side of the images, as the generator's. channels: of the images.
        width: channels after the first layer; each further layer doubles them.

    `forward` takes images `[N, channels, resolution, resolution]` and returns scores `[N]`.

    >>> import torch
    >>> tuple(Discriminator(resolution=16, width=8)(torch.zeros(2, 3, 16, 16)).shape)
    (2,)
    """

    def __init__(self, resolution: int = 32, width: int = 32, channels: int = 3) -> None:
        super().__init__()
        self.resolution, self.channels = resolution, channels
        bottom = bottom_of(resolution)
        widths = [width << i for i in range(doublings(resolution, bottom))]
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
        for c_in, c_out in itertools.pairwise(widths):
            layers += [nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2, True)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, bottom, bias=False))
        self.apply(init)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).flatten()
