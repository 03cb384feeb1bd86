"""Drop-fraction schedules: both ends, the shape between, and bad arguments."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddst.sparsity.schedule import DropSchedule, make_schedule


@pytest.mark.parametrize(
    "shape, quarter",
    [
        ("cosine", 0.005 + 0.495 * (1 + math.cos(math.pi / 4)) / 2),
        ("linear", 0.005 + 0.495 * 0.75),
        ("constant", 0.5),
    ],
)
def test_values_at_start_quarter_and_end(shape, quarter):
    schedule = DropSchedule(0.5, 200, shape)
    assert schedule(0) == 0.5
    assert schedule(50) == pytest.approx(quarter, rel=1e-12)
    assert schedule(200) == (0.5 if shape == "constant" else 0.005)
    assert schedule(10_000) == schedule(200)
    assert schedule(-1) == 0.5


def test_an_initial_fraction_below_the_final_one_stays():
    schedule = DropSchedule(0.001, 10)
    assert [schedule(t) for t in (0, 5, 10)] == [0.001, 0.001, 0.001]


@given(st.floats(0, 1), st.integers(1, 1000), st.integers(0, 2000), st.sampled_from(["cosine", "linear", "constant"]))
def test_stays_between_the_ends_and_never_rises(initial, total, step, shape):
    schedule = DropSchedule(initial, total, shape)
    assert 0 <= min(0.005, initial) <= schedule(step) <= initial
    assert schedule(step + 1) <= schedule(step) * (1 + 1e-12)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ((1.5, 10), "initial"),
        ((0.3, 0), "total_steps"),
        ((0.3, 10, "sine"), "shape"),
        ((0.3, 10, "linear", 2), "final"),
    ],
)
def test_errors_name_the_argument(arguments, named):
    with pytest.raises(ValueError, match=named):
        DropSchedule(*arguments)


def test_make_schedule_takes_names_and_functions():
    assert make_schedule("constant", 0.2, 10)(5) == 0.2
    assert make_schedule(lambda step: step / 100, 0.2, 10)(5) == 0.05
    with pytest.raises(ValueError, match="schedule must be"):
        make_schedule("step", 0.2, 10)
    with pytest.raises(ValueError, match="drop_fraction must be"):
        make_schedule("cosine", 2.0, 10)
