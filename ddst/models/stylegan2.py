"""StyleGAN2: a mapping network, convolutions modulated by its styles and demodulated, a residual discriminator.

Layers hold N(0, 1) weights and scale them where they use them (equalised learning rate).

Source: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020; equalised learning rate and the
deviation over the batch: Karras et al., Progressive Growing of GANs, ICLR 2018.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dcgan import doublings
from .inputs import check_noise
from .stylegan2_layers import Blur, EqualConv2d, EqualLinear, ModulatedConv2d


def act(x: Tensor) -> Tensor:
    """Leaky ReLU that keeps the variance."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


class _Styled(nn.Module):
    """Modulated convolution, noise (of a learnt strength, from 0), bias, leaky ReLU."""

    def __init__(self, c_in: int, c_out: int, style: int, up: bool, fused: bool) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(c_in, c_out, 3, style, up=up, fused=fused)
        self.strength, self.bias = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = self.conv(x, w)
        noise = torch.randn(x.shape[0], 1, *x.shape[2:], dtype=x.dtype, device=x.device)
        return act(x + self.strength * noise + self.bias[:, None, None])


class _ToImage(nn.Module):
    """1x1 modulated convolution without demodulation; adds the image of half the side, upsampled."""

    def __init__(self, c_in: int, channels: int, style: int, fused: bool) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(c_in, channels, 1, style, demodulate=False, fused=fused)
        self.bias, self.blur = nn.Parameter(torch.zeros(channels)), Blur(gain=4.0)

    def forward(self, x: Tensor, w: Tensor, image: Tensor | None) -> Tensor:
        y = self.conv(x, w) + self.bias[:, None, None]
        return y if image is None else y + self.blur.up(image)


class Generator(nn.Module):
    """G(z) = S(f(z)): f of linear layers; S begins at a learnt 4x4 map and adds up images of every resolution.

    Args:
        resolution: side of the images, ``4 * 2**k`` pixels. width: channels of every map.
        latent: length of z and of the styles (published: 512). depth: layers of f (published: 8).
        channels: of the images. fused: modulate weights, one grouped convolution for the batch; or else scale
            activations before and after a plain convolution.

    `forward` takes z `[N, latent]` and returns images `[N, channels, resolution, resolution]`, not limited to [-1, 1].

    >>> tuple(Generator(resolution=8, width=8, latent=16, depth=2)(torch.randn(2, 16)).shape)
    (2, 3, 8, 8)
    """

    def __init__(
        self,
        resolution: int = 32,
        width: int = 64,
        latent: int = 64,
        depth: int = 4,
        channels: int = 3,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.resolution, self.channels, self.latent = resolution, channels, latent
        self.mapping = nn.ModuleList(EqualLinear(latent, latent, rate=0.01) for _ in range(depth))
        self.const = nn.Parameter(torch.randn(1, width, 4, 4))
        levels = doublings(resolution)
        self.first = _Styled(width, width, latent, False, fused)
        self.first_image = _ToImage(width, channels, latent, fused)
        self.up = nn.ModuleList(_Styled(width, width, latent, True, fused) for _ in range(levels))
        self.same = nn.ModuleList(_Styled(width, width, latent, False, fused) for _ in range(levels))
        self.to_image = nn.ModuleList(_ToImage(width, channels, latent, fused) for _ in range(levels))

    def forward(self, z: Tensor) -> Tensor:
        check_noise(z, self.latent)
        w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.mapping:
            w = act(layer(w))
        x = self.first(self.const.expand(w.shape[0], -1, -1, -1), w)
        image = self.first_image(x, w, None)
        for up, same, to_image in zip(self.up, self.same, self.to_image, strict=True):
            x = same(up(x, w), w)
            image = to_image(x, w, image)
        return image


class _Down(nn.Module):
    """Two 3x3 convolutions, the second after a blur with stride 2; a blurred 1x1 convolution beside them."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.blur = Blur()
        self.conv1, self.conv2 = EqualConv2d(c_in, c_in, 3, padding=1), EqualConv2d(c_in, c_out, 3, stride=2)
        self.skip = EqualConv2d(c_in, c_out, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = act(self.conv2(self.blur(act(self.conv1(x)), (2, 2))))
        return (h + self.skip(self.blur(x, (1, 1)))) / math.sqrt(2)


class Discriminator(nn.Module):
    """D(x): residual down-blocks to 4x4, the deviation over the batch as one more channel, two linear layers.

    Args:
        resolution: side of the images, ``4 * 2**k`` pixels. width: channels of every map. channels: of the images.

    `forward` takes images and returns scores `[N]`.

    >>> tuple(Discriminator(resolution=8, width=8)(torch.zeros(2, 3, 8, 8)).shape)
    (2,)
    """

    def __init__(self, resolution: int = 32, width: int = 64, channels: int = 3) -> None:
        super().__init__()
        self.resolution, self.channels = resolution, channels
        self.first = EqualConv2d(channels, width, 1)
        self.blocks = nn.Sequential(*(_Down(width, width) for _ in range(doublings(resolution))))
        self.last = EqualConv2d(width + 1, width, 3, padding=1)
        self.linear1, self.linear2 = EqualLinear(16 * width, width), EqualLinear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(act(self.first(x)))
        deviation = (h.var(0, unbiased=False) + 1e-8).sqrt().mean().expand(len(h), 1, *h.shape[2:])
        h = act(self.last(torch.cat([h, deviation], 1)))
        return self.linear2(act(self.linear1(h.flatten(1)))).squeeze(1)
