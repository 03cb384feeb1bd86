"""What the paper reports: Fréchet distances of its methods by density, and in which order that puts them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

DENSITIES = (0.1, 0.2, 0.3, 0.5)
#: SNGAN on CIFAR-10 and STL-10, BigGAN on CIFAR-10 and TinyImageNet, at `DENSITIES` each (arXiv 2302.14670 and its
#: authors' poster).
DISTANCES: dict[str, tuple[tuple[float, ...], ...]] = {
    "static": (
        (26.75, 19.04, 15.05, 12.24), (48.18, 44.67, 41.73, 37.68), (16.98, 12.81, 10.33, 8.47),
        (28.78, 21.67, 18.86, 17.51),
    ),
    "static-strong": (
        (26.79, 19.65, 14.38, 11.91), (52.48, 43.85, 42.06, 37.47), (23.48, 14.26, 11.19, 8.64),
        (31.44, 22.51, 18.22, 18.00),
    ),
    "sdst-set": (
        (26.23, 17.79, 13.21, 11.79), (56.41, 46.58, 39.93, 30.37), (12.41, 9.87, 9.13, 8.01),
        (25.39, 21.30, 21.80, 21.20),
    ),
    "sdst-strong-set": (
        (16.49, 13.36, 11.68, 10.68), (67.37, 49.96, 37.99, 31.08), (18.94, 9.64, 8.75, 8.36),
        (22.20, 20.56, 21.70, 18.32),
    ),
    "sdst-rigl": (
        (27.06, 16.36, 14.00, 12.28), (43.08, 33.90, 31.83, 30.30), (12.45, 9.42, 8.86, 8.03),
        (21.60, 19.33, 18.57, 17.45),
    ),
    "sdst-strong-rigl": (
        (17.02, 13.86, 12.51, 11.35), (53.65, 33.25, 31.41, 30.18), (10.58, 9.11, 8.69, 8.33),
        (21.14, 18.95, 17.75, 16.30),
    ),
    "ddst-relaxed": (
        (14.19, 13.19, 12.38, 10.60), (35.98, 33.06, 31.71, 29.96), (10.19, 8.56, 8.36, 8.22),
        (19.42, 17.99, 17.06, 14.15),
    ),
    "ddst-strict": (
        (14.53, 12.73, 12.20, 12.11), (41.18, 31.59, 31.16, 29.11), (9.29, 8.64, 8.44, 7.90),
        (18.89, 17.37, 16.93, 16.02),
    ),
}  # fmt: skip
DENSE = (10.74, 29.71, 8.11, 15.43)


def columns(method: str, density: float) -> tuple[float, ...]:
    """A method's four distances at a density; the dense ones at any.

    >>> columns("ddst-relaxed", 0.1)
    (14.19, 35.98, 10.19, 19.42)
    """
    if method == "dense":
        return DENSE
    place = DENSITIES.index(density)
    return tuple(column[place] for column in DISTANCES[method])


def rank(method: str, density: float) -> float:
    """Mean over the four columns of a method's place among the eight sparse ones, 1 the best.

    >>> rank("ddst-relaxed", 0.1), rank("static-strong", 0.1)
    (1.5, 7.0)
    """
    ours = columns(method, density)
    others = [columns(other, density) for other in DISTANCES if other != method]
    return sum(1 + sum(other[i] < ours[i] for other in others) for i in range(len(ours))) / len(ours)


def settled(methods: Sequence[str], density: float) -> list[tuple[str, str]]:
    """(better, worse) for each pair of methods that all four columns put in the same order.

    >>> settled(["static", "ddst-relaxed", "sdst-rigl"], 0.1)
    [('ddst-relaxed', 'static'), ('ddst-relaxed', 'sdst-rigl')]
    """
    pairs = []
    known = [m for m in methods if m == "dense" or m in DISTANCES]
    for a, b in combinations(known, 2):
        signs = {x < y for x, y in zip(columns(a, density), columns(b, density), strict=True)}
        if len(signs) == 1:
            pairs.append((a, b) if signs == {True} else (b, a))
    return pairs
