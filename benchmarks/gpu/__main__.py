"""The parts of `make gpu`, in order: ``python -m ddst.benchmarks.gpu --help``."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ddst.benchmarks.gpu import environment
from ddst.benchmarks.gpu.budget import Budget, Deadline
from ddst.benchmarks.gpu.pictures import PICTURES
from ddst.benchmarks.gpu.results import Part, Results
from ddst.benchmarks.gpu.run import NO_GPU, PHASES, parser
from ddst.benchmarks.gpu.table import markdown, short
from ddst.benchmarks.report import ROOT

PartOf = Callable[[Deadline], Part]


def parts_of(known: Part, folder: Path, device: str = "cuda") -> dict[str, PartOf]:
    """Name -> what runs that part until a deadline. Each imports what it needs, so that one cannot keep another away.

    Args:
        known: the environment, measured. folder: where pictures of samples and the tuning table go.
    """
    processes = max(1, min(14, (os.cpu_count() or 2) - 2))

    def primitives(deadline: Deadline) -> Part:
        from ddst.benchmarks.gpu import primitives

        return primitives.run_all(primitives.architecture_of(known["capability"]), deadline)

    def correctness(deadline: Deadline) -> Part:
        from ddst.benchmarks.gpu import correctness

        groups, refusals = correctness.groups(device)
        return {**correctness.check_all(groups, processes, deadline), "unusable": refusals}

    def tune(deadline: Deadline) -> Part:
        from ddst.benchmarks import tune
        from ddst.benchmarks.gpu.kernel_rows import specs
        from ddst.kernels import tuning

        part = tune.tune(specs(), device, deadline, processes)
        if "file" in part:
            tuning.save(known["device"], folder / "tuning.json")
        return part

    def kernels(deadline: Deadline) -> Part:
        from ddst.benchmarks.gpu import kernel_rows

        return kernel_rows.measure_all(kernel_rows.specs(), known, device, deadline)

    def host(deadline: Deadline) -> Part:
        from ddst.benchmarks.gpu import host_time

        return host_time.measure(device)

    def iteration(deadline: Deadline) -> Part:
        from ddst.benchmarks.gpu import iteration

        return iteration.measure_all(iteration.VARIANTS, device, deadline)

    def train(deadline: Deadline) -> Part:
        from ddst.benchmarks.gpu import training

        return training.train(device, deadline, folder / "digits.png")

    def candidates(deadline: Deadline) -> Part:
        from ddst.benchmarks.gpu import sweep

        return sweep.check_all(sweep.sweeps(device), processes, deadline)

    found: dict[str, PartOf] = {
        f.__name__: f for f in (primitives, correctness, tune, kernels, host, iteration, train, candidates)
    }
    assert tuple(found) == PHASES
    return found


def run_parts(parts: Mapping[str, PartOf], results: Results, budget: Budget) -> None:
    """Runs the parts, each until its deadline, and keeps what they bring; an error ends its part only, as wrong."""
    for name, part_of in parts.items():
        deadline, started = budget.deadline(name), time.monotonic()
        print(f"{name}: at most {deadline.left:.0f} s …", flush=True)
        try:
            part = part_of(deadline)
        except Exception as error:
            traceback.print_exc()
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            part = {"failed": why, "wrong": [why]}
        part["took"] = time.monotonic() - started
        results.put(name, part)
        trimmed = part.get("trimmed", [])
        left = f", no time for {1 if isinstance(trimmed, str) else len(trimmed)}" if trimmed else ""
        print(f"{name}: {part['took']:.0f} s, {len(part.get('wrong', []))} wrong{left}", flush=True)


def main(argv: list[str] | None = None, spent: float = 0.0) -> int:
    """Runs the command line; returns 1 if anything was wrong. ``spent``: seconds of the budget that are gone."""
    arguments = parser().parse_args(argv)
    if not torch.cuda.is_available():
        print(f"no GPU is visible to torch {torch.__version__}: nothing was measured", file=sys.stderr)
        return NO_GPU
    budget = Budget(arguments.budget - spent, [name for name in PHASES if name in arguments.only])
    known = environment.describe("cuda") | environment.measure("cuda")
    home = ROOT if (ROOT / "Makefile").is_file() else Path()  # an installed package has no place for results
    out = arguments.out or home / "benchmarks" / "results" / environment.slug(known["device"])
    results = Results(out, markdown, PICTURES)
    results.put("environment", known)
    print(f"{known['device']}: {known['versions']}", flush=True)
    chosen = {name: part for name, part in parts_of(known, out).items() if name in arguments.only}
    run_parts(chosen, results, budget)
    print(short(results.parts))
    for why in results.wrong[:40]:
        print(f"wrong: {why}")
    print(f"written: {out}")
    return 1 if results.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
