"""Every instruction set the library holds, and every number of threads, computes the same thing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddst._extension import cpu_capability
from helpers import scale
from helpers.copies import Done, run_copies
from helpers.cpu_paths import CAPABILITIES, environment_with, run_with, skip_without
from helpers.problems import ConvProblem, LinearProblem
from helpers.sparse import Problem, call, op_arguments
from helpers.tolerances import assert_close

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
CHECK = str(HELPERS / "check_cpu_path.py")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_each_instruction_set_against_dense(capability: str) -> None:
    skip_without(capability)
    done = run_with(capability, CHECK)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["capability"] == capability
    assert report["checked"] > (1900 if scale.everything() else 1500)
    assert report["failures"] == []


def programs_with(capability: str, shares: Sequence[str], code: str) -> list[Done]:
    """Programs on an instruction set, one for each DDST_WEIGHT_GRAD_SHARES: both are read once per process."""
    environment = environment_with(capability)
    helpers = f"import sys; sys.path.insert(0, {str(HELPERS.parent)!r})\nimport helpers.weight_grad_digests"
    setting = "import os; os.environ['DDST_WEIGHT_GRAD_SHARES'] = {!r}\n{}"
    return run_copies([(helpers, setting.format(number, code)) for number in shares], environment)


def test_unknown_instruction_set_is_an_error_that_names_the_variable() -> None:
    code = "import torch, ddst; ddst.SparseLinear(16, 16, density=1.0)(torch.zeros(1, 16))"
    done = run_with("sse9", "-c", code)
    assert done.returncode != 0
    assert "DDST_CPU_CAPABILITY is 'sse9', expected portable, avx2, avx512 or neon" in done.stderr


BUSY: list[Problem] = [
    ConvProblem(batch=6, channels=(72, 90), block=(16, 16), size=(14, 15), mask="0.3", layout="channels_last"),
    ConvProblem(batch=3, channels=(40, 64), block=(32, 8), size=(20, 20), mask="0.4", stride=2),
    ConvProblem(batch=16, channels=(32, 32), block=(16, 16), size=(4, 4), mask="one"),
    ConvProblem(batch=8, channels=(32, 48), block=(16, 16), size=(12, 12), mask="empty_lines"),
    ConvProblem(batch=8, channels=(32, 48), block=(16, 1), size=(12, 12), mask="empty_lines"),
    LinearProblem(batch=(96,), features=(260, 300), block=(16, 16), mask="0.2"),
    # Every way to share out work. One row of blocks is much heavier than the others.
    LinearProblem(batch=(16,), features=(512, 1024), block=(16, 16), mask="heavy0.1"),  # output blocks
    LinearProblem(batch=(70,), features=(1024, 512), block=(16, 16), mask="heavy0.1"),  # pixels a power of two apart
    ConvProblem(
        batch=7, channels=(128, 128), block=(16, 16), size=(9, 9), mask="heavy0.3"
    ),  # weights each thread packs
    ConvProblem(batch=6, channels=(256, 256), block=(16, 16), size=(16, 16), mask="heavy0.3"),  # packed once, by all
    ConvProblem(batch=5, channels=(96, 96), block=(16, 8), size=(8, 8), mask="heavy0.3"),
    # Packed for the input gradient, too, in the order of columns.
    ConvProblem(batch=5, channels=(100, 90), block=(8, 12), size=(8, 8), mask="heavy0.3"),
]


def each_op(problem: Problem, dtype: torch.dtype, threads: Sequence[int]) -> list[dict[str, Tensor]]:
    """Results of the four ops by suffix, for each number of threads."""
    arguments = op_arguments(problem, problem.build(dtype))
    assert arguments is not None
    results = []
    for count in threads:
        torch.set_num_threads(count)
        results.append({name.partition("_")[2] or "output": call(name, args) for name, args in arguments.items()})
    return results


@pytest.mark.usefixtures("poison_outputs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("problem", BUSY, ids=str)
def test_thread_counts_agree_and_one_count_repeats_its_bits(problem: Problem, dtype: torch.dtype) -> None:
    counts = [count for count in (1, 2, 3, 5) for _ in range(4)]
    results = each_op(problem, dtype, counts)
    for i, (count, result) in enumerate(zip(counts, results, strict=True)):
        for name, got in result.items():
            assert torch.equal(got, results[i // 4 * 4][name]), f"{name} with {count} threads"
            what = f"{name}: {count} threads against 1"
            if name in ("output", "input_grad"):  # no sum is shared out, so that none is in another order
                assert torch.equal(got, results[0][name]), what
            assert_close(got, results[0][name].double(), what)


@pytest.mark.skipif(cpu_capability() == "portable", reason="needs registers of a cache line's half")
def test_a_small_weight_gradient_has_the_bits_of_one_thread() -> None:
    """Threads share out its blocks: no partial sums, so no other order of addition."""
    problem = LinearProblem(batch=(160,), features=(512, 1024), block=(16, 16), mask="heavy0.2")
    one, two, three = (results["weight_grad"] for results in each_op(problem, torch.float32, (1, 2, 3)))
    assert torch.equal(one, two) and torch.equal(one, three)


def test_shares_are_fixed_for_any_number_of_threads_or_refused() -> None:
    wrong = ("0", "many", "2000")
    done = programs_with("portable", ("", "3", "1", *wrong), "helpers.weight_grad_digests.main()")
    free, fixed, one = ([*said.out.split(), *said.err.split()] for said in done[:3])
    assert len(free) == len(fixed) == 3
    assert len(set(free)) > 1  # else the problem would show nothing
    assert len(set(fixed)) == 1
    assert set(one) == {free[0]}  # one share: what one thread computes
    for shares, said in zip(wrong, done[3:], strict=True):
        assert said.returncode != 0
        assert f"DDST_WEIGHT_GRAD_SHARES is '{shares}', expected a number from 1 to 1024" in said.err
