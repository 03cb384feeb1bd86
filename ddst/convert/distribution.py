"""How an overall density is shared out over layers: ERK, uniform or per layer, then whole blocks per layer.

Pure functions of weight shapes; nothing here knows modules. A *shape* is a weight's, ``(C_out, C_in, kH, kW)`` or
``(C_out, C_in)``. The density of a set of layers is always the share of active *weights*, so an edge block, which lies
partly outside its weight, counts with the weights it really holds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from ddst._arguments import check_number
from ddst.topology import grid

Shape = Sequence[int]

# Shares within rounding of 1 are 1: at density 1 every ERK share is 1 up to the last bits.
_FULL = 1.0 - 1e-9


def check_density(density: float, name: str = "density") -> float:
    """Returns ``density`` as a float.

    Raises:
        TypeError: not a number.
        ValueError: not above 0, or above 1 (a NaN included).

    >>> check_density(1)
    1.0
    """
    return check_number(name, density, most=1, above=0)


def erk_densities(shapes: Mapping[str, Shape], density: float, dense: Collection[str] = ()) -> dict[str, float]:
    """``d_l = min(1, ε (c_out + c_in + k_h + k_w) / (c_out · c_in · k_h · k_w))``, ε such that ``Σ d_l n_l = d Σ n_l``.

    The Erdős–Rényi-kernel distribution: small layers are kept denser than large ones. Layers that would pass 1 become
    dense and the rest is rescaled. A linear layer's numerator is ``c_out + c_in``.

    Args:
        shapes: weight shape of every layer that counts towards the density.
        density: share ``d`` of active weights over all of them, above 0 and at most 1.
        dense: names of layers that are dense whatever their share; they count with density 1.

    Returns:
        The density of each layer, in the order of ``shapes``; exactly 1.0 for dense layers.

    Raises:
        ValueError: the layers in ``dense`` alone hold more than ``d Σ n_l`` weights.

    Cost: ``O(L²)`` for ``L`` layers.

    Source: Evci et al., Rigging the Lottery (ICML 2020), section 3; Mocanu et al. (2018) for linear layers.

    >>> shapes = {"first": (64, 3, 3, 3), "middle": (64, 64, 3, 3), "last": (64, 64)}
    >>> {name: round(d, 4) for name, d in erk_densities(shapes, 0.2).items()}
    {'first': 1.0, 'middle': 0.0945, 'last': 0.8122}
    """
    check_density(density)
    full = set(dense)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / size[name] for name, shape in shapes.items()}
    budget = density * sum(size.values())
    while True:
        free = [name for name in shapes if name not in full]
        left = budget - sum(size[name] for name in shapes if name in full)
        if left < -1e-6 * budget:
            raise ValueError(
                f"density {density} cannot be met: the layers that stay dense hold "
                f"{(budget - left) / sum(size.values()):.4f} of all weights"
            )
        scale = max(left, 0.0) / sum(raw[name] * size[name] for name in free) if free else 0.0
        passing = [name for name in free if scale * raw[name] >= _FULL]
        if not passing:
            return {name: 1.0 if name in full else scale * raw[name] for name in shapes}
        full.update(passing)


def uniform_densities(shapes: Mapping[str, Shape], density: float) -> dict[str, float]:
    """``d_l = d`` for every layer.

    >>> uniform_densities({"a": (8, 8), "b": (8, 8, 3, 3)}, 0.5)
    {'a': 0.5, 'b': 0.5}
    """
    check_density(density)
    return dict.fromkeys(shapes, float(density))


def smallest_density(shapes: Mapping[str, Shape], block: tuple[int, int], dense: Collection[str] = ()) -> float:
    """``(Σ_dense n_l + Σ_others b_out · b_in) / Σ n_l``: one whole block in every layer that is not dense.

    >>> smallest_density({"a": (16, 16), "b": (32, 32)}, (16, 16), dense={"a"})
    0.4
    """
    least = 0
    for name, shape in shapes.items():
        one = min(block[0], shape[0]) * min(block[1], shape[1])
        least += math.prod(shape) if name in dense else one
    return least / sum(math.prod(shape) for shape in shapes.values())


def block_counts(shapes: Mapping[str, Shape], densities: Mapping[str, float], block: tuple[int, int]) -> dict[str, int]:
    """``n_l = floor(d_l N_l) + (1 where the remainder is among the largest)``, ``1 ≤ n_l ≤ N_l``: blocks per layer.

    Rounds every layer's share of its ``N_l`` blocks so that the weights add up: blocks go to the layers with the
    largest remainder until ``Σ n_l w_l`` is within half a block of ``Σ d_l N_l w_l``. A block of layer ``l`` weighs
    ``w_l``, the mean weights per block of that layer (less than ``b_out · b_in`` where there are edge blocks).

    Args:
        shapes: weight shape per layer.
        densities: density per layer, above 0 and at most 1; the names of ``shapes``.
        block: ``(b_out, b_in)``.

    Returns:
        Active blocks per layer. The total is within one block of the target unless a bound (one block, all blocks) of
        every layer that could give way is reached.

    Raises:
        ValueError: a name of ``shapes`` has no density, or one outside the range.

    Cost: ``O(L²)`` for ``L`` layers.

    >>> block_counts({"a": (32, 32), "b": (64, 32)}, {"a": 0.3, "b": 0.3}, (16, 16))
    {'a': 1, 'b': 3}
    """
    missing = [name for name in shapes if name not in densities]
    if missing:
        raise ValueError(f"densities must name every layer, missing: {', '.join(missing)}")
    total = {name: math.prod(grid(shape, block)) for name, shape in shapes.items()}
    weight = {name: math.prod(shape) / total[name] for name, shape in shapes.items()}
    share = {name: check_density(densities[name], f"densities[{name!r}]") * total[name] for name in shapes}
    # 1e-9: a share that is whole but for rounding is whole.
    count = {name: min(max(math.floor(share[name] + 1e-9), 1), total[name]) for name in shapes}
    missing_weight = sum((share[name] - count[name]) * weight[name] for name in shapes)
    while True:
        if missing_weight > 0:
            able = [name for name in shapes if count[name] < total[name] and weight[name] / 2 < missing_weight]
            step = 1
        else:
            able = [name for name in shapes if count[name] > 1 and weight[name] / 2 < -missing_weight]
            step = -1
        if not able:
            return count
        name = max(able, key=lambda n: step * (share[n] - count[n]))
        count[name] += step
        missing_weight -= step * weight[name]
