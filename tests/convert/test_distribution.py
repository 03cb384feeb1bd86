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
    work_densities,
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


def test_work_equals_the_count_by_hand() -> None:
    # ERK's numerators and sizes as above; the narrow layer "a" is applied at 1024 positions, the others at 16.
    work = {name: math.prod(shape) * (1024 if name == "a" else 16) for name, shape in SHAPES.items()}
    # Σ f = 36864 · 1024 + (121792 - 36864) · 16 = 39107584; at a fifth all but "a" are full, which has what they leave
    # of the budget.
    others = (121792 - 36864) * 16
    expected = {"first": 1.0, "a": (0.2 * 39107584 - others) / (36864 * 1024), "b": 1.0, "short": 1.0, "last": 1.0}
    assert work_densities(SHAPES, work, 0.2) == pytest.approx(expected, rel=1e-12)
    # At a fiftieth none is: ε Σ s = 0.02 Σ f, with Σ s = 73 + 134 + 198 + 194 + 138 = 737.
    epsilon = 0.02 * 39107584 / 737
    numerators = {"first": 73, "a": 134, "b": 198, "short": 194, "last": 138}
    found = work_densities(SHAPES, work, 0.02)
    full = {name for name, s in numerators.items() if epsilon * s >= work[name]}
    left = 0.02 * 39107584 - sum(work[name] for name in full)
    epsilon = left / sum(s for name, s in numerators.items() if name not in full)
    for name, s in numerators.items():
        assert found[name] == pytest.approx(1.0 if name in full else epsilon * s / work[name], rel=1e-12)


def test_work_counts_forced_layers_as_dense_and_refuses_what_they_exceed() -> None:
    work = {"first": 100, "a": 10, "b": 10, "short": 10, "last": 10}
    densities = work_densities(SHAPES, work, 0.8, dense={"first"})
    assert densities["first"] == 1.0
    assert sum(densities[name] * work[name] for name in SHAPES) == pytest.approx(0.8 * 140)
    with pytest.raises(ValueError, match=r"density 0\.7 cannot be met.*take 0\.7143 of all multiply-adds"):
        work_densities(SHAPES, work, 0.7, dense={"first"})
    with pytest.raises(ValueError, match="work must be above 0"):
        work_densities(SHAPES, dict.fromkeys(SHAPES, 0), 0.5)


def test_a_layer_without_work_follows_the_rule_and_weighs_nothing() -> None:
    shapes = {"used": (64, 64), "unused": (64, 32), "thin": (64, 2)}
    work = {"used": 64.0 * 64, "unused": 0.0, "thin": 0.0}  # as if each were applied at one position
    densities = work_densities(shapes, work, 0.25)
    assert densities == pytest.approx({"used": 0.25, "unused": 0.25 * 96 / 64, "thin": 1.0})
    assert work_densities(shapes, work, 1.0) == dict.fromkeys(shapes, 1.0)
    counts = block_counts(shapes, densities, (16, 2), work)
    assert counts == {"used": 32, "unused": 24, "thin": 4}


def test_counts_by_work_settle_within_the_coarsest_block_without_draining_a_fine_layer() -> None:
    shapes = {"coarse": (64, 64), "fine": (640, 640)}
    work = {"coarse": 16 * 1000.0, "fine": 1600.0}  # a block of the first is as much as a thousand of the second
    counts = block_counts(shapes, {"coarse": 7.4 / 16, "fine": 0.25}, (16, 16), work)
    assert counts == {"coarse": 7, "fine": 401}
    # The coarse layer has a block at least: the fine one gives way until half a coarse block is left.
    assert block_counts(shapes, {"coarse": 0.4 / 16, "fine": 0.6}, (16, 16), work) == {"coarse": 1, "fine": 860}


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


WORKED = st.lists(st.tuples(CHANNELS, CHANNELS, TAPS, st.sampled_from([0, 1, 16, 1024])), min_size=1, max_size=8)


@settings(max_examples=150)
@given(WORKED, st.floats(0.01, 1.0))
def test_law_work_meets_the_share_of_multiply_adds_by_erks_rule(layers: list, density: float) -> None:
    shapes = named([layer[:3] for layer in layers])
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    work = {name: size[name] * layer[3] for name, layer in zip(shapes, layers, strict=True)}
    if not any(work.values()):
        return
    densities = work_densities(shapes, work, density)
    assert all(0 < d <= 1 for d in densities.values())
    assert sum(densities[n] * work[n] for n in shapes) == pytest.approx(density * sum(work.values()), rel=1e-6)
    raw = {name: sum(shape) / (work[name] or size[name]) for name, shape in shapes.items()}
    scales = [densities[n] / raw[n] for n in shapes if densities[n] < 1]
    if scales:
        assert max(scales) == pytest.approx(min(scales))
        assert all(raw[n] * scales[0] >= 1 - 1e-6 for n in shapes if densities[n] == 1)


@settings(max_examples=100)
@given(LAYERS, st.floats(0.01, 1.0))
def test_law_where_all_layers_have_as_many_positions_work_is_erk(layers: list, density: float) -> None:
    shapes = named(layers)
    work = {name: 7.0 * math.prod(shape) for name, shape in shapes.items()}
    assert work_densities(shapes, work, density) == pytest.approx(erk_densities(shapes, density), rel=1e-6)


@settings(max_examples=150)
@given(WORKED, BLOCKS, st.data())
def test_law_block_counts_meet_the_work_within_half_a_block_of_the_coarsest_layer(
    layers: list, block: tuple[int, int], data: st.DataObject
) -> None:
    shapes = named([layer[:3] for layer in layers])
    densities = {name: data.draw(st.floats(0.02, 1.0)) for name in shapes}
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    work = {name: float(size[name] * layer[3]) for name, layer in zip(shapes, layers, strict=True)}
    counts = block_counts(shapes, densities, block, work)
    total = {n: math.prod(math.ceil(c / b) for c, b in zip(s, block, strict=False)) for n, s in shapes.items()}
    total = {name: blocks * math.prod(shapes[name][2:]) for name, blocks in total.items()}
    each = {name: work[name] / total[name] for name in shapes}
    assert all(1 <= counts[n] <= total[n] for n in shapes)
    error = sum((counts[n] - densities[n] * total[n]) * each[n] for n in shapes)
    half = max(each.values()) / 2 * (1 + 1e-9) + 1e-6
    assert -half <= error
    assert error <= half or all(counts[n] == 1 for n in shapes if each[n])
    # Where no layer is held at one block, every layer's share is rounded up or down.
    if all(densities[n] * total[n] >= 1 for n in shapes):
        assert all(abs(counts[n] - densities[n] * total[n]) < 1 + 1e-6 for n in shapes)
