"""The balance ratio: both averages, the window, and what is done when beta has no meaning."""

import json
import math
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ddst.gan.balance import BalanceRatio

any_float = st.floats(allow_nan=True, allow_infinity=True)


def filled(pairs, **settings):
    meter = BalanceRatio(**{"window": 100, **settings})
    for alpha, beta in pairs:
        meter.add(alpha, beta)
    return meter


def test_ratio_of_means_and_mean_of_ratios():
    pairs = [(0.1, 0.2), (0.3, 1.0), (0.2, 0.8)]
    assert filled(pairs).value == pytest.approx(0.6 / 2.0)
    assert filled(pairs, average="mean_of_ratios").value == pytest.approx((0.5 + 0.3 + 0.25) / 3)


def test_window_slides_and_says_when_it_is_full():
    meter = BalanceRatio(window=3)
    for i in range(5):
        assert meter.full == (i >= 3)
        meter.add(float(i), 1.0)
    assert meter.value == pytest.approx((2 + 3 + 4) / 3)
    summary = meter.summary()
    assert (summary.samples, summary.capacity, summary.full) == (3, 3, True)


def test_empty_window_has_a_reason():
    summary = BalanceRatio().summary()
    assert summary.balance_ratio is None
    assert summary.reason == "no sample yet"


@pytest.mark.parametrize("beta", [0.0, -0.5, 1e-3, -1e-300])
def test_mean_beta_near_zero_or_negative_gives_no_ratio_but_a_reason(beta):
    summary = filled([(0.1, beta)] * 4).summary()
    assert summary.balance_ratio is None
    assert "mean beta" in summary.reason


def test_one_bad_beta_hardly_moves_the_ratio_of_means():
    good = [(0.25, 0.5)] * 99
    assert filled([*good, (0.25, 1e-6)]).value == pytest.approx(0.5, rel=0.02)


def test_mean_of_ratios_leaves_out_samples_without_a_ratio():
    good = [(0.25, 0.5)] * 3
    settings = {"average": "mean_of_ratios"}
    assert filled([*good, (0.2, 1e-9), (0.2, -1.0)], **settings).value == pytest.approx(0.5)
    half = filled([*good, *[(0.2, 0.0)] * 3], **settings)
    assert half.value == pytest.approx(0.5)
    most = filled([*good, *[(0.2, 0.0)] * 4], **settings).summary()
    assert most.balance_ratio is None
    assert most.reason == "beta is not above 0.001 in 4 of 7 samples"


@pytest.mark.parametrize("alpha, beta", [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, -math.inf)])
def test_samples_that_are_not_finite_stay_outside(alpha, beta):
    meter = filled([(0.25, 0.5)])
    sample = meter.add(alpha, beta)
    assert sample.ratio is None
    json.dumps(sample.as_dict(), allow_nan=False)
    assert meter.rejected == 1
    assert meter.summary().samples == 1
    assert meter.value == pytest.approx(0.5)


@given(st.lists(st.tuples(any_float, any_float), max_size=30), st.sampled_from(["ratio_of_means", "mean_of_ratios"]))
@example([(sys.float_info.max, sys.float_info.max)] * 3, "ratio_of_means")
@example([(sys.float_info.max, 1.0)] * 3, "mean_of_ratios")
def test_nothing_but_finite_numbers_comes_out(pairs, average):
    meter = BalanceRatio(window=8, average=average, eps=0.0)
    for alpha, beta in pairs:
        ratio = meter.add(alpha, beta).ratio
        assert ratio is None or math.isfinite(ratio)
    summary = meter.summary()
    json.dumps(summary.as_dict(), allow_nan=False)
    assert (summary.balance_ratio is None) == bool(summary.reason)


def test_state_is_restored_exactly():
    meter = filled([(i / 7, 1 + i / 3) for i in range(5)] + [(math.nan, 1.0)], window=4)
    other = BalanceRatio(window=4)
    other.load_state_dict(meter.state_dict())
    assert other.summary() == meter.summary()
    assert other.rejected == 1
    for each in (meter, other):
        each.add(0.1, 0.9)
    assert other.summary() == meter.summary()


@pytest.mark.parametrize(
    "settings", [{"window": 0}, {"window": 2.5}, {"average": "median"}, {"eps": -1.0}, {"eps": math.inf}]
)
def test_errors_name_the_argument(settings):
    with pytest.raises((ValueError, TypeError), match=next(iter(settings))):
        BalanceRatio(**settings)
