"""The paper's table on data that is at hand: trains its rows, keeps each run, and builds the page of them.

    python -m ddst.benchmarks paper                            all parts, in the order of their worth
    python -m ddst.benchmarks paper --only goal --hours 8      some of them, so long
    python -m ddst.benchmarks paper --only goal --steps 800    shorter runs, which stand apart in the table
    python -m ddst.benchmarks paper --list                     what would be trained now, nothing is
    python -m ddst.benchmarks paper --page-only                the page of the kept runs
    python -m ddst.benchmarks paper --only goal --time         seconds of a step of these rows: on a quiet machine

Parts: goal (dense, static, DDST relaxed at 10 %, 16x16 blocks, digits, 5 seeds), digits (every method at 10 and 30 %,
16x16 blocks and single weights), collapse (20 seeds of SDST-RigL), rest (20 and 50 %, then shapes), moves (SDST-RigL
with other intervals, shares and averages). A run that is kept is not made again; one that was interrupted, by Ctrl-C,
--hours or a kill, goes on from its last checkpoint. Exit code 1: a run broke off or could not begin.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddst.benchmarks.paper.plan import PARTS, STEPS, Cell, plan

#: Exit codes of a run that was asked to end, in order or before it listened.
INTERRUPTED = {signal.SIGINT + 128, signal.SIGTERM + 128, -signal.SIGINT, -signal.SIGTERM}


def load(results: Path) -> list[dict[str, Any]]:
    """The kept runs of a folder.

    Raises:
        ValueError: a file that holds something else.
    """
    from ddst.benchmarks.paper.timing import FILE

    records = []
    for file in sorted(results.glob("*.json")):
        if file.name == FILE:
            continue
        found = json.loads(file.read_text())
        if not isinstance(found, dict) or found.get("kind") != "paper":
            raise ValueError(f"{file} is no run of this program")
        records.append(found)
    return records


def make(cells: Sequence[Cell], runs: Path, results: Path, hours: float | None, start: Any = None) -> int:
    """Trains what is not kept yet, in order; the exit code.

    Args:
        cells: to train. runs: folder of their folders. results: folder of what is kept.
        hours: after which none goes on. start: as of `one_run.train`; None: each in a process of its own.
    """
    from ddst.benchmarks.paper.one_run import OUTPUT, Deadline, in_a_process, record, train

    deadline, failed = Deadline(hours), 0
    results.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        kept, folder = results / f"{cell.name}.json", runs / cell.name
        if kept.exists():
            continue
        if deadline.passed:
            break
        code = train(cell, folder, start or in_a_process(deadline))
        if code in INTERRUPTED:
            print(f"{cell.name}: interrupted, goes on from its checkpoint the next time", flush=True)
            return 0 if deadline.passed else code if code > 0 else 128 - code
        if code == 0:
            found = record(cell, folder)
            said = f"distance {found['distance']:.1f}" + (", collapsed" if found["collapsed"] else "")
        else:
            lines = (folder / OUTPUT).read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
            said, failed = lines[-1], 1
            found = {"kind": "paper", "cell": {**vars(cell), "changes": dict(cell.changes)}, "error": said}
        print(f"{cell.name}: {said}", flush=True)
        if code in (0, 1):  # Others never began, or were killed: they are tried again.
            kept.write_text(json.dumps(found, indent=1) + "\n")
    return failed


def changes_of(text: str) -> tuple[str, str]:
    """'interval-g=100' -> ('interval_g', '100')."""
    name, sign, value = text.partition("=")
    if not sign or not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting, expected NAME=VALUE, for example interval-g=100")
    return name.replace("-", "_"), value


def hours_of(text: str) -> float:
    """A number above zero."""
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of hours above 0")
    return hours


def parser() -> argparse.ArgumentParser:
    """The command line of `paper`."""
    from ddst.benchmarks.__main__ import positive

    command = argparse.ArgumentParser(
        prog="python -m ddst.benchmarks paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS[:-1], metavar="PART",
        help=f"of {', '.join(PARTS)} (default: all but the last)")  # fmt: skip
    add("--steps", type=positive, default=STEPS, help=f"of every run (default: {STEPS})")
    add("--seeds", type=positive, default=3, help="of each row (default: 3, goal 5)")
    add("--hours", type=hours_of, help="after so many the run at hand is interrupted (default: none)")
    add(
        "--set",
        nargs="+",
        type=changes_of,
        default=[],
        metavar="NAME=VALUE",
        help="settings of ddst train, for all runs",
    )
    add("--runs", type=Path, default=Path("runs/paper"), help="folders of the runs (default: runs/paper)")
    add("--results", type=Path, default=Path("runs/paper/results"), help="what is kept (default: runs/paper/results)")
    add("--page", type=Path, default=Path("runs/paper/results.md"), help="the table (default: runs/paper/results.md)")
    what = command.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print what is to be trained, train nothing")
    what.add_argument("--page-only", action="store_true", help="build the page of the kept runs, train nothing")
    what.add_argument("--time", action="store_true", help="time the rows of which a run is kept, train nothing")
    return command


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    from ddst.benchmarks.paper.page import page, write
    from ddst.benchmarks.paper.timing import FILE, time_rows

    command = parser()
    given = command.parse_args(argv)
    cells = [cell.with_changes(given.set) for cell in plan(given.only, given.steps, given.seeds)]
    if given.list:
        for cell in cells:
            if not (given.results / f"{cell.name}.json").exists():
                print(cell.name)
        return 0
    try:
        code = 0
        if given.time:
            time_rows(cells, load(given.results), given.results / FILE)
        elif not given.page_only:
            code = make(cells, given.runs, given.results, given.hours)
        timing = given.results / FILE
        write(given.page, page(load(given.results), json.loads(timing.read_text()) if timing.exists() else None))
    except (OSError, ValueError) as error:
        command.error(str(error))
    print(f"written: {given.page}")
    return code
