"""SPADE (GauGAN): images from maps of classes, which scale and shift every pixel after each normalisation.

Source: Park, Liu, Wang and Zhu, Semantic Image Synthesis with Spatially-Adaptive Normalization, CVPR 2019; the
discriminator of two scales: Wang et al., High-Resolution Image Synthesis and Semantic Manipulation with Conditional
GANs, CVPR 2018.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


class Spade(nn.Module):
    """``norm(x) · (1 + γ(m)) + β(m)``, γ and β convolutions of the map m at x's side; batch norm without parameters.

    >>> tuple(Spade(8, 4, hidden=16)(torch.zeros(2, 8, 5, 5), torch.zeros(2, 4, 20, 20)).shape)
    (2, 8, 5, 5)
    """

    def __init__(self, c: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(c, affine=False)
        self.shared = nn.Sequential(nn.Conv2d(classes, hidden, 3, padding=1), nn.ReLU())
        self.gamma, self.beta = nn.Conv2d(hidden, c, 3, padding=1), nn.Conv2d(hidden, c, 3, padding=1)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        h = self.shared(F.interpolate(classes, size=x.shape[2:], mode="nearest"))
        return self.norm(x) * (1 + self.gamma(h)) + self.beta(h)


class _Block(nn.Module):
    """Residual block of two 3x3 convolutions under spectral norm, SPADE and leaky ReLU before each."""

    def __init__(self, c_in: int, c_out: int, classes: int, hidden: int) -> None:
        super().__init__()
        middle = min(c_in, c_out)
        self.norm1, self.norm2 = Spade(c_in, classes, hidden), Spade(middle, classes, hidden)
        self.conv1 = spectral_norm(nn.Conv2d(c_in, middle, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(middle, c_out, 3, padding=1))
        self.norm_short = Spade(c_in, classes, hidden) if c_in != c_out else None
        self.short = spectral_norm(nn.Conv2d(c_in, c_out, 1, bias=False)) if c_in != c_out else None

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(self.norm1(x, classes), 0.2))
        h = self.conv2(F.leaky_relu(self.norm2(h, classes), 0.2))
        if self.norm_short is not None and self.short is not None:
            x = self.short(self.norm_short(x, classes))
        return x + h


class Generator(nn.Module):
    """G(z, m): a linear layer to a small map, SPADE blocks with nearest upsampling between, a convolution, tanh.

    Args:
        widths: channels from the smallest map on, each level with twice the side (published: 1024 three times, 512,
            256, 128, 64). classes: channels of m. hidden: channels within each SPADE (published: 128).
        latent: length of z. channels: of the images. bottom: side of the smallest map.

    `forward` takes z `[N, latent]` and m `[N, classes, H, W]` (one-hot, float), and returns images in [-1, 1] of side
    ``bottom * 2**(len(widths) - 1)``.

    >>> G = Generator((16, 8), classes=4, hidden=8)
    >>> tuple(G(torch.zeros(2, 64), torch.zeros(2, 4, 8, 8)).shape)
    (2, 3, 8, 8)
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 64, 32, 16),
        classes: int = 8,
        hidden: int = 32,
        latent: int = 64,
        channels: int = 3,
        bottom: int = 4,
    ) -> None:
        super().__init__()
        self.latent, self.classes, self.bottom = latent, classes, bottom
        self.resolution = bottom << len(widths) - 1
        self.linear = nn.Linear(latent, widths[0] * bottom**2)
        pairs = itertools.pairwise((widths[0], *widths))
        self.blocks = nn.ModuleList(_Block(a, b, classes, hidden) for a, b in pairs)
        self.to_image = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z: Tensor, classes: Tensor) -> Tensor:
        x = self.linear(z).unflatten(1, (-1, self.bottom, self.bottom))
        for i, block in enumerate(self.blocks):
            x = block(F.interpolate(x, scale_factor=2.0, mode="nearest") if i else x, classes)
        return torch.tanh(self.to_image(F.leaky_relu(x, 0.2)))


class _Steps(nn.ModuleList):
    """One after the other; returns what each makes."""

    def forward(self, x: Tensor) -> list[Tensor]:
        made: list[Tensor] = []
        for module in self:
            x = module(x)
            made.append(x)
        return made


class Discriminator(nn.Module):
    """D(x, m): scores of patches at the images' side and at half of it; 4x4 convolutions, instance norm, spectral norm.

    Args:
        channels: of x and m together. width: after the first layer, doubled by each next (published: 64).
        layers: of every scale but the last (published: 4). scales: how many. resolution: of the images.

    `forward` takes images and maps, and returns for each scale the features of every layer, the last being the scores.

    >>> [[tuple(f.shape[1:3]) for f in scale] for scale in Discriminator(7, 8, 2)(torch.zeros(2, 7, 32, 32))]
    [[(8, 17), (16, 18), (1, 19)], [(8, 9), (16, 10), (1, 11)]]
    """

    def __init__(
        self, channels: int = 11, width: int = 16, layers: int = 3, scales: int = 2, resolution: int = 32
    ) -> None:
        super().__init__()
        self.resolution, self.channels = resolution, channels
        self.scales = nn.ModuleList(self._scale(channels, width, layers) for _ in range(scales))

    @staticmethod
    def _scale(channels: int, width: int, layers: int) -> _Steps:
        steps, c = _Steps([nn.Sequential(nn.Conv2d(channels, width, 4, 2, 2), nn.LeakyReLU(0.2))]), width
        for layer in range(1, layers):
            c_in, c = c, min(2 * c, 8 * width)
            conv = nn.Conv2d(c_in, c, 4, 2 if layer < layers - 1 else 1, 2, bias=False)
            steps.append(nn.Sequential(spectral_norm(conv), nn.InstanceNorm2d(c), nn.LeakyReLU(0.2)))
        steps.append(nn.Conv2d(c, 1, 4, 1, 2))
        return steps

    def forward(self, *images: Tensor) -> list[list[Tensor]]:
        x, scores = torch.cat(images, 1), []
        for i, steps in enumerate(self.scales):
            x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False) if i else x
            scores.append(steps(x))
        return scores
