"""VQGAN: an autoencoder whose code is the nearest entries of a learnt book; its discriminator is pix2pix's of patches.

Source: Esser, Rombach and Ommer, Taming Transformers for High-Resolution Image Synthesis, CVPR 2021; the code book: van
den Oord, Vinyals and Kavukcuoglu, Neural Discrete Representation Learning, NeurIPS 2017.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _norm(c: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, c // 4), c, eps=1e-6)


class _Residual(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), x by a 1x1 convolution where channels change."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = _norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.short = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return self.short(x) + h


class _Attention(nn.Module):
    """x + attention over pixels with one head, 1x1 convolutions for query, key, value and output."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.out = _norm(c), nn.Conv2d(c, c, 1)
        self.query, self.key, self.value = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        query, key, value = (f(h).flatten(2).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))


class _Down(nn.Module):
    """3x3 convolution of stride 2, padded below and on the right."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Up(nn.Module):
    """Nearest upsampling, then a 3x3 convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(c: int) -> list[nn.Module]:
    return [_Residual(c, c), _Attention(c), _Residual(c, c)]


class Autoencoder(nn.Module):
    """``x' = decode(nearest(encode(x)))``, the gradient of the decoder's input handed to the encoder's output.

    Args:
        widths: channels of the levels, each with half the side of the one before (published: 128, 128, 256, 256, 512).
        blocks: residual blocks of a level in the encoder, one more in the decoder (published: 2).
        codes: entries of the book (published: 1024 or 16384). code: length of an entry (published: 256).
        resolution: side of the images that it is trained on. channels: of the images.

    `forward` takes images `[N, channels, H, W]` and returns the images x', and the two differences between the code
    and its entries whose squares train book and encoder: each stops the gradient of the other side.

    >>> image, book, commitment = Autoencoder((8, 16), blocks=1)(torch.zeros(2, 3, 16, 16))
    >>> tuple(image.shape), tuple(book.shape)
    ((2, 3, 16, 16), (2, 32, 8, 8))
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 64),
        blocks: int = 1,
        codes: int = 64,
        code: int = 32,
        resolution: int = 32,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.resolution, self.channels = resolution, channels
        encoder: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1)]
        for i, (c_in, c) in enumerate(itertools.pairwise((widths[0], *widths))):
            encoder += [_Residual(c_in, c), *(_Residual(c, c) for _ in range(blocks - 1))]
            encoder += [_Down(c)] if i < len(widths) - 1 else []
        c = widths[-1]
        self.encoder = nn.Sequential(*encoder, *_middle(c), _norm(c), nn.SiLU(), nn.Conv2d(c, code, 3, padding=1))
        self.to_code, self.from_code = nn.Conv2d(code, code, 1), nn.Conv2d(code, code, 1)
        self.book = nn.Embedding(codes, code)
        nn.init.uniform_(self.book.weight, -1 / codes, 1 / codes)
        decoder: list[nn.Module] = [nn.Conv2d(code, c, 3, padding=1), *_middle(c)]
        for i, (c_in, c) in enumerate(itertools.pairwise((widths[-1], *reversed(widths)))):
            decoder += [_Residual(c_in, c), *(_Residual(c, c) for _ in range(blocks))]
            decoder += [_Up(c)] if i < len(widths) - 1 else []
        c = widths[0]
        self.decoder = nn.Sequential(*decoder, _norm(c), nn.SiLU(), nn.Conv2d(c, channels, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code = self.to_code(self.encoder(x))
        with torch.no_grad():
            flat = code.permute(0, 2, 3, 1).flatten(0, 2)
            nearest = torch.cdist(flat, self.book.weight).argmin(1)
        entries = self.book(nearest).view(len(x), *code.shape[2:], -1).permute(0, 3, 1, 2)
        image = self.decoder(self.from_code(code + (entries - code).detach()))
        return image, entries - code.detach(), entries.detach() - code
