"""HiFi-GAN: from mel spectrograms to sound by transposed 1-D convolutions, weight norm on every layer.

Source: Kong, Kim and Bae, HiFi-GAN: Generative Adversarial Networks for Efficient and High Fidelity Speech Synthesis,
NeurIPS 2020; the discriminator of scales: Kumar et al., MelGAN, NeurIPS 2019.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


def _conv(c_in: int, c_out: int, side: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Module:
    return weight_norm(nn.Conv1d(c_in, c_out, side, stride, dilation * (side - 1) // 2, dilation, groups))


class _Residual(nn.Module):
    """x + conv(lrelu(dilated(lrelu(x)))), once for each dilation."""

    def __init__(self, c: int, side: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.dilated = nn.ModuleList(_conv(c, c, side, dilation=d) for d in dilations)
        self.plain = nn.ModuleList(_conv(c, c, side) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for dilated, plain in zip(self.dilated, self.plain, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, 0.1)), 0.1))
        return x


class _Mean(nn.ModuleList):
    """The mean of what modules make of one input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([module(x) for module in self]).mean(0)


class Generator(nn.Module):
    """G(mel): transposed convolutions that multiply the length, each followed by the mean of several residual blocks.

    Args:
        width: channels before the first transposed convolution, halved by each (published: 512, or 128 for V2).
        rates: of upsampling (published: 8, 8, 2, 2); the kernels are twice as long.
        sides: of the residual blocks (published: 3, 7, 11). dilations: in each (published: 1, 3, 5). mels: bands.

    `forward` takes spectrograms `[N, mels, T]` and returns sound `[N, 1, T · Π rates]` in [-1, 1].

    >>> tuple(Generator(width=16, rates=(4, 2), mels=8)(torch.zeros(2, 8, 5)).shape)
    (2, 1, 40)
    """

    def __init__(
        self,
        width: int = 64,
        rates: Sequence[int] = (8, 8, 2, 2),
        sides: Sequence[int] = (3, 7, 11),
        dilations: Sequence[int] = (1, 3, 5),
        mels: int = 80,
    ) -> None:
        super().__init__()
        self.mels = mels
        self.first, c = _conv(mels, width, 7), width
        self.up, self.branches = nn.ModuleList(), nn.ModuleList()
        for rate in rates:
            up = nn.ConvTranspose1d(c, c // 2, 2 * rate, rate, (rate + 1) // 2, output_padding=rate % 2)
            self.up.append(weight_norm(up))
            c //= 2
            self.branches.append(_Mean(_Residual(c, side, dilations) for side in sides))
        self.last = _conv(c, 1, 7)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.first(mel)
        for up, branches in zip(self.up, self.branches, strict=True):
            x = branches(up(F.leaky_relu(x, 0.1)))
        return torch.tanh(self.last(F.leaky_relu(x, 0.1)))


class PeriodDiscriminator(nn.Module):
    """D_p(x): sound folded into rows of p samples, then convolutions along columns, one for each period p.

    Args:
        periods: p (published: 2, 3, 5, 7, 11). widths: channels (published: 32, 128, 512, 1024, 1024).

    `forward` takes sound `[N, 1, T]` and returns a list of scores `[N, ·]`, one for each period.

    >>> [tuple(scores.shape) for scores in PeriodDiscriminator((2, 3), (8, 16))(torch.zeros(2, 1, 100))]
    [(2, 34), (2, 36)]
    """

    def __init__(self, periods: Sequence[int] = (2, 3, 5), widths: Sequence[int] = (16, 32, 64, 64)) -> None:
        super().__init__()
        self.periods = tuple(periods)
        self.columns = nn.ModuleList(self._column(widths) for _ in periods)

    @staticmethod
    def _column(widths: Sequence[int]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for i, c in enumerate(widths):
            stride = 3 if i < len(widths) - 1 else 1
            layers += [weight_norm(nn.Conv2d(widths[i - 1] if i else 1, c, (5, 1), (stride, 1), (2, 0)))]
            layers.append(nn.LeakyReLU(0.1))
        return nn.Sequential(*layers, weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), 1, (1, 0))))

    def forward(self, x: Tensor) -> list[Tensor]:
        folded = (F.pad(x, (0, -x.shape[-1] % p), "reflect").unflatten(2, (-1, p)) for p in self.periods)
        return [column(rows).flatten(1) for column, rows in zip(self.columns, folded, strict=True)]


class ScaleDiscriminator(nn.Module):
    """D_s(x): long grouped convolutions along time, on the sound and on its means over 2, 4, … samples.

    Args:
        widths: channels (published: 128, 128, 256, 512, 1024, 1024, 1024). groups: of the layers between the first and
            the last of them; the last number goes on (published: 4, 16). scales: how many.

    `forward` takes sound `[N, 1, T]` and returns a list of scores `[N, ·]`, one for each scale.

    >>> [tuple(scores.shape) for scores in ScaleDiscriminator((8, 16, 16), (2,), scales=2)(torch.zeros(2, 1, 64))]
    [(2, 32), (2, 17)]
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 64, 64), groups: Sequence[int] = (4,), scales: int = 2) -> None:
        super().__init__()
        self.scales = nn.ModuleList(self._scale(widths, groups) for _ in range(scales))

    @staticmethod
    def _scale(widths: Sequence[int], groups: Sequence[int]) -> nn.Sequential:
        layers: list[nn.Module] = [_conv(1, widths[0], 15), nn.LeakyReLU(0.1)]
        for i, (c_in, c_out) in enumerate(itertools.pairwise(widths[:-1])):
            layers += [_conv(c_in, c_out, 41, 2, groups=groups[min(i, len(groups) - 1)]), nn.LeakyReLU(0.1)]
        layers += [_conv(widths[-2], widths[-1], 5), nn.LeakyReLU(0.1), _conv(widths[-1], 1, 3)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        scores = []
        for i, scale in enumerate(self.scales):
            x = F.avg_pool1d(x, 4, 2, 2) if i else x
            scores.append(scale(x).flatten(1))
        return scores
