"""Run as a program: checks every problem on the CPU path that DDST_CPU_CAPABILITY names, and prints what was wrong.

The path is chosen once per process, so each one needs its own. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ddst._extension import cpu_capability
from helpers import scale
from helpers.dense import block_norms, pack_blocks, unpack_blocks
from helpers.problems import Case, between_guards, large_problems, sample_problems, wide_problems
from helpers.sparse import Problem, call, forward_and_grads, op_arguments
from helpers.tolerances import TOLERANCES, Tolerance, relative_error

CPU_ORDER = ("portable", "avx2", "avx512", "neon")

Result = tuple[str, Tensor, Tensor, Tensor | None]


def public_results(problem: Problem, case: Case) -> Iterator[Result]:
    """(what, got, wanted, None) of the public function, its gradients and the block scores."""
    bias = None if case.bias is None else case.bias.double()
    wanted = [case.dense(case.x.double(), case.values.double(), bias), *case.dense_grads()]
    names = ("output", "input", "values", "bias")
    for name, got, want in zip(names, forward_and_grads(case, "cpu"), wanted, strict=True):
        if got is not None and want is not None:
            yield name, got, want, None
    for name, arguments in (op_arguments(problem, case) or {}).items():
        if name.endswith("block_scores"):
            yield name, call(name, arguments), block_norms(case.dense_weight_grad(), case.block), None


def op_results(problem: Problem, case: Case, channels_last: bool) -> Iterator[Result]:
    """(what, got, wanted, size of the terms) of the registered ops, on tensors with NaN on both sides in memory."""
    names = ("x", "values", "bias", "topology", "grad")
    guarded: dict[str, Any] = {n: between_guards(t) for n in names if (t := getattr(case, n)) is not None}
    fenced = replace(case, **guarded)
    x = case.x.double().requires_grad_()
    weight = unpack_blocks(case.values.double(), case.slots, case.weight_shape).requires_grad_()
    bias = None if case.bias is None else case.bias.double()

    def dense(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, **case.kwargs) if weight.dim() == 4 else F.linear(x, weight, bias)

    y = dense(x)
    dx, dweight = torch.autograd.grad(y, (x, weight), case.grad.double())
    (squares,) = torch.autograd.grad(dense(x.detach().square()), weight, case.grad.double().square())
    wanted = {
        "": y.detach(),
        "input_grad": dx,
        "weight_grad": pack_blocks(dweight, case.slots, case.block),
        "block_scores": block_norms(dweight, case.block),
    }
    # A weight gradient may be a single number, and that may be small by chance.
    terms = {
        "weight_grad": pack_blocks(squares.sqrt(), case.slots, case.block),
        "block_scores": block_norms(squares.sqrt(), case.block),
    }
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for name, arguments in (op_arguments(problem, fenced, channels_last) or {}).items():
        what = name.partition("_")[2]
        got = call(name, arguments)
        if name in ("conv2d", "conv2d_input_grad"):
            assert got.is_contiguous(memory_format=memory_format), f"{name} of {problem}: strides {got.stride()}"
        yield name, got, wanted[what], terms.get(what)


def main() -> None:
    failures: list[str] = []
    checked = 0

    def check(where: str, results: Iterable[Result], dtype: torch.dtype, sums: float) -> None:
        nonlocal checked
        tolerance = TOLERANCES[dtype]
        for what, got, want, terms in results:
            checked += 1
            error = relative_error(got, want, terms)
            fits = got.dtype == dtype and got.shape == want.shape
            if not fits or not error.within(Tolerance(sums * tolerance.rms, sums * tolerance.max)):
                failures.append(f"{where} {dtype} {what}: {error}, {got.dtype} {tuple(got.shape)}")

    for dtype in (torch.float32, torch.float64):
        torch.set_num_threads(1)
        for problem in sample_problems():
            check(str(problem), public_results(problem, problem.build(dtype, seed=13)), dtype, 1)
        for i, problem in enumerate(chain(large_problems(), wide_problems(80, seed=0))):
            # Their references are most of the work: each in one dtype, the other one is another instruction set's.
            if not scale.everything() and (i // 4 + CPU_ORDER.index(cpu_capability()) + (dtype == torch.float32)) % 2:
                continue
            torch.set_num_threads(1 + i % 2)
            results = op_results(problem, problem.build(dtype, seed=14), channels_last=i // 2 % 2 == 0)
            check(str(problem), results, dtype, 5)  # the table is for a few thousand products, here are up to 17 000
    report = {"capability": cpu_capability(), "checked": checked, "failures": failures}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
