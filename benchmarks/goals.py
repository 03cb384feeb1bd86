"""What a whole training step shall reach, and reaches: one row a figure, measured by the command that stands there.

    python -m ddst.benchmarks goals                         `make bench`
    python -m ddst.benchmarks goals --only linear share     some of them
    python -m ddst.benchmarks goals --against REVISION      also each beside that build, in pairs

Each command runs in a process of its own, as the allocator's settings hold for a whole process. Exit code 1: a result
was wrong, or a figure has fallen behind the other build by more than 10 %. A goal that is missed does not fail.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddst.benchmarks import report

BEHIND = 1.10
#: The row of `--memory` that stands for the sparse networks at their best.
SPARSE = "sparse-fused"
Run = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        what: is measured. before: what it was when the goal was set (two Zen 4 cores, commit bb2608b). goal: to reach.
        read: takes the figure from a kept run. unit: behind numbers. most: the goal is the most it may be.
    """

    what: str
    before: str
    goal: float
    read: Callable[[Run], float]
    unit: str = "×"
    most: bool = False

    def reached(self, now: float) -> bool:
        """Whether a figure is as good as the goal."""
        return now <= self.goal if self.most else now >= self.goal


@dataclass(frozen=True)
class Goal:
    """Figures of one command: its arguments, and those of the comparison with another build (none: there is none)."""

    arguments: str
    figures: tuple[Figure, ...]
    compared: str = ""


def speedup(density: float) -> Callable[[Run], float]:
    """Of a step at a density, against dense torch."""
    return lambda run: _row(run, "density", density)["step"]["baselines"]["dense"]["speedup"]["median"]


def memory_of(name: str) -> Callable[[Run], float]:
    """Peak of a row of `--memory`, of dense eager torch."""
    return lambda run: _row(run, "row", name)["memory"]


def setting(index: int) -> Callable[[Run], float]:
    """Speed-up of a row of `freed-memory`."""
    return lambda run: run["rows"][index]["speedup"]


def gflops(run: Run) -> float:
    """Useful operations of a forward pass per second, in 10⁹."""
    return run["rows"][0]["passes"]["forward"]["peak_share"] * run["machine"]["peak_gflops"]


def outside(run: Run) -> float:
    """Per cent of an iteration, by `operator-share`."""
    return 100 * run["rows"][0]["share"]


def whole(run: Run) -> float:
    """Speed-up of the one row of `biggan`."""
    return run["rows"][0]["speedup"]["median"]


def _row(run: Run, key: str, value: object) -> Run:
    return next(row for row in run["rows"] if row[key] == value)


STEP = "three conv 128→128 3×3 at 32² + ReLU, forward + backward, 10 %"
GOALS = {
    "memory-64": Goal(
        f"--memory --batch 64 --threads 2 --repeats 1 --rows {SPARSE}",
        (Figure("peak of an iteration, batch 64, 10 %, of dense", "0.88", 0.50, memory_of(SPARSE), "", True),),
        "--layer sngan32 --batch 64 --density 0.1 --threads 2 --repeats 6",
    ),
    "memory-16": Goal(
        f"--memory --batch 16 --repeats 1 --rows {SPARSE}",
        (Figure("the same, batch 16", "0.66", 0.40, memory_of(SPARSE), "", True),),
    ),
    "iteration": Goal(
        "--layer sngan32 --batch 16 --density 0.1 0.3 --threads 1 --repeats 5",
        (
            Figure("iteration, one thread, batch 16, 10 %", "8.2", 10.0, speedup(0.1)),
            Figure("the same, 30 %", "3.8", 4.1, speedup(0.3)),
        ),
        "--layer sngan32 --batch 16 --density 0.1 0.3 --threads 1 --repeats 9",
    ),
    "iteration-64": Goal(
        "--layer sngan32 --batch 64 --density 0.1 --threads 2 --repeats 3 --allocator default",
        (Figure("iteration, two threads, batch 64, 10 %, the C library's allocator", "4.2", 8.0, speedup(0.1)),),
    ),
    "share": Goal(
        "operator-share",
        (Figure("share of an iteration outside of ddst:: operators, 10 %", "42 %", 25.0, outside, " %", True),),
    ),
    "step": Goal(
        "freed-memory",
        (
            Figure(f"{STEP}, in a plain script", "5.9", 8.0, setting(0)),
            Figure(f"{STEP}, as ddst train runs it", "5.9", 8.0, setting(2)),
        ),
        "--layer conv3x3-128-128-32 --batch 16 --density 0.1 --repeats 15",
    ),
    "linear": Goal(
        "--layer linear-1024-1024 --batch 64 --density 0.1 --baseline dense --repeats 15",
        (
            Figure("linear 1024², batch 64, 10 %, forward", "64", 90.0, gflops, " GFLOP/s"),
            Figure("the same, a step (goal: 1.4 times as fast as bb2608b, with --against)", "4.8", 6.7, speedup(0.1)),
        ),
        "--layer linear-1024-1024 --batch 64 --density 0.1 --repeats 15",
    ),
    "biggan": Goal(
        "biggan-iteration",
        (Figure("BigGAN-like iteration at 64², 10 % of the multiply-adds", "-", 6.0, whole),),
    ),
}  # fmt: skip


