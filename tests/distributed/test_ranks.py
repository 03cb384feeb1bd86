"""Two and three processes on gloo: every check of helpers/rank_checks.py, each group of processes started once."""

import pytest

from helpers.rank_checks import CHECKS
from helpers.ranks import run_checks

# Sums of three depend on an entry's place, which two cannot show; of the ways to wrap, two ranks say enough.
ON_THREE = [
    "rigl",
    "random_growth_whatever_the_ranks_generators",
    "ddst_whose_density_rises",
    "seeds_per_rank",
    "loading_another_number_of_blocks",
]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    return run_checks(2, list(CHECKS), tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_three(tmp_path_factory):
    return run_checks(3, ON_THREE, tmp_path_factory.mktemp("three"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name, on_two):
    assert on_two[name] == ["", ""], "\n".join(on_two[name])


@pytest.mark.parametrize("name", ON_THREE)
def test_three_ranks(name, on_three):
    assert on_three[name] == ["", "", ""], "\n".join(on_three[name])
