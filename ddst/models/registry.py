"""The networks of `ddst.models` by name: how each is made, what a training step feeds it, at two sizes.

Benchmarks and tests go through :data:`MODELS`; a new architecture is one more line there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import (
    biggan,
    dcgan,
    esrgan,
    fastgan,
    gigagan,
    hifigan,
    pix2pix,
    r3gan,
    sngan,
    spade,
    stylegan2,
    stylegan3,
    vqgan,
)

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Model:
    """A network of the registry.

    Attributes:
        network: its class. inputs: ``(network, batch) -> arguments`` of a training step, drawn by torch's generator.
        full, tiny: the class's arguments at the size that is measured, and at that of tests.
        batch: of the measured size.

    >>> model = MODELS["dcgan-g"]
    >>> network = model.make("tiny")
    >>> [tuple(t.shape) for t in model.sample(network, batch=2)]
    [(2, 8)]
    """

    network: Callable[..., nn.Module]
    inputs: Callable[[Any, int], Inputs]
    full: Mapping[str, Any]
    tiny: Mapping[str, Any]
    batch: int

    def make(self, size: str = "full") -> nn.Module:
        """The network with new weights.

        Raises:
            ValueError: ``size`` is neither "full" nor "tiny".
        """
        if size not in ("full", "tiny"):
            raise ValueError(f"size must be 'full' or 'tiny', got {size!r}")
        return self.network(**(self.full if size == "full" else self.tiny))

    def sample(self, network: nn.Module, batch: int | None = None) -> Inputs:
        """Random arguments for a network that :meth:`make` made, on its device and of its dtype."""
        weight = next(p for p in network.parameters() if p.is_floating_point())
        drawn = self.inputs(network, self.batch if batch is None else batch)
        return tuple(t.to(weight.device, weight.dtype if t.is_floating_point() else t.dtype) for t in drawn)


def train_step(network: nn.Module, inputs: Inputs) -> Tensor:
    """``L = Σ mean(y²)`` over a network's outputs y, and the gradients of L in its parameters' ``grad``.

    Stands for any loss where only the work of a step matters.

    >>> network = nn.Linear(4, 2)
    >>> float(train_step(network, (torch.ones(3, 4),))) > 0, tuple(network.weight.grad.shape)
    (True, (2, 4))
    """
    network.zero_grad(set_to_none=True)
    loss = torch.stack([y.square().mean() for y in outputs_of(network(*inputs))]).sum()
    loss.backward()
    return loss.detach()


def outputs_of(value: Any) -> list[Tensor]:
    """The tensors of an output: a tensor, or lists and tuples of such.

    >>> len(outputs_of((torch.zeros(1), [torch.zeros(2), (torch.zeros(3),)])))
    3
    """
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in outputs_of(item)]


def _noise(network: Any, batch: int) -> Inputs:
    return (torch.randn(batch, network.latent),)


def _images(network: Any, batch: int) -> Inputs:
    return (torch.rand(batch, network.channels, network.resolution, network.resolution) * 2 - 1,)


def _classes(network: Any, batch: int) -> Tensor:
    return torch.arange(batch) % network.classes


def _noise_and_class(network: Any, batch: int) -> Inputs:
    return *_noise(network, batch), _classes(network, batch)


def _images_and_class(network: Any, batch: int) -> Inputs:
    return *_images(network, batch), _classes(network, batch)


def _noise_and_map(network: Any, batch: int) -> Inputs:
    side = network.resolution // 4
    classes = torch.randint(network.classes, (batch, side, side))
    layout = F.one_hot(classes, network.classes).permute(0, 3, 1, 2).float()
    return *_noise(network, batch), F.interpolate(layout, size=2 * (network.resolution,))


def _mels(network: Any, batch: int) -> Inputs:
    return (torch.randn(batch, network.mels, 32),)


def _sound(network: Any, batch: int) -> Inputs:
    return (torch.rand(batch, 1, 8192) * 2 - 1,)


_BIGGAN_G = {"multipliers": (16, 16, 8, 4, 2), "width": 32, "embedding": 128, "latent": 20, "classes": 100}
_BIGGAN_D = {"multipliers": (1, 2, 4, 8, 16), "width": 32, "resolution": 64, "attention": 32, "classes": 100}
_BIGGAN_G_TINY = {"multipliers": (2, 1), "width": 16, "embedding": 8, "latent": 8, "attention": 8}
_BIGGAN_D_TINY = {"multipliers": (1, 2), "width": 16, "resolution": 8, "attention": 4}
_OWN = {"norm": "own"}
_STYLE = {"resolution": 32, "width": 256, "latent": 256}
_STYLE_TINY = {"resolution": 8, "width": 16, "latent": 16, "depth": 2}

#: Every network by name, generators "-g" and discriminators "-d".
MODELS: dict[str, Model] = {
    "sngan-g": Model(sngan.Generator, _noise, {}, {"resolution": 8, "width": 16, "latent": 16}, 16),
    "sngan-d": Model(sngan.Discriminator, _images, {}, {"resolution": 8, "width": 16}, 16),
    "dcgan-g": Model(
        dcgan.Generator, _noise, {"resolution": 64, "width": 64}, {"resolution": 16, "width": 8, "latent": 8}, 64
    ),
    "dcgan-d": Model(dcgan.Discriminator, _images, {"resolution": 64, "width": 64}, {"resolution": 16, "width": 8}, 64),
    "pix2pix-g": Model(pix2pix.Generator, _images, {"resolution": 128, "width": 64}, {"resolution": 16, "width": 8}, 8),
    "pix2pix-d": Model(
        pix2pix.Discriminator, _images, {"resolution": 128, "width": 64}, {"resolution": 24, "width": 8, "layers": 2}, 8
    ),
    "biggan-g": Model(biggan.Generator, _noise_and_class, _BIGGAN_G, _BIGGAN_G_TINY, 8),
    "biggan-d": Model(biggan.Discriminator, _images_and_class, _BIGGAN_D, _BIGGAN_D_TINY, 16),
    "biggan-own-norm-g": Model(biggan.Generator, _noise_and_class, _BIGGAN_G | _OWN, _BIGGAN_G_TINY | _OWN, 8),
    "biggan-own-norm-d": Model(biggan.Discriminator, _images_and_class, _BIGGAN_D | _OWN, _BIGGAN_D_TINY | _OWN, 16),
    "fastgan-g": Model(
        fastgan.Generator,
        _noise,
        {"resolution": 64, "width": 32, "latent": 256},
        {"resolution": 32, "width": 8, "latent": 8},
        8,
    ),
    "fastgan-d": Model(
        fastgan.Discriminator, _images, {"resolution": 64, "width": 64}, {"resolution": 32, "width": 8}, 8
    ),
    "stylegan2-g": Model(stylegan2.Generator, _noise, _STYLE | {"depth": 8}, _STYLE_TINY, 8),
    "stylegan2-scaled-g": Model(
        stylegan2.Generator, _noise, _STYLE | {"depth": 8, "fused": False}, _STYLE_TINY | {"fused": False}, 8
    ),
    "stylegan2-d": Model(
        stylegan2.Discriminator, _images, {"resolution": 32, "width": 256}, {"resolution": 8, "width": 16}, 8
    ),
    "stylegan3-g": Model(stylegan3.Generator, _noise, _STYLE, _STYLE_TINY | {"resolution": 16}, 8),
    "r3gan-g": Model(
        r3gan.Generator, _noise, {"widths": (256, 256, 256, 256)}, {"widths": (16, 8), "blocks": 1, "group": 8}, 8
    ),
    "r3gan-d": Model(
        r3gan.Discriminator, _images, {"widths": (256, 256, 256, 256)}, {"widths": (8, 16), "blocks": 1, "group": 8}, 8
    ),
    "gigagan-g": Model(gigagan.Generator, _noise, _STYLE, _STYLE_TINY, 8),
    "gigagan-d": Model(
        gigagan.Discriminator, _images, {"resolution": 32, "width": 256}, {"resolution": 16, "width": 16}, 8
    ),
    "hifigan-g": Model(
        hifigan.Generator, _mels, {"width": 256}, {"width": 32, "rates": (4, 2), "sides": (3,), "mels": 8}, 2
    ),
    "hifigan-period-d": Model(
        hifigan.PeriodDiscriminator,
        _sound,
        {"periods": (2, 3, 5, 7, 11), "widths": (32, 128, 512, 1024, 1024)},
        {"periods": (2, 3), "widths": (8, 16)},
        2,
    ),
    "hifigan-scale-d": Model(
        hifigan.ScaleDiscriminator,
        _sound,
        {"widths": (128, 128, 256, 512, 1024, 1024), "groups": (4, 16), "scales": 3},
        {"widths": (16, 16, 16), "groups": (2,)},
        2,
    ),
    "vqgan-g": Model(
        vqgan.Autoencoder,
        _images,
        {"widths": (128, 128, 256), "codes": 1024, "code": 256, "resolution": 64},
        {"widths": (8, 16), "code": 16, "resolution": 8},
        2,
    ),
    "vqgan-d": Model(
        pix2pix.Discriminator,
        _images,
        {"channels": 3, "resolution": 64, "width": 64},
        {"channels": 3, "resolution": 24, "width": 8, "layers": 2},
        16,
    ),
    "esrgan-g": Model(
        esrgan.Generator,
        _images,
        {"width": 64, "growth": 32, "blocks": 4, "resolution": 32},
        {"width": 16, "growth": 8, "blocks": 1, "doublings": 1, "resolution": 8},
        2,
    ),
    "esrgan-d": Model(
        esrgan.Discriminator, _images, {"width": 64, "resolution": 64}, {"width": 8, "resolution": 16}, 2
    ),
    "spade-g": Model(
        spade.Generator,
        _noise_and_map,
        {"widths": (512, 512, 256, 128, 64), "classes": 32, "hidden": 128, "latent": 256},
        {"widths": (16, 8), "classes": 8, "hidden": 8, "latent": 8},
        2,
    ),
    "spade-d": Model(
        spade.Discriminator,
        _images,
        {"channels": 35, "width": 64, "layers": 4, "resolution": 64},
        {"channels": 11, "width": 8, "resolution": 32},
        8,
    ),
}
