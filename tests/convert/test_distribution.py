"""Densities and block counts per layer: ERK against a count by hand, and laws for any shapes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddst.convert.distribution import (
    block_counts,
    check_density,
    erk_densities,
    smallest_density,
    uniform_densities,
)

SHAPES = {
    "first": (64, 3, 3, 3),
    "a": (64, 64, 3, 3),
    "b": (128, 64, 3, 3),
    "short": (128, 64, 1, 1),
    "last": (10, 128),
}


def test_erk_equals_the_count_by_hand() -> None:
    # Numerators 64+3+3+3 = 73, 64+64+3+3 = 134, 128+64+3+3 = 198, 128+64+1+1 = 194, 10+128 = 138; sizes below.
    # All: 1728 + 36864 + 73728 + 8192 + 1280 = 121792 weights, at 10 % 12179.2. With nothing dense ε = 12179.2 / 737 =
    # 16.525: last 138 ε > 1280 passes 1. Then ε = (12179.2 - 1280) / 599 = 18.196: first 73 ε = 1328 < 1728.
    epsilon = (12179.2 - 1280) / (73 + 134 + 198 + 194)
    expected = {
        "first": 73 * epsilon / 1728,
        "a": 134 * epsilon / 36864,
        "b": 198 * epsilon / 73728,
        "short": 194 * epsilon / 8192,
        "last": 1.0,
    }
    assert erk_densities(SHAPES, 0.1) == pytest.approx(expected, rel=1e-12)


def test_erk_counts_forced_layers_as_dense() -> None:
    densities = erk_densities(SHAPES, 0.2, dense={"first"})
    assert densities["first"] == 1.0
    active = sum(d * math.prod(SHAPES[name]) for name, d in densities.items())
    assert active == pytest.approx(0.2 * 121792)
    assert densities["a"] / densities["b"] == pytest.approx((134 / 36864) / (198 / 73728))


def test_erk_at_density_one_is_dense_everywhere() -> None:
    assert set(erk_densities(SHAPES, 1.0).values()) == {1.0}


def test_erk_refuses_what_its_dense_layers_alone_exceed() -> None:
    with pytest.raises(ValueError, match=r"0\.05"):
        erk_densities(SHAPES, 0.05, dense={"short"})


def test_smallest_density_counts_dense_layers_and_one_block_each() -> None:
    expected = (1728 + 256 + 256 + 256 + 1280) / 121792
    assert smallest_density(SHAPES, (16, 16), {"first", "last"}) == pytest.approx(expected)
    # A block larger than the layer holds no more than the layer.
    assert smallest_density({"x": (4, 8)}, (16, 16)) == 1.0


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_density_outside_its_range(density: float) -> None:
    for share_out in (erk_densities, uniform_densities):
        with pytest.raises(ValueError, match="density"):
            share_out(SHAPES, density)


def test_density_that_is_no_number() -> None:
    for value in ("0.1", None, True):
        with pytest.raises(TypeError, match="density"):
            check_density(value)  # type: ignore[arg-type]


def test_block_counts_go_to_the_largest_remainders() -> None:
    shapes = {"a": (64, 64), "b": (64, 64), "c": (64, 64)}  # 16 blocks each
    assert block_counts(shapes, {"a": 0.34, "b": 0.35, "c": 0.36}, (16, 16)) == {"a": 5, "b": 6, "c": 6}


def test_a_layer_keeps_a_block_and_another_pays_for_it() -> None:
    shapes = {"small": (32, 32), "large": (64, 64)}
    assert block_counts(shapes, {"small": 0.01, "large": 0.25}, (16, 16)) == {"small": 1, "large": 3}


def test_every_layer_needs_a_density() -> None:
    with pytest.raises(ValueError, match="b"):
        block_counts({"a": (8, 8), "b": (8, 8)}, {"a": 0.5}, (8, 8))


CHANNELS = st.integers(1, 150)
TAPS = st.sampled_from([(), (1, 1), (3, 3), (1, 5)])
LAYERS = st.lists(st.tuples(CHANNELS, CHANNELS, TAPS), min_size=1, max_size=8)
BLOCKS = st.sampled_from([(1, 1), (8, 8), (16, 16), (16, 4), (64, 16)])


def named(layers: list[tuple[int, int, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    return {f"layer{i}": (c_out, c_in, *taps) for i, (c_out, c_in, taps) in enumerate(layers)}


@settings(max_examples=150)
@given(LAYERS, st.floats(0.01, 1.0))
def test_law_erk_meets_the_density_within_zero_and_one(layers: list, density: float) -> None:
    shapes = named(layers)
    densities = erk_densities(shapes, density)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    assert all(0 < d <= 1 for d in densities.values())
    assert sum(densities[n] * size[n] for n in shapes) == pytest.approx(density * sum(size.values()), rel=1e-6)
    # Among layers that are not dense the shares follow the rule, and no dense layer would have stayed below 1.
    raw = {name: sum(shape) / size[name] for name, shape in shapes.items()}
    scales = [densities[n] / raw[n] for n in shapes if densities[n] < 1]
    if scales:
        assert max(scales) == pytest.approx(min(scales))
        assert all(raw[n] * scales[0] >= 1 - 1e-6 for n in shapes if densities[n] == 1)


@settings(max_examples=150)
@given(LAYERS, BLOCKS, st.data())
def test_law_block_counts_meet_the_sum_within_one_block(
    layers: list, block: tuple[int, int], data: st.DataObject
) -> None:
    shapes = named(layers)
    densities = {name: data.draw(st.floats(0.02, 1.0)) for name in shapes}
    counts = block_counts(shapes, densities, block)
    total, weight = {}, {}
    for name, (c_out, c_in, *taps) in shapes.items():
        total[name] = math.ceil(c_out / block[0]) * math.ceil(c_in / block[1]) * math.prod(taps)
        weight[name] = math.prod(shapes[name]) / total[name]
    assert all(1 <= counts[n] <= total[n] for n in shapes)
    error = sum(counts[n] * weight[n] - densities[n] * math.prod(shapes[n]) for n in shapes)
    half = block[0] * block[1] / 2 + 1e-6
    assert -half <= error
    assert error <= half or all(count == 1 for count in counts.values())
    # Where no bound is reached and all blocks weigh the same, no layer is a whole block away from its share.
    if all(densities[n] * total[n] >= 1 for n in shapes) and len({weight[n] for n in shapes}) == 1:
        assert all(abs(counts[n] - densities[n] * total[n]) <= 1 + 1e-6 for n in shapes)
