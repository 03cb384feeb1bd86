"""The discriminator's rule, row by row of the method's table, and that it is a pure function that can be replayed."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddst.gan.balance import WindowSummary
from ddst.gan.controller import Decision, DensityController


def window(ratio, samples=100, reason=""):
    return WindowSummary(samples, 100, 0.25, 0.5, ratio, reason)


@pytest.mark.parametrize(
    "mode, ratio, density, action, new",
    [
        # relaxed: range 0.05 … 1
        ("relaxed", 0.60, 0.10, "grow", 0.15),
        ("relaxed", 0.60, 0.50, "grow", 0.55),
        ("relaxed", 0.60, 0.97, "grow", 1.00),
        ("relaxed", 0.60, 1.00, "keep", 1.00),
        ("relaxed", 0.40, 0.30, "drop", 0.25),
        ("relaxed", 0.40, 0.07, "drop", 0.05),
        ("relaxed", 0.40, 0.05, "keep", 0.05),
        ("relaxed", 0.50, 0.30, "keep", 0.30),
        ("relaxed", 0.45, 0.30, "keep", 0.30),
        ("relaxed", 0.55, 0.30, "keep", 0.30),
        # strict: range 0.05 … 0.5, at its end DST at constant density
        ("strict", 0.60, 0.10, "grow", 0.15),
        ("strict", 0.60, 0.47, "grow", 0.50),
        ("strict", 0.60, 0.50, "exchange", 0.50),
        ("strict", 0.40, 0.50, "drop", 0.45),
        ("strict", 0.40, 0.07, "drop", 0.05),
        ("strict", 0.40, 0.05, "keep", 0.05),
        ("strict", 0.50, 0.50, "keep", 0.50),
        # starts outside the range: never further out, never a jump
        ("strict", 0.60, 0.90, "exchange", 0.90),
        ("strict", 0.40, 0.90, "drop", 0.85),
        ("relaxed", 0.40, 0.02, "keep", 0.02),
        ("relaxed", 0.60, 0.02, "grow", 0.07),
    ],
)
def test_table(mode, ratio, density, action, new):
    decision = DensityController(mode).decide(window(ratio), density, 2000)
    assert decision.action == action
    assert decision.new_density == pytest.approx(new, abs=1e-12)
    assert decision.reason


def test_steps_of_delta_reach_the_upper_end_despite_rounding():
    controller, density = DensityController("strict"), 0.1
    actions = []
    for _ in range(10):
        decision = controller.decide(window(0.9), density, 1)
        actions.append(decision.action)
        density = decision.new_density
    assert actions == ["grow"] * 8 + ["exchange"] * 2
    assert density == pytest.approx(0.5)


def test_no_decision_in_warm_up_or_before_the_window_is_full():
    controller = DensityController(warmup=100)
    assert controller.decide(window(0.1), 0.3, 100).reason == "warm-up until step 100"
    assert controller.decide(window(0.1), 0.3, 101).action == "drop"
    early = controller.decide(window(0.1, samples=99), 0.3, 101)
    assert (early.action, early.reason) == ("keep", "window holds 99 of 100 samples")


@pytest.mark.parametrize("ratio", [None, math.nan, math.inf, -math.inf])
def test_no_ratio_keeps_the_density_and_says_why(ratio):
    decision = DensityController().decide(window(ratio, reason="mean beta is small"), 0.3, 10)
    assert (decision.action, decision.new_density) == ("keep", 0.3)
    assert decision.reason == "no balance ratio: mean beta is small"


def test_range_ends_where_the_discriminator_can_go_no_further():
    relaxed, strict = DensityController(), DensityController("strict")
    assert relaxed.decide(window(0.6), 0.4, 1, highest=0.43).new_density == 0.43
    assert relaxed.decide(window(0.6), 0.43, 1, highest=0.43).action == "keep"
    assert strict.decide(window(0.6), 0.43, 1, highest=0.43).action == "exchange"
    assert relaxed.decide(window(0.4), 0.2, 1, lowest=0.18).new_density == 0.18
    assert relaxed.decide(window(0.4), 0.18, 1, lowest=0.18).action == "keep"


def test_a_change_smaller_than_a_block_is_no_change():
    strict = DensityController("strict")
    assert strict.decide(window(0.6), 0.4995, 1).action == "grow"
    assert strict.decide(window(0.6), 0.4995, 1, resolution=0.001).action == "exchange"


@given(
    st.sampled_from(["relaxed", "strict"]),
    st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)),
    st.floats(0, 1),
    st.integers(0, 100),
    st.integers(0, 200),
)
def test_pure_replayable_and_within_bounds(mode, ratio, density, samples, step):
    controller = DensityController(mode, warmup=50)
    given_window = window(ratio if ratio is None or math.isfinite(ratio) else None, samples, "none")
    decision = controller.decide(given_window, density, step)
    low, high = controller.density_range
    assert math.isfinite(decision.new_density)
    assert min(low, density) <= decision.new_density <= max(high, density)
    assert abs(decision.new_density - density) <= controller.delta + 1e-12
    assert (decision.new_density == density) == (decision.action in ("keep", "exchange"))
    logged = Decision.from_dict(json.loads(json.dumps(decision.as_dict(), allow_nan=False)))
    assert logged == decision
    again = DensityController(**json.loads(json.dumps(controller.as_dict())))
    assert again == controller
    assert again.replay(logged) == decision


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"mode": "fast"}, ValueError),
        ({"bounds": (0.6, 0.5)}, ValueError),
        ({"bounds": 0.5}, TypeError),
        ({"bounds": (0.1, math.nan)}, ValueError),
        ({"delta": 0.0}, ValueError),
        ({"density_range": (0.5, 0.1)}, ValueError),
        ({"density_range": (0.5, 1.1)}, ValueError),
        ({"warmup": -1}, ValueError),
    ],
)
def test_errors_name_the_argument(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        DensityController(**settings)
