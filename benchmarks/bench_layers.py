"""The quick selection for pytest-benchmark (`make bench`): every pass, packed beside dense, in one group each.

A packed pass that is wrong fails before it is timed. The two sides run one after the other here; for ratios of paired
measurements use ``python -m ddst.benchmarks``. ``pytest --benchmark-autosave`` and ``--benchmark-compare`` keep and
compare runs.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from ddst.benchmarks.problem import LAYOUTS, PASSES, Problem
from ddst.benchmarks.registry import QUICK, Case
from ddst.measure import fastest


@pytest.mark.parametrize("side", ["packed", "dense"])
@pytest.mark.parametrize("pass_", range(len(PASSES)), ids=PASSES)
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_pass(benchmark: BenchmarkFixture, case: Case, pass_: int, side: str) -> None:
    benchmark.group = f"{case} {PASSES[pass_]}"
    torch.set_num_threads(1)
    with torch.no_grad():
        problem = Problem.make(case)
        if side == "packed":
            work = problem.packed()[pass_]
            wrong = problem.wrong(pass_, work(), problem.expected()[pass_])
            assert wrong is None, wrong
        else:
            works = [problem.dense(channels_last)[pass_] for channels_last in (False, True)]
            choice = fastest(works)
            work = works[choice]
            benchmark.extra_info["layout"] = LAYOUTS[choice]
        benchmark.extra_info["gflop"] = problem.flops(dense=side == "dense") / 1e9
        benchmark(work)
