"""SNGAN, the residual GAN of spectral normalisation, at any resolution that is 4 or 6 times a power of two.

32x32 with 256 generator channels and 128 discriminator channels is the published CIFAR-10 configuration; 48x48 has the
published STL-10 generator. Three operations are done in the cheaper of two equal orders: a 1x1 shortcut convolution
runs before nearest upsampling and after average pooling (both commute with it exactly), and the convolution to the
image multiplies first and shifts afterwards (`ImageConv2d`). Where nothing else reads a tensor, it is overwritten:
batch norm saves its input for backward, a ReLU its output and a convolution its input, so what batch norm and
convolutions return is free.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ..nn.deferred.dense import convolve_dense, full_topology
from ..nn.deferred.value import Deferred
from .inputs import check_noise


def generator_plan(resolution: int, width: int) -> tuple[int, list[int]]:
    """(bottom, channels): the side of the first feature map and the channel count after each up-block.

    Args:
        resolution: side of the image, `4 * 2**k` (constant width) or `6 * 2**k` pixels (every block halves the width).
        width: channels of the first feature map.

    Returns:
        The side of the map the linear layer makes (4 or 6), and `k + 1` channel counts: first of that map.

    Raises:
        ValueError: the resolution is neither, or the width cannot be halved that often.

    Example:
        >>> generator_plan(32, 256)
        (4, [256, 256, 256, 256])
        >>> generator_plan(48, 512)
        (6, [512, 256, 128, 64])
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    for bottom, halve in ((4, False), (6, True)):
        ratio, rest = divmod(resolution, bottom)
        if rest == 0 and ratio >= 2 and ratio & (ratio - 1) == 0:
            blocks = int(math.log2(ratio))
            if not halve:
                return bottom, [width] * (blocks + 1)
            if width % 2**blocks:
                raise ValueError(f"width must be divisible by {2**blocks} at resolution {resolution}, got {width}")
            return bottom, [width >> i for i in range(blocks + 1)]
    raise ValueError(f"resolution must be 8, 16, 32, 64, ... or 12, 24, 48, 96, ..., got {resolution}")


def _init(module: nn.Module, gain: float) -> None:
    assert isinstance(module, nn.Conv2d | nn.Linear)
    nn.init.xavier_uniform_(module.weight, gain=gain)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


