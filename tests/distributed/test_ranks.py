"""Two and three processes on gloo: every check of helpers/rank_checks.py, each group of processes started once."""

import shutil

import pytest

from helpers.rank_checks import CHECKS
from helpers.ranks import run_checks
from helpers.train_checks import CHAIN, LAST, SETTINGS, check_like_one, trained

# Sums of three depend on an entry's place, which two cannot show; of the ways to wrap, two ranks say enough.
ON_THREE = [
    "rigl",
    "random_growth_whatever_the_ranks_generators",
    "ddst_whose_density_rises",
    "seeds_per_rank",
    "loading_another_number_of_blocks",
    "ddst_train",
    "ddst_train_goes_on",
    "a_resumed_loop_is_bit_equal_on_two_ranks_and_to_rounding_on_more",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {count: tmp_path_factory.mktemp(f"ranks{count}") for count in (2, 3)}


@pytest.fixture(scope="module")
def on_two(folders):
    (_, last), *_ = CHAIN
    trained(**SETTINGS, stop_after=last, out=str(folders[2] / "chain"))
    return run_checks(2, list(CHECKS), folders[2])


@pytest.fixture(scope="module")
def on_three(folders, on_two):
    shutil.copytree(folders[2] / "chain", folders[3] / "chain")
    return run_checks(3, ON_THREE, folders[3])


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name, on_two):
    assert on_two[name] == ["", ""], "\n".join(on_two[name])


@pytest.mark.parametrize("name", ON_THREE)
def test_three_ranks(name, on_three):
    assert on_three[name] == ["", "", ""], "\n".join(on_three[name])


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_with_local_batch_norm_train_like_one_process_that_normalises_shares(count, folders, on_two, on_three):
    check_like_one(folders[count] / "whole", [(count, LAST)])


def test_a_run_goes_on_with_more_and_with_fewer_processes(folders, on_three):
    out = folders[3] / "chain"
    trained(resume=True, stop_after=LAST, out=str(out))
    check_like_one(out, CHAIN)
