"""Every instruction set the library holds, and every number of threads, computes the same thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ddst
from helpers.problems import ConvProblem, LinearProblem
from helpers.sparse import Problem, call, op_arguments
from helpers.tolerances import assert_close

PROGRAM = Path(__file__).resolve().parents[1] / "helpers" / "check_cpu_path.py"
NEEDS = {
    "portable": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


def machine_flags() -> set[str]:
    """Features of this CPU as the kernel lists them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def run_with(capability: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # glibc fills every allocation with 0x7f bytes (3e38 as float): scratch memory that is read unwritten shows.
    environment = {**os.environ, "DDST_CPU_CAPABILITY": capability, "MALLOC_PERTURB_": "128"}
    # The folder that ddst was imported from, so that an uninstalled checkout is tested too.
    root = str(Path(ddst.__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-P", *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("capability", NEEDS)
def test_each_instruction_set_against_dense(capability: str) -> None:
    if not NEEDS[capability] <= machine_flags():
        pytest.skip(f"this CPU has no {capability}")
    done = run_with(capability, str(PROGRAM))
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["capability"] == capability
    assert report["checked"] > 800
    assert report["failures"] == []


def test_unknown_instruction_set_is_an_error_that_names_the_variable() -> None:
    code = "import torch, ddst; ddst.SparseLinear(16, 16, density=1.0)(torch.zeros(1, 16))"
    done = run_with("mmx", "-c", code)
    assert done.returncode != 0
    assert "DDST_CPU_CAPABILITY" in done.stderr
    assert "mmx" in done.stderr


BUSY: list[Problem] = [
    ConvProblem(batch=6, channels=(72, 90), block=(16, 16), size=(14, 15), mask="0.3", layout="channels_last"),
    ConvProblem(batch=3, channels=(40, 64), block=(32, 8), size=(20, 20), mask="0.4", stride=2),
    ConvProblem(batch=16, channels=(32, 32), block=(16, 16), size=(4, 4), mask="one"),
    LinearProblem(batch=(96,), features=(260, 300), block=(16, 16), mask="0.2"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("problem", BUSY, ids=str)
def test_thread_counts_agree_and_one_count_repeats_its_bits(problem: Problem, dtype: torch.dtype) -> None:
    arguments = op_arguments(problem, problem.build(dtype))
    assert arguments is not None
    results = {}
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results[count] = {name: call(name, args) for name, args in arguments.items()}
        for _ in range(3):
            for name, args in arguments.items():
                assert torch.equal(call(name, args), results[count][name]), f"{name} with {count} threads"
    for count in (2, 3):
        for name, result in results[count].items():
            assert_close(result, results[1][name].double(), f"{name}: {count} threads against 1")
