"""Fréchet distance between feature sets, its real-versus-real floor, and the class shares of generated images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ddst._arguments import check_one_of
from ddst.metrics.classifier import TRAINED, load_classifier, nearest_resolution
from ddst.metrics.statistics import Moments


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """``|μa − μb|² + tr(Σa + Σb − 2 (Σa^½ Σb Σa^½)^½)``, the Fréchet distance of two Gaussians fitted to the sets.

    Args:
        a: features `[N, F]`, any float type, N ≥ 2.
        b: features `[M, F]`.

    Returns:
        The distance, ≥ 0 up to rounding and clamped there; 0 for equal sets.

    Raises:
        ValueError: shapes that do not fit, fewer than two rows, or values that are not finite.

    Numerics: float64 throughout; the matrix roots come from symmetric eigenvalues, with negative rounding set to zero.

    Source: Heusel et al., GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017, equation 6.

    Example:
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> round(frechet_distance(x, x + 2), 6)  # Only the mean moved, by 2 in each of 3 features.
        12.0
    """
    for name, t in (("a", a), ("b", b)):
        if t.ndim != 2 or t.shape[0] < 2:
            raise ValueError(f"{name} must be [N, F] with N at least 2, got {list(t.shape)}")
        if not torch.isfinite(t).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have the same number of features, got {a.shape[1]} and {b.shape[1]}")
    return frechet_of_moments(Moments.of(a), Moments.of(b))


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """`frechet_distance` of what is left of two feature sets: their means and covariances.

    Example:
        >>> a, b = (Moments.of(torch.tensor([[0.0], [2.0]]) + shift) for shift in (0, 3))
        >>> round(frechet_of_moments(a, b), 6)
        9.0
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    shift = (a.mean - b.mean).square().sum()
    return max(0.0, float(shift + a.covariance.trace() + b.covariance.trace() - 2 * cross))


def real_floor(features: Tensor, splits: int = 5) -> float:
    """Mean Fréchet distance between the two halves of random splits of one real set: what perfect samples would score.

    Args:
        features: `[N, F]` of real images.
        splits: number of splits, seeded 0, 1, ...

    Returns:
        The mean distance. Halves are smaller than the whole set, so this is slightly above the floor of the whole set.
    """
    half, total = len(features) // 2, 0.0
    for seed in range(splits):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        total += frechet_distance(features[order[:half]], features[order[half:]])
    return total / splits


@dataclass(frozen=True)
class Quality:
    """What `evaluate_embedded` found.

    Attributes:
        distance: Fréchet distance of generated against real images.
        floor: real against real, see `real_floor`.
        shares: share of generated images the classifier puts in each of ten classes; sums to 1.
        resolution: the classifier's resolution, to which the images were resized where they differ.
    """

    distance: float
    floor: float
    shares: tuple[float, ...]
    resolution: int


@torch.no_grad()
def evaluate_embedded(real: Tensor, fake: Tensor | Iterable[Tensor], data: str = "digits") -> Quality:
    """Fréchet distance, floor and class shares of generated images, by the classifier of an embedded data set.

    Args:
        real: `[N, C, H, H]` real images in [-1, 1]; one channel for digits, three for shapes.
        fake: `[M, C, H, H]` generated ones at the same resolution, or parts of them: of each part only the features are
            kept, 64 numbers an image.
        data: "digits" or "shapes": what the images are of, or are meant to be.

    Returns:
        A `Quality`; the same inputs give the same numbers (no random numbers but the floor's own seeded splits).

    Raises:
        ValueError: images that are no squares of one size and of the data's channels, or not finite; another data set.
    """
    check_one_of("data", data, tuple(TRAINED))
    channels = TRAINED[data][0]
    if real.ndim != 4 or real.shape[1] != channels or real.shape[2] != real.shape[3]:
        raise ValueError(f"real must be [N, {channels}, H, H], got {list(real.shape)}")
    resolution = nearest_resolution(real.shape[-1], data)
    net = load_classifier(resolution, data)

    def features(images: Tensor) -> Tensor:
        images = images.float().contiguous()
        if images.shape[-1] != resolution:
            images = F.interpolate(images, size=(resolution, resolution), mode="bilinear", antialias=True)
        return net.features(images)

    def checked(part: Tensor) -> Tensor:
        if part.ndim != 4 or part.shape[1:] != real.shape[1:]:
            raise ValueError(f"fake must be [M, {', '.join(map(str, real.shape[1:]))}], got {list(part.shape)}")
        return part

    parts = (fake,) if isinstance(fake, Tensor) else fake
    real_features, fake_features = features(real), torch.cat([features(checked(part)) for part in parts])
    # The head was trained on unscaled features.
    classes = net.head(fake_features / net.scale).argmax(dim=1)
    shares = torch.bincount(classes, minlength=10).double() / len(classes)
    distance, floor = frechet_distance(real_features, fake_features), real_floor(real_features)
    return Quality(distance, floor, tuple(shares.tolist()), resolution)