def kept_run(arguments: Sequence[str], folder: Path) -> Run | str:
    """What a command of the benchmarks keeps, or why it kept nothing."""
    file = folder / "run.json"
    file.unlink(missing_ok=True)
    line = [sys.executable, "-P", "-m", "ddst.benchmarks", *arguments, "--json", str(file)]
    done = subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if not file.exists():
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    run = report.load(file)
    wrong = [why for row in run["rows"] for why in row["wrong"]]
    return f"wrong: {', '.join(wrong)}" if wrong else run


def lines_of(goal: Goal, run: Run | str) -> list[str]:
    """The table's rows of a goal."""
    command = f"`{shlex.join(['python', '-m', 'ddst.benchmarks', *goal.arguments.split()])}`"
    lines = []
    for figure in goal.figures:
        sign = "≤" if figure.most else "≥"
        if isinstance(run, str):
            now, told = run, ""
        else:
            value = figure.read(run)
            now, told = f"{value:.3g}{figure.unit}", "yes" if figure.reached(value) else "no"
        cells = [figure.what, figure.before, now, f"{sign} {figure.goal:g}{figure.unit}", told, command]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def behind(run: Run | str, most: float = BEHIND) -> list[str]:
    """What has fallen behind another build in a run of `--against`: passes, steps, and the peak of memory.

    >>> slow = {"median": 1.2, "low": 1.1, "high": 1.3}
    >>> row = {"layer": "conv", "density": 0.1, "passes": {}, "step": {"baselines": {"build": {"ratio": slow}}}}
    >>> behind({"rows": [row]})
    ['step of conv at 10 %: x1.200']
    """
    if isinstance(run, str):
        return [run]
    found = []
    for row in run["rows"]:
        parts = (*row["passes"].items(), ("step", row["step"]))
        ratios = {name: figures["baselines"]["build"]["ratio"]["median"] for name, figures in parts}
        if "peak" in row:
            ratios["peak memory"] = row["peak"]["ratio"]
        found += [
            f"{name} of {row['layer']} at {100 * row['density']:g} %: x{ratio:.3f}"
            for name, ratio in ratios.items()
            if ratio > most
        ]
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m ddst.benchmarks goals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--only", nargs="+", choices=GOALS, default=list(GOALS), metavar="NAME", help=f"of {', '.join(GOALS)}")
    add("--against", metavar="BUILD", help="a commit (built once), a wheel, or a folder that ddst is installed into")
    return command


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 1 if a result was wrong or a figure has fallen behind."""
    arguments = parser().parse_args(argv)
    failed = []
    print("| what | before | now | goal | reached | command |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.only:
            goal = GOALS[name]
            run = kept_run(goal.arguments.split(), Path(scratch))
            print("\n".join(lines_of(goal, run)), flush=True)
            if isinstance(run, str):
                failed.append(f"{name}: {run}")
        for name in arguments.only if arguments.against else ():
            goal = GOALS[name]
            if goal.compared:
                line = [*goal.compared.split(), "--against", arguments.against]
                slower = behind(kept_run(line, Path(scratch)))
                print(f"{name} beside {arguments.against}: {', '.join(slower) or 'not behind'}", flush=True)
                failed += [f"{name} beside {arguments.against}: {why}" for why in slower]
    if failed:
        print(f"failed (wrong, or behind by more than {100 * (BEHIND - 1):.0f} %):", *failed, sep="\n  ")
    return 1 if failed else 0
