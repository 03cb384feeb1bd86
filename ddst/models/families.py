"""The pairs of networks that ``ddst train --model`` trains, each at any resolution and width that its family has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from . import biggan, dcgan, r3gan, resnet, sngan, stylegan2


@dataclass(frozen=True)
class Sizes:
    """What both networks of a pair are made of.

    Attributes:
        resolution: side of the images. width_g, width_d: channels of the widest maps, G's first and D's last.
        latent: length of z. channels: of the images. classes: of the labels, for conditional pairs.
    """

    resolution: int
    width_g: int
    width_d: int
    latent: int
    channels: int = 3
    classes: int = 1


@dataclass(frozen=True)
class Family:
    """One architecture: how its pair is made, and how it is usually trained.

    Attributes:
        generator, discriminator: of some :class:`Sizes`; both raise ValueError for sizes that they do not have.
        loss, r1, r2: of :mod:`ddst.gan.losses`: its name and weights of the penalties.
        conditional: whether both also take classes. joint: whether real and generated images may pass D as one batch,
            that is, whether nothing in it mixes images.
        normed: those of "generator" and "discriminator" whose weights are under spectral norm. batch_norm: whether G
            has any.
    """

    generator: Callable[[Sizes], nn.Module]
    discriminator: Callable[[Sizes], nn.Module]
    loss: str = "hinge"
    r1: float = 0.0
    r2: float = 0.0
    conditional: bool = False
    joint: bool = True
    normed: tuple[str, ...] = ()
    batch_norm: bool = True
    check_sizes: Callable[[Sizes], object] = lambda sizes: None

    def check(self, resolution: int, width_g: int, width_d: int, latent: int) -> None:
        """Raises ValueError, by the argument's name, for sizes that the family does not have; builds nothing."""
        self.check_sizes(Sizes(resolution, width_g, width_d, latent))


def latent_of(name: str, resolution: int) -> int:
    """The usual length of z: 128, of BigGAN 32 for each piece up to 32 pixels and 20 above, as published.

    >>> latent_of("sngan", 32), latent_of("biggan", 32), latent_of("biggan", 128)
    (128, 128, 120)
    """
    if name != "biggan" or resolution not in (8, 16, 32, 64, 128):
        return 128
    pieces = dcgan.doublings(resolution) + 1
    return (32 if pieces <= 4 else 20) * pieces


def _biggan_multipliers(resolution: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """G's and D's, as published at 32, 64 and 128 pixels."""
    known = {64: ((16, 16, 8, 4, 2), (1, 2, 4, 8, 16)), 128: ((16, 16, 8, 4, 2, 1), (1, 2, 4, 8, 16, 16))}
    if resolution in (8, 16, 32):
        same = (4,) * (dcgan.doublings(resolution) + 1)
        return same, same
    if resolution not in known:
        raise ValueError(f"resolution must be 8, 16, 32, 64 or 128 with model biggan, got {resolution}")
    return known[resolution]


def _divided(name: str, width: int, by: int) -> int:
    if width % by:
        raise ValueError(f"{name} must be divisible by {by} at this resolution, got {width}")
    return width // by


def _biggan_attention(resolution: int) -> int:
    """Published: none at 32 pixels, at half the side above."""
    return resolution // 2 if resolution >= 64 else 0


def _biggan_g(s: Sizes) -> nn.Module:
    multipliers, _ = _biggan_multipliers(s.resolution)
    pieces = len(multipliers)
    return biggan.Generator(
        multipliers, _divided("width_g", s.width_g, multipliers[0]), s.classes, 128, s.latent // pieces,
        _biggan_attention(s.resolution), s.channels,
    )  # fmt: skip


def _biggan_d(s: Sizes) -> nn.Module:
    _, multipliers = _biggan_multipliers(s.resolution)
    return biggan.Discriminator(
        multipliers, _divided("width_d", s.width_d, multipliers[-1]), s.classes, s.resolution,
        _biggan_attention(s.resolution), s.channels,
    )  # fmt: skip


def _check_biggan(s: Sizes) -> None:
    of_g, of_d = _biggan_multipliers(s.resolution)
    # Attention has an eighth of its map's channels.
    least = 8 if s.resolution >= 64 else 1
    if _divided("width_g", s.width_g, of_g[0]) * min(of_g) < least:
        raise ValueError(f"width_g must be at least {least * of_g[0]} at this resolution, got {s.width_g}")
    if _divided("width_d", s.width_d, of_d[-1]) * min(of_d) < least:
        raise ValueError(f"width_d must be at least {least * of_d[-1]} at this resolution, got {s.width_d}")
    if s.latent % len(of_g):
        raise ValueError(f"latent must be divisible by {len(of_g)}, G's pieces of z, got {s.latent}")


def _dcgan_widths(s: Sizes) -> tuple[int, int]:
    times = 2 ** (dcgan.doublings(s.resolution, dcgan.bottom_of(s.resolution)) - 1)
    return _divided("width_g", s.width_g, times), _divided("width_d", s.width_d, times)


def _r3gan_stages(s: Sizes) -> int:
    for name, width in (("width_g", s.width_g), ("width_d", s.width_d)):
        _divided(name, width, 8)
    return dcgan.doublings(s.resolution) + 1


def _check_resnet(s: Sizes) -> None:
    for name, width in (("width_g", s.width_g), ("width_d", s.width_d)):
        _divided(name, width, 2 ** (dcgan.doublings(s.resolution) - 1))


#: By the name that ``ddst train --model`` takes.
FAMILIES: Mapping[str, Family] = {
    "sngan": Family(
        lambda s: sngan.Generator(s.resolution, s.width_g, s.channels, s.latent),
        lambda s: sngan.Discriminator(s.resolution, s.width_d, s.channels),
        normed=("discriminator",),
        check_sizes=lambda s: sngan.generator_plan(s.resolution, s.width_g),
    ),
    "resnet": Family(
        lambda s: resnet.Generator(s.resolution, s.width_g, s.channels, s.latent),
        lambda s: resnet.Discriminator(s.resolution, s.width_d, s.channels),
        loss="wgan",
        check_sizes=_check_resnet,
    ),
    "biggan": Family(
        _biggan_g, _biggan_d, conditional=True, normed=("generator", "discriminator"), check_sizes=_check_biggan
    ),
    "dcgan": Family(
        lambda s: dcgan.Generator(s.resolution, _dcgan_widths(s)[0], s.channels, s.latent),
        lambda s: dcgan.Discriminator(s.resolution, _dcgan_widths(s)[1], s.channels),
        loss="bce",
        joint=False,  # batch norm
        check_sizes=_dcgan_widths,
    ),
    "r3gan": Family(
        lambda s: r3gan.Generator((s.width_g,) * _r3gan_stages(s), latent=s.latent, channels=s.channels),
        lambda s: r3gan.Discriminator((s.width_d,) * _r3gan_stages(s), channels=s.channels),
        loss="relativistic",
        r1=1.0,
        r2=1.0,
        batch_norm=False,
        check_sizes=_r3gan_stages,
    ),
    "stylegan2": Family(
        lambda s: stylegan2.Generator(s.resolution, s.width_g, s.latent, channels=s.channels),
        lambda s: stylegan2.Discriminator(s.resolution, s.width_d, s.channels),
        loss="bce",
        r1=1.0,
        joint=False,  # the deviation over the batch
        batch_norm=False,
        check_sizes=lambda s: dcgan.doublings(s.resolution),
    ),
}
