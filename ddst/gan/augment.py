"""DiffAugment: random changes of real and generated images alike that gradients pass through."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ddst._arguments import check_generator, check_tensor

KINDS = ("color", "translation", "cutout")


def diff_augment(images: Tensor, policy: Sequence[str] = KINDS, *, generator: torch.Generator | None = None) -> Tensor:
    """``T(x)``, another T for each image, differentiable in x.

    * "color": brightness ``x + u − ½``; then saturation, ``m + 2u · (x − m)`` with m each pixel's mean over channels;
      then contrast, ``m + (u + ½) · (x − m)`` with m the image's mean; u uniform in 0 … 1, drawn for each.
    * "translation": by up to an eighth of either side, in whole pixels, zeros move in.
    * "cutout": a square of half the side, zero, at a uniform place; it may reach over the edge.

    D sees augmented images only, in its own loss and in G's.

    Args:
        images: ``[N, C, H, W]``, in [-1, 1]. policy: which of them, done in the order above.
        generator: on the CPU; None: torch's default generator.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: Zhao et al., *Differentiable Augmentation for Data-Efficient GAN Training* (2020), section 3.

    >>> diff_augment(torch.ones(2, 3, 8, 8), ["cutout"]).shape
    torch.Size([2, 3, 8, 8])
    """
    check_tensor("images", images, 4)
    check_generator("generator", generator)
    if isinstance(policy, str) or not isinstance(policy, Sequence):
        raise TypeError(f"policy must be a list of {', '.join(KINDS)}, got {policy!r:.50}")
    unknown = [kind for kind in policy if kind not in KINDS]
    if unknown:
        raise ValueError(f"policy must hold {', '.join(KINDS)} only, got {unknown[0]!r:.50}")

    def draw() -> Tensor:
        # On the CPU, so that a seed means the same on every device.
        return torch.rand(len(images), 1, 1, 1, generator=generator).to(images)

    steps: dict[str, Callable[[Tensor, Callable[[], Tensor]], Tensor]] = {
        "color": _color, "translation": _translation, "cutout": _cutout,
    }  # fmt: skip
    for kind in KINDS:
        if kind in policy:
            images = steps[kind](images, draw)
    return images


def _color(x: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    x = x + (draw() - 0.5)
    mean = x.mean(1, keepdim=True)
    x = mean + 2 * draw() * (x - mean)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (draw() + 0.5) * (x - mean)


def _translation(x: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    places = []
    for size in x.shape[2:]:
        most = int(size / 8 + 0.5)
        shift = (draw().flatten() * (2 * most + 1)).long().clamp(max=2 * most) - most
        # One row or column of zeros before and behind: everything that comes from outside is one of them.
        places.append((torch.arange(size, device=x.device) + shift[:, None] + 1).clamp(0, size + 1))
    rows, columns = places
    padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(x: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    inside = []
    for size in x.shape[2:]:
        side = int(size / 2 + 0.5)
        count = size + (1 - side % 2)  # of places for the square's centre
        first = (draw().flatten() * count).long().clamp(max=count - 1) - side // 2
        place = torch.arange(size, device=x.device)
        inside.append((place >= first[:, None]) & (place < first[:, None] + side))
    rows, columns = inside
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
