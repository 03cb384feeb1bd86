"""Precision, recall, density and coverage: how two feature sets cover each other, by nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1024  # Rows of a distance matrix at once.


@dataclass(frozen=True)
class Manifolds:
    """What `prdc` found, each from 0 to 1 (density may be larger).

    Attributes:
        precision: share of generated features that lie in the ball of a real one.
        recall: share of real features that lie in the ball of a generated one.
        density: mean number of real balls a generated feature lies in, over k.
        coverage: share of real balls in which a generated feature lies.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: Tensor, fake: Tensor, k: int = 5) -> Manifolds:
    """``precision = P(fake ∈ ∪ B(real))``, ``recall = P(real ∈ ∪ B(fake))``, ``density = E[#{r : fake ∈ B(r)}] / k``,
    ``coverage = P(B(real) holds a fake)``; B(x) reaches as far as the k-th neighbour of x in its own set.

    Args:
        real, fake: features `[N, F]` and `[M, F]`, more than k rows each. **The order matters**: precision is of fake,
            recall of real; with the sets exchanged the two change places.
        k: neighbours, the set's own point not counted; 3 is usual for precision and recall alone, 5 for all four.

    Raises:
        ValueError: shapes that do not fit, too few rows, or values that are not finite.

    Numerics: differences in float64, so that features far from zero lose nothing; no random numbers.

    Cost: `(N + M)² F` multiply-adds, memory of 1,024 rows of the distances.

    Source: Kynkäänniemi et al., NeurIPS 2019, equations 1-2; Naeem et al., ICML 2020, equations 3-4.

    Example:
        >>> real = torch.arange(6.0)[:, None]
        >>> prdc(real, real[:3], k=1)
        Manifolds(precision=1.0, recall=0.6666666666666666, density=2.6666666666666665, coverage=0.6666666666666666)
    """
    for name, t in (("real", real), ("fake", fake)):
        if t.ndim != 2 or t.shape[0] <= k:
            raise ValueError(f"{name} must be [N, F] with more than k={k} rows, got {list(t.shape)}")
        if not torch.isfinite(t).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if k < 1 or real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"k must be at least 1 and real and fake equally wide, got k={k}, {real.shape[1]} and {fake.shape[1]}"
        )
    centre = real.double().mean(0)  # Distances stay, and the products that they are made of become small.
    real, fake = real.double() - centre, fake.double() - centre
    real_radius, fake_radius = _radii(real, k), _radii(fake, k)
    balls, within_fake, covered = [], 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part in fake.split(_CHUNK):
        inside = _distances(part, real) <= real_radius
        balls.append(inside.sum(1))
        covered |= inside.any(0)
    for part in real.split(_CHUNK):
        within_fake += int((_distances(part, fake) <= fake_radius).any(1).sum())
    counts = torch.cat(balls).double()
    return Manifolds(
        precision=float((counts > 0).double().mean()),
        recall=within_fake / len(real),
        density=float(counts.mean()) / k,
        coverage=float(covered.double().mean()),
    )


def _radii(features: Tensor, k: int) -> Tensor:
    return torch.cat([_distances(part, features).kthvalue(k + 1, dim=1).values for part in features.split(_CHUNK)])


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # By differences, not by products: equal points are at the distance 0.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