class ImageConv2d(nn.Conv2d):
    """``y[n, o, p] = bias[o] + Σ_t (Σ_c W[o, c, t] · x[n, c, ·])[p + t − padding]``: a convolution to few channels.

    The inner sum is a 1x1 convolution to ``C_out · kH · kW`` channels (27 for colour), the outer one adds its outputs
    shifted. Libraries compute output channels in groups of a vector's width, 8 or 16: of a direct convolution to 3
    channels, four fifths of the work are padding.

    Args:
        in_channels, out_channels, kernel_size: of :class:`torch.nn.Conv2d`, an odd kernel side; stride 1, with bias,
            padded with zeros so that the image keeps its size.

    Raises:
        ValueError: the kernel side is even.

    Attributes:
        sparsify_as: the layer of torch that it equals, for which `ddst.sparsify` takes it.
        reads_deferred: `ddst.fuse` may put off the norm and activation in front of it, which it then runs itself, as a
            convolution with all blocks active.

    Numerics: that of the sum in another order.

    Cost: ``2 · N · H · W · C_in · C_out · kH · kW`` operations and ``N · H · W · C_out · kH · kW`` numbers of memory.

    Example:
        >>> layer, x = ImageConv2d(8, 3, 3), torch.randn(2, 8, 6, 6)
        >>> torch.allclose(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1), atol=1e-5)
        True
    """

    sparsify_as = nn.Conv2d
    reads_deferred = True

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        full_topology((out_channels, in_channels, kernel_size, kernel_size))  # which compiled code cannot make

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Deferred):
            fused: Tensor | None = convolve_dense(self, input)
            if fused is not None:
                return fused
            input = input.tensor()
        # F.fold adds column t at p + t − padding, so the taps go in mirrored.
        taps = self.weight.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, self.in_channels, 1, 1)
        columns = F.conv2d(input, taps).flatten(2)
        y = F.fold(columns, input.shape[2:], self.weight.shape[2:], padding=self.weight.shape[2] // 2)
        assert self.bias is not None
        last = input.is_contiguous(memory_format=torch.channels_last)
        y = y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        return y + self.bias[:, None, None].to(y.dtype)


class _UpBlock(nn.Module):
    """x -> conv(relu(bn(conv(up(relu(bn(x))))))) + up(conv1x1(x))."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1)
        _init(self.conv1, math.sqrt(2))
        _init(self.conv2, math.sqrt(2))
        _init(self.shortcut, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.bn1(x), inplace=True), scale_factor=2.0, mode="nearest")
        h = self.conv2(F.relu(self.bn2(self.conv1(h)), inplace=True))
        return h.add_(F.interpolate(self.shortcut(x), scale_factor=2.0, mode="nearest"))


class Generator(nn.Module):
    """G(z): linear to a 4x4 or 6x6 map, residual up-blocks, then batch norm, ReLU, 3x3 convolution and tanh.

    Args:
        resolution: side of the images in pixels, see `generator_plan`.
        width: channels of the first feature map (published: 256 at 32x32, 512 at 48x48).
        channels: image channels, 3 for colour and 1 for grey.
        latent: length of the noise vector z.

    `forward` takes z `[N, latent]` (float, standard normal) and returns images `[N, channels, resolution, resolution]`
    in [-1, 1], laid out channels_last.

    Cost: the work of the up-block convolutions and the linear layer falls with their density once they are sparse.

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks, ICLR 2018, appendix B.4.

    Example:
        >>> G = Generator(resolution=16, width=32, channels=1)
        >>> tuple(G(torch.randn(2, G.latent)).shape)
        (2, 1, 16, 16)
    """

    def __init__(self, resolution: int = 32, width: int = 256, channels: int = 3, latent: int = 128) -> None:
        super().__init__()
        self.bottom, plan = generator_plan(resolution, width)
        self.resolution, self.channels, self.latent = resolution, channels, latent
        self.linear = nn.Linear(latent, self.bottom * self.bottom * plan[0])
        self.blocks = nn.Sequential(*(_UpBlock(a, b) for a, b in itertools.pairwise(plan)))
        self.bn = nn.BatchNorm2d(plan[-1])
        self.to_image = ImageConv2d(plan[-1], channels, 3)
        _init(self.linear, 1.0)
        _init(self.to_image, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        check_noise(z, self.latent)
        h = self.linear(z).unflatten(1, (-1, self.bottom, self.bottom))
        h = self.blocks(h.contiguous(memory_format=torch.channels_last))
        return torch.tanh(self.to_image(F.relu(self.bn(h), inplace=True)))


class _DownBlock(nn.Module):
    """x -> pool(conv(relu(conv(relu(x))))) + shortcut(x); the first block of a network has no ReLU in front."""

    def __init__(self, c_in: int, c_out: int, down: bool, first: bool = False) -> None:
        super().__init__()
        self.down, self.first = down, first
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if down or c_in != c_out else None
        # Initialised before the spectral norm is attached, whose power iteration starts from these weights.
        _init(self.conv1, math.sqrt(2))
        _init(self.conv2, math.sqrt(2))
        spectral_norm(self.conv1)
        spectral_norm(self.conv2)
        if self.shortcut is not None:
            _init(self.shortcut, 1.0)
            spectral_norm(self.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x)), inplace=True))
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return h.add_(x if self.shortcut is None else self.shortcut(x))


class Discriminator(nn.Module):
    """D(x) = w . sum over pixels of relu(h(x)) + b, h four residual blocks, spectral norm on every layer.

    Args:
        resolution: side of the images in pixels, a multiple of 4 (two blocks halve it).
        width: channels of every block (published: 128).
        channels: image channels.

    `forward` takes images `[N, channels, resolution, resolution]` in [-1, 1] and returns scores `[N]`.

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks, ICLR 2018, appendix B.4.

    Example:
        >>> D = Discriminator(resolution=16, width=32, channels=1)
        >>> tuple(D(torch.zeros(2, 1, 16, 16)).shape)
        (2,)
    """

    def __init__(self, resolution: int = 32, width: int = 128, channels: int = 3) -> None:
        super().__init__()
        if resolution < 8 or resolution % 4:
            raise ValueError(f"resolution must be a multiple of 4 from 8 up, got {resolution}")
        self.resolution, self.channels = resolution, channels
        self.blocks = nn.Sequential(
            _DownBlock(channels, width, down=True, first=True),
            _DownBlock(width, width, down=True),
            _DownBlock(width, width, down=False),
            _DownBlock(width, width, down=False),
        )
        self.linear = nn.Linear(width, 1)
        _init(self.linear, 1.0)
        spectral_norm(self.linear)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.blocks(x)).sum(dim=(2, 3))
        return self.linear(h).squeeze(1)
