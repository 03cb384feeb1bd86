"""Where memory cannot be had, or no memory could do, the error says so: operator, shape, bytes, and torch's words."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from helpers.cpu_paths import run_with
from helpers.problems import ConvProblem
from helpers.sparse import call, op_arguments

ROOT = Path(__file__).resolve().parents[2]
CHECK = str(ROOT / "tests" / "helpers" / "check_failed_allocations.py")


def test_every_allocation_that_fails_is_told_and_nothing_is_kept(guarded_heap: str) -> None:
    done = run_with("", CHECK, LD_PRELOAD=guarded_heap)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert not report["wrong"], "\n".join(report["wrong"][:20])
    kinds = {re.sub(r"[\d, ]+", " ", message.partition(" bytes")[0]) for message in report["messages"]}
    for name in ("conv2d", "linear"):
        plain = name.replace("2", " ")  # as in kinds
        for op in (plain, f"{plain}_input_grad", f"{plain}_weight_grad", f"{plain}_block_scores"):
            assert f"RuntimeError: ddst::{op}: no memory for a workspace of " in kinds
            assert any(
                kind.startswith(f"RuntimeError: ddst::{op}: no memory for its output of shape [") for kind in kinds
            )
    assert len(report["messages"]) > 200


def conv_arguments(name: str, **changed: list[int]) -> tuple[object, ...]:
    """Arguments of a convolution's op, some of them others."""
    problem = ConvProblem(channels=(8, 8), mask="full")
    arguments = list((op_arguments(problem, problem.build(torch.float32)) or {})[name])
    schema = getattr(torch.ops.ddst, name).default._schema
    for i, argument in enumerate(schema.arguments[: len(arguments)]):
        arguments[i] = changed.get(argument.name, arguments[i])
    return tuple(arguments)


@pytest.mark.parametrize("padding", [2**30, 2**30 - 5, 2**31 - 1, 2**31, 2**62])
def test_paddings_that_no_memory_holds_are_refused(padding: int) -> None:
    """The output's sides, or its bytes, would not fit the numbers that count them."""
    with pytest.raises(ValueError, match=r"ddst::conv2d: .*padding .*expected"):
        call("conv2d", conv_arguments("conv2d", padding=[padding, padding]))


def test_an_input_that_no_memory_holds_is_refused() -> None:
    large = 2**31 - 1
    grad_output = torch.zeros(2, 8, 1, 1)
    changed = {"grad_output": grad_output, "input_size": [large, large], "stride": [large, large], "padding": [0, 0]}
    with pytest.raises(ValueError, match=rf"stride \[{large}, {large}\].*\[2, 8, {large}, {large}\], expected less"):
        call("conv2d_input_grad", conv_arguments("conv2d_input_grad", **changed))


TASKS = """
#include <torch/csrc/stable/library.h>
#include "cpu/activation.hpp"
using torch::stable::Tensor;
static Tensor run(const Tensor& like, int64_t task, int64_t how) {
  return ddst::cpu::in_dtype("run", like.scalar_type(), [&](auto) {
    ddst::cpu::run_tasks(8, [&](int64_t i) {
      if (i == task && how == 0) throw std::out_of_range("task " + std::to_string(i));
      if (i == task && how == 1) ddst::Array<double>(int64_t{1} << 50);
    });
    return like;
  });
}
STABLE_TORCH_LIBRARY(ddst_test_tasks, m) { m.def("run(Tensor like, int task, int how) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(ddst_test_tasks, CPU, m) { m.impl("run", TORCH_BOX(&run)); }
"""


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a source tree")
def test_what_a_task_throws_on_any_thread_keeps_class_and_text(tmp_path: Path) -> None:
    (tmp_path / "tasks.cpp").write_text(TASKS)
    home = Path(torch.__file__).parent
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-shared"]
    headers = ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{home / 'include'}", f"-I{ROOT / 'csrc'}"]
    libraries = [f"-L{home / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]
    subprocess.run([*compiler, *headers, "tasks.cpp", "-o", "tasks.so", *libraries], cwd=tmp_path, check=True)
    torch.ops.load_library(tmp_path / "tasks.so")
    run, like = torch.ops.ddst_test_tasks.run, torch.zeros(1)
    torch.set_num_threads(2)
    assert run(like, -1, 0) is not None
    for task in (0, 3, 7):
        with pytest.raises(IndexError, match=f"task {task}"):
            run(like, task, 0)
        with pytest.raises(
            RuntimeError, match=f"ddst::run: no memory for a workspace of {2**53} bytes: .*can't allocate"
        ):
            run(like, task, 1)
