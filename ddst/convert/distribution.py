"""How an overall density is shared out over layers: ERK, by work, uniform or per layer, then whole blocks per layer.

Pure functions of weight shapes; nothing here knows modules. A *shape* is a weight's, ``(C_out, C_in, kH, kW)`` or
``(C_out, C_in)``. The density of a set of layers is the share of active *weights*, so an edge block, which lies partly
outside its weight, counts with the weights it really holds; where *work* is given, each weight counts with the
multiply-adds it takes: a layer's work is that of all its weights, ``n_l`` × output positions × calls.
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
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    return shared_out(_raw(shapes), size, density, dense, "hold {:.4f} of all weights")


def work_densities(
    shapes: Mapping[str, Shape], work: Mapping[str, float], density: float, dense: Collection[str] = ()
) -> dict[str, float]:
    """``d_l = min(1, ε (c_out + c_in + k_h + k_w) / f_l)``, ε such that ``Σ d_l f_l = d Σ f_l``.

    ERK's rule for multiply-adds ``f_l`` in the place of weights: what is left of a layer's *work* follows the sum of
    its sizes. ERK leaves narrow layers at a high resolution dense, which take most of the time; here a layer is the
    sparser the more positions it is applied at. Layers that would pass 1 become dense and the rest is rescaled.

    Args:
        shapes: weight shape of every layer that counts.
        work: ``f_l`` of each: weights × output positions × calls. A layer with 0, which no forward pass reaches, counts
            as one with a single position, and weighs nothing in the sum.
        density: share ``d`` of the multiply-adds that is left, above 0 and at most 1.
        dense: names of layers that are dense whatever their share; they count with density 1.

    Returns:
        The density of each layer, in the order of ``shapes``; exactly 1.0 for dense layers.

    Raises:
        ValueError: no layer has work, or the layers in ``dense`` alone take more than ``d Σ f_l``.

    Cost: ``O(L²)`` for ``L`` layers.

    >>> shapes = {"wide": (256, 256, 3, 3), "narrow": (32, 32, 3, 3)}  # at 8 x 8 and at 64 x 64 pixels
    >>> work = {"wide": 256 * 256 * 9 * 64, "narrow": 32 * 32 * 9 * 4096}
    >>> {name: round(d, 4) for name, d in work_densities(shapes, work, 0.2).items()}
    {'wide': 0.3524, 'narrow': 0.0476}
    >>> {name: round(d, 4) for name, d in erk_densities(shapes, 0.1).items()}
    {'wide': 0.0895, 'narrow': 0.7738}
    """
    if not sum(work[name] for name in shapes) > 0:
        raise ValueError("work must be above 0 for at least one layer: no forward pass reaches any")
    amount = {name: work[name] for name in shapes}
    raw = {name: sum(shape) / (work[name] or math.prod(shape)) for name, shape in shapes.items()}
    return shared_out(raw, amount, density, dense, "take {:.4f} of all multiply-adds")


def _raw(shapes: Mapping[str, Shape]) -> dict[str, float]:
    """ERK's densities up to their common factor."""
    return {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}


def shared_out(
    raw: Mapping[str, float],
    amount: Mapping[str, float],
    density: float,
    dense: Collection[str] = (),
    too_much: str = "take {:.4f} of all",
) -> dict[str, float]:
    """``d_l = min(1, ε raw_l)``, ε such that ``Σ d_l · amount_l = d Σ amount_l``: what ERK and its kin have in common.

    >>> shared_out({"a": 1.0, "b": 2.0, "c": 1.0}, {"a": 10, "b": 10, "c": 5}, 0.6, dense={"c"})
    {'a': 0.3333333333333333, 'b': 0.6666666666666666, 'c': 1.0}
    """
    check_density(density)
    full = set(dense)
    budget = density * sum(amount.values())
    while True:
        free = [name for name in raw if name not in full]
        left = budget - sum(amount[name] for name in raw if name in full)
        if left < -1e-6 * budget:
            share = too_much.format((budget - left) / sum(amount.values()))
            raise ValueError(f"density {density} cannot be met: the layers that stay dense {share}")
        weighed = sum(raw[name] * amount[name] for name in free)
        # Nothing left that weighs: what no forward pass reaches is full, as all the others are.
        scale = max(left, 0.0) / weighed if weighed else math.inf
        passing = [name for name in free if scale * raw[name] >= _FULL]
        if not passing:
            return {name: 1.0 if name in full else scale * raw[name] for name in raw}
        full.update(passing)


