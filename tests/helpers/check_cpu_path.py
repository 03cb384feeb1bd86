"""Run as a program: checks every problem on the CPU path that DDST_CPU_CAPABILITY names, and prints the worst errors.

The path is chosen once per process, so each one needs its own. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.dense import block_norms
from helpers.problems import ConvProblem, sample_problems
from helpers.sparse import call, forward_and_grads, op_arguments
from helpers.tolerances import TOLERANCES, relative_error


def main() -> None:
    torch.set_num_threads(1)
    failures: list[str] = []
    checked = 0
    for problem in sample_problems():
        for dtype in (torch.float32, torch.float64):
            case = problem.build(dtype, seed=13)
            y, *grads = forward_and_grads(case, "cpu")
            bias = None if case.bias is None else case.bias.double()
            wanted = [case.dense(case.x.double(), case.values.double(), bias), *case.dense_grads()]
            results = dict(
                zip(("output", "input", "values", "bias"), zip([y, *grads], wanted, strict=True), strict=True)
            )
            arguments = op_arguments(problem, case)
            if arguments is not None:
                name = "conv2d_block_scores" if isinstance(problem, ConvProblem) else "linear_block_scores"
                norms = block_norms(case.dense_weight_grad(), case.block)
                results["scores"] = (call(name, arguments[name]), norms)
            for what, (got, want) in results.items():
                if got is not None and want is not None:
                    checked += 1
                    error = relative_error(got, want)
                    if not error.within(TOLERANCES[dtype]):
                        failures.append(f"{problem} {dtype} {what}: {error}")
    report = {"capability": torch.ops.ddst.cpu_capability(), "checked": checked, "failures": failures}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
