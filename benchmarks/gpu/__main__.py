"""The parts of `make gpu`, in order: ``python -m ddst.benchmarks.gpu --help``."""

from __future__ import annotations

import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from ddst.benchmarks.gpu import environment
from ddst.benchmarks.gpu.budget import Budget, ClosingTime, Deadline
from ddst.benchmarks.gpu.journal import Journal, Progress
from ddst.benchmarks.gpu.objects import architecture_of
from ddst.benchmarks.gpu.pictures import PICTURES
from ddst.benchmarks.gpu.results import Part, Results, in_a_line
from ddst.benchmarks.gpu.run import BUDGET, GRACE, NO_GPU, PHASES, parser
from ddst.benchmarks.gpu.table import markdown, short
from ddst.benchmarks.report import ROOT

PartOf = Callable[[Deadline, Progress], Part]
TUNED = "tuning.json"


def parts_of(known: Part, folder: Path, device: str = "cuda") -> dict[str, PartOf]:
    """Name -> what runs that part until a deadline, but for what is proven already. Each imports what it needs, so
    that one cannot keep another away.

    Args:
        known: the environment, measured. folder: where pictures of samples and the tuning table go.
    """
    processes = max(1, min(14, (os.cpu_count() or 2) - 2))

    def primitives(deadline: Deadline, progress: Progress) -> Part:
        from ddst.benchmarks.gpu import primitives

        major, minor = map(int, known["capability"].split("."))
        return primitives.run_all(architecture_of((major, minor)), deadline, progress=progress)

    def correctness(deadline: Deadline, progress: Progress) -> Part:
        from ddst.benchmarks.gpu import correctness

        groups, refusals = correctness.groups(device)
        return {**correctness.check_all(groups, processes, deadline, progress), "unusable": refusals}

    def kernels(deadline: Deadline, progress: Progress) -> Part:
        from ddst.benchmarks.gpu import kernel_rows

        return kernel_rows.measure_all(kernel_rows.specs(), known, device, deadline, progress=progress)

    def iteration(deadline: Deadline, progress: Progress) -> Part:
        from ddst.benchmarks.gpu import iteration

        return iteration.measure_all(iteration.VARIANTS, device, deadline, progress=progress)

    def tune(deadline: Deadline, progress: Progress) -> Part:
        from ddst.benchmarks import tune
        from ddst.benchmarks.gpu.kernel_rows import specs
        from ddst.kernels import tuning

        part = tune.tune(specs()[: tune.MATTERING], device, deadline, processes, progress=progress)
        if "file" in part:
            tuning.save(known["device"], folder / TUNED)
        return part

    def host(deadline: Deadline, progress: Progress) -> Part:
        from ddst.benchmarks.gpu import host_time

        return _whole("host", progress, lambda: host_time.measure(device))

    def train(deadline: Deadline, progress: Progress) -> Part:
        from ddst.benchmarks.gpu import training

        return _whole("train", progress, lambda: training.train(device, deadline, folder / "digits.png"))

    def candidates(deadline: Deadline, progress: Progress) -> Part:
        from ddst.benchmarks.gpu import sweep

        return sweep.check_all(sweep.sweeps(device), processes, deadline, progress)

    found: dict[str, PartOf] = {
        f.__name__: f for f in (primitives, correctness, kernels, iteration, tune, host, train, candidates)
    }
    assert tuple(found) == PHASES
    return found


def _whole(name: str, progress: Progress, measure: Callable[[], Part]) -> Part:
    """A part that is one result."""
    part: Part | None = progress.earlier(name)
    if part is None:
        part = measure()
        progress.keep(name, part, part, not part["wrong"] and not part.get("trimmed"))
    return part


def run_parts(parts: Mapping[str, PartOf], results: Results, budget: Budget, journal: Journal | None = None) -> None:
    """Runs the parts, each until its deadline, and keeps what they bring; an error ends its part only, as wrong."""
    for name, part_of in parts.items():
        deadline, started = budget.deadline(name), time.monotonic()
        print(f"{name}: at most {deadline.left:.0f} s …", flush=True)
        try:
            part = part_of(deadline, Progress(journal, name, partial(results.tell, name)))
        except Exception as error:
            traceback.print_exc()
            why = in_a_line(error)
            part = {**results.parts.get(name, {}), "failed": why, "wrong": [why]}
        part["took"] = time.monotonic() - started
        results.put(name, part)
        trimmed = part.get("trimmed", [])
        left = f", no time for {1 if isinstance(trimmed, str) else len(trimmed)}" if trimmed else ""
        print(f"{name}: {part['took']:.0f} s, {len(part.get('wrong', []))} wrong{left}", flush=True)


def surroundings(device: str) -> Part:
    """The part "environment". Where the rates cannot be measured, the part "kernels", which needs them, fails alone."""
    known = environment.describe(device)
    try:
        return known | environment.measure(device)
    except Exception as error:
        traceback.print_exc()
        return known | {"wrong": [f"rates were not measured: {in_a_line(error)}"]}


def main(argv: list[str] | None = None, spent: float = 0.0) -> int:
    """Runs the command line; returns 1 if anything was wrong. ``spent``: seconds of the budget that are gone."""
    arguments = parser().parse_args(argv)
    if not torch.cuda.is_available():
        print(f"no GPU is visible to torch {torch.__version__}: nothing was measured", file=sys.stderr)
        return NO_GPU
    whole = arguments.budget or BUDGET
    started = time.monotonic()
    budget = Budget(whole - spent, [name for name in PHASES if name in arguments.only])
    known = surroundings("cuda")
    home = ROOT if (ROOT / "Makefile").is_file() else Path()  # an installed package has no place for results
    out = arguments.out or home / "benchmarks" / "results" / environment.slug(known["device"])
    results = Results(out, markdown, PICTURES, known["device"])
    results.put("environment", known)
    print(f"{known['device']}: {known['versions']}", flush=True)
    take_table(out / TUNED, known["device"])
    circumstances = {"device": known["device"], **known["versions"]}
    journal = Journal(out / "journal.jsonl", circumstances, f"{known['date']}, {known['commit']}", arguments.anew)
    chosen = {name: part for name, part in parts_of(known, out).items() if name in arguments.only}
    with ClosingTime(whole + GRACE - spent - (time.monotonic() - started), lambda: last_words(results, cut_off=True)):
        run_parts(chosen, results, budget, journal)
    last_words(results)
    return 1 if results.wrong else 0


def take_table(table: Path, device: str) -> None:
    """Makes an earlier run's tuning table that of this tree, if the tree has none for the device."""
    if table.is_file():
        from ddst.kernels import tuning

        target = tuning.TABLES / tuning.device_file(device)
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copy(table, target)


def last_words(results: Results, cut_off: bool = False) -> None:
    """What a run ends with: what was wrong, then the table, of which the end of a long output still holds all."""
    for why in results.wrong[:20]:
        print(f"wrong: {why[:200]}")
    print(short(results.parts))
    print(f"{'cut off; ' if cut_off else ''}written: {results.folder}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