def uniform_densities(shapes: Mapping[str, Shape], density: float) -> dict[str, float]:
    """``d_l = d`` for every layer.

    >>> uniform_densities({"a": (8, 8), "b": (8, 8, 3, 3)}, 0.5)
    {'a': 0.5, 'b': 0.5}
    """
    check_density(density)
    return dict.fromkeys(shapes, float(density))


def smallest_density(
    shapes: Mapping[str, Shape],
    block: tuple[int, int],
    dense: Collection[str] = (),
    work: Mapping[str, float] | None = None,
) -> float:
    """``(Σ_dense n_l + Σ_others b_out · b_in) / Σ n_l``: one whole block in every layer that is not dense.

    With ``work`` the share of multiply-adds: a weight of layer ``l`` counts ``work_l / n_l``.

    >>> smallest_density({"a": (16, 16), "b": (32, 32)}, (16, 16), dense={"a"})
    0.4
    >>> smallest_density({"a": (16, 16), "b": (32, 32)}, (16, 16), {"a"}, work={"a": 1, "b": 3})
    0.4375
    """
    least = total = 0.0
    for name, shape in shapes.items():
        size = math.prod(shape)
        one = size if name in dense else min(block[0], shape[0]) * min(block[1], shape[1])
        amount = size if work is None else work[name]
        least += amount * one / size
        total += amount
    return least / total


def block_counts(
    shapes: Mapping[str, Shape],
    densities: Mapping[str, float],
    block: tuple[int, int],
    work: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """``n_l = floor(d_l N_l) + (1 where the remainder is among the largest)``, ``1 ≤ n_l ≤ N_l``: blocks per layer.

    Rounds every layer's share of its ``N_l`` blocks so that the weights add up: blocks go to the layers with the
    largest remainder until ``Σ n_l w_l`` is within half a block of ``Σ d_l N_l w_l``. A block of layer ``l`` weighs
    ``w_l``, the mean weights per block of that layer (less than ``b_out · b_in`` where there are edge blocks).

    With ``work``, ``w_l`` is a block's mean multiply-adds. Blocks then differ much: a layer is rounded up or down, and
    given blocks beyond that only where others cannot be rounded so that the sum is within half a block of the coarsest
    layer, that of the largest ``w_l``.

    Args:
        shapes: weight shape per layer.
        densities: density per layer, above 0 and at most 1; the names of ``shapes``.
        block: ``(b_out, b_in)``.
        work: multiply-adds of each layer when dense; a layer with 0 is rounded by itself.

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
    amount = {name: math.prod(shape) if work is None else work[name] for name, shape in shapes.items()}
    weight = {name: amount[name] / total[name] for name in shapes}
    share = {name: check_density(densities[name], f"densities[{name!r}]") * total[name] for name in shapes}
    # 1e-9: a share that is whole but for rounding is whole.
    count = {name: min(max(math.floor(share[name] + 1e-9), 1), total[name]) for name in shapes}
    for name in (name for name in shapes if not weight[name]):
        count[name] = min(max(round(share[name]), 1), total[name])
    missing_weight = sum((share[name] - count[name]) * weight[name] for name in shapes)
    enough = 0.0 if work is None else max(weight.values(), default=0.0) / 2
    while True:
        step = 1 if missing_weight > 0 else -1
        able = [
            name
            for name in shapes
            if 0 < weight[name] / 2 < step * missing_weight
            and (count[name] < total[name] if step > 0 else count[name] > 1)
        ]
        rounded = [name for name in able if step * (share[name] - count[name]) >= -1e-9]
        if not able or (not rounded and abs(missing_weight) <= enough):
            return count
        name = max(able, key=lambda n: step * (share[n] - count[n]))
        count[name] += step
        missing_weight -= step * weight[name]
