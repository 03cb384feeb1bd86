"""pix2pix: a U-Net from image to image, and a discriminator of patches of both.

Source: Isola, Zhu, Zhou and Efros, Image-to-Image Translation with Conditional Adversarial Networks, CVPR 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .dcgan import doublings, init


class Generator(nn.Module):
    """G(x): 4x4 convolutions of stride 2 down to one pixel, transposed ones up again, each beside its mirror image.

    Every level but the outermost and the innermost has batch norm; the inner three on the way up have dropout, which is
    the network's only noise.

    Args:
        resolution: side of the images, a power of two from 8 pixels (published: 256).
        width: channels of the outermost level, doubled inwards up to 8 times (published: 64).
        channels: of the input and the output images.
        dropout: of the inner levels (published: 0.5).

    `forward` takes and returns images `[N, channels, resolution, resolution]`, the latter in [-1, 1].

    >>> tuple(Generator(resolution=16, width=8)(torch.zeros(2, 3, 16, 16)).shape)
    (2, 3, 16, 16)
    """

    def __init__(self, resolution: int = 32, width: int = 32, channels: int = 3, dropout: float = 0.5) -> None:
        super().__init__()
        self.resolution, self.channels = resolution, channels
        levels = doublings(resolution, 1)
        widths = [width * min(2**i, 8) for i in range(levels)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, c in enumerate(widths):
            outer, inner = level == 0, level == levels - 1
            c_in = channels if outer else widths[level - 1]
            bare = outer or inner
            down: list[nn.Module] = [] if outer else [nn.LeakyReLU(0.2)]
            down += [nn.Conv2d(c_in, c, 4, 2, 1, bias=bare), *([] if bare else [nn.BatchNorm2d(c)])]
            up: list[nn.Module] = [nn.ReLU(), nn.ConvTranspose2d(c if inner else 2 * c, c_in, 4, 2, 1, bias=outer)]
            up += [nn.Tanh()] if outer else [nn.BatchNorm2d(c_in)]
            if dropout and not outer and levels - 4 <= level < levels - 1:
                up.append(nn.Dropout(dropout))
            self.down.append(nn.Sequential(*down))
            self.up.insert(0, nn.Sequential(*up))
        self.apply(init)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        x = skips.pop()
        for up in self.up:
            x = up(x)
            x = torch.cat([x, skips.pop()], 1) if skips else x
        return x


class Discriminator(nn.Module):
    """D(x, y): a score for each 70x70 patch of an image and its translation (with three layers of stride 2).

    Args:
        channels: of all images together that `forward` is given (6: a pair in colour; 3: one image, as VQGAN's).
        width: channels after the first layer, doubled by each of the next. layers: of stride 2.

    `forward` takes images `[N, ·, H, W]` and returns scores `[N, 1, H / 2**layers - 2, W / 2**layers - 2]`.

    >>> x = torch.zeros(2, 3, 32, 32)
    >>> tuple(Discriminator(width=8)(x, x).shape)
    (2, 1, 2, 2)
    """

    def __init__(self, channels: int = 6, width: int = 32, layers: int = 3, resolution: int = 32) -> None:
        super().__init__()
        self.resolution, self.channels = resolution, channels
        main: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        c = width
        for layer in range(1, layers + 1):
            c_in, c = c, width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            main += [nn.Conv2d(c_in, c, 4, stride, 1, bias=False), nn.BatchNorm2d(c), nn.LeakyReLU(0.2, True)]
        self.main = nn.Sequential(*main, nn.Conv2d(c, 1, 4, 1, 1))
        self.apply(init)

    def forward(self, *images: Tensor) -> Tensor:
        return self.main(torch.cat(images, 1))
