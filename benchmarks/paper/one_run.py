"""One run of the table: trained by ``ddst train`` in a process of its own, and what is kept of it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddst.benchmarks import report
from ddst.benchmarks.paper.plan import Cell
from ddst.data import load_images
from ddst.train import Trainer, resolve
from ddst.train.collapse import watched
from ddst.train.compare import compare_with_dense
from ddst.train.folder import CHECKPOINT, LOG, SUMMARY
from ddst.train.log import read_log

SESSIONS, OUTPUT = "sessions.jsonl", "output.txt"
LOOK_EVERY = 20.0  # seconds between two looks at the machine's load
#: The machine's load, beyond the run's own thread, above which its seconds say little.
QUIET = 0.3

#: Arguments of ``ddst train``, a file for what it says, called every so often -> its exit code.
Start = Callable[[Sequence[str], Path, Callable[[], None]], int]


class Deadline:
    """A time at which training is asked to end, as by Ctrl-C: after its step, with a checkpoint."""

    def __init__(self, hours: float | None) -> None:
        self.at = None if hours is None else time.monotonic() + 3600 * hours

    @property
    def passed(self) -> bool:
        return self.at is not None and time.monotonic() >= self.at


def in_a_process(deadline: Deadline) -> Start:
    """How a run is started; it ends in order when the deadline or a signal comes."""

    def start(arguments: Sequence[str], output: Path, look: Callable[[], None]) -> int:
        line = [sys.executable, "-P", "-m", "ddst", "train", *arguments]
        with output.open("ab") as said, _passing_signals() as asked:
            # A session of its own: Ctrl-C reaches it once, through here, and not twice, which would end it at once.
            child = subprocess.Popen(line, stdout=said, stderr=said, stdin=subprocess.DEVNULL, start_new_session=True)
            sent = 0
            while child.poll() is None:
                look()
                if deadline.passed and not asked:
                    asked.append(signal.SIGTERM)
                if len(asked) > sent:
                    child.send_signal(asked[sent])
                    sent += 1
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(1.0)
        return child.returncode

    return start


@contextlib.contextmanager
def _passing_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM inside the block, as a list."""
    asked: list[int] = []
    old = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(cell: Cell, folder: Path, start: Start) -> int:
    """Begins or continues a run in a folder of its own; the exit code of ``ddst train``.

    The sessions it takes, and the load of the machine meanwhile, are noted beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sessions = folder / SESSIONS
    looked = -math.inf

    def note(**what: Any) -> None:
        with sessions.open("a") as file:
            file.write(json.dumps(what) + "\n")

    def look() -> None:
        nonlocal looked
        if time.monotonic() - looked >= LOOK_EVERY:
            looked = time.monotonic()
            note(load=round(os.getloadavg()[0], 2))

    begun = (folder / CHECKPOINT).exists() or (folder / LOG).exists()
    note(commit=report.commit(), begun=datetime.now(UTC).isoformat(timespec="seconds"), continued=begun)
    arguments = [*cell.arguments, "--out", str(folder), *(["--resume"] if begun else [])]
    return start(arguments, folder / OUTPUT, look)


def record(cell: Cell, folder: Path) -> dict[str, Any]:
    """What is kept of a finished run."""
    entries = list(read_log(folder / LOG))
    begun = next(entry for entry in entries if entry.get("event") == "start")
    steps = [entry for entry in entries if "event" not in entry]
    metric = [entry for entry in entries if entry.get("event") == "metric"]
    summary = json.loads((folder / SUMMARY).read_text())
    settings, last = begun["settings"], metric[-1]
    watch = watched(entries, settings["bounds"], settings["steps"])
    sessions = [json.loads(line) for line in (folder / SESSIONS).read_text().splitlines()]
    loads = [session["load"] for session in sessions if "load" in session]
    quality = summary["quality"]
    return {
        "kind": "paper",
        "cell": {**vars(cell), "changes": dict(cell.changes)},
        "command": shlex.join(["ddst", "train", *cell.arguments, "--out", cell.name]),
        "settings": settings,
        "versions": begun["versions"],
        "commit": sorted({session["commit"] for session in sessions if "commit" in session}),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {"cpu": report.cpu_model(), "cores": os.cpu_count()},
        "sessions": sum("commit" in session for session in sessions),
        "load": {"mean": round(statistics.fmean(loads), 2), "most": max(loads)} if loads else None,
        "distance": last["value"],
        "best": min(entry["value"] for entry in metric),
        "floor": quality["floor"],
        "shares": [round(share, 4) for share in quality["shares"]],
        "series": [[e["step"], round(e["seconds"], 2), e["flops"], round(e["value"], 3)] for e in metric],
        "seconds_per_step": summary["seconds_per_step"],
        **_memory(settings, summary),
        "flops": last["flops"],
        "flops_ratio": summary["flops_ratio"],
        "density_g": summary["generator"]["density"],
        "density_d": summary["discriminator"]["density"],
        "mean_density_d": statistics.fmean(entry["density_d"] for entry in steps),
        "balance_ratio": balance_ratio(steps),
        "signs": [sign.as_dict() for sign in watch.found],
        "collapsed": watch.collapsed,
    }


def balance_ratio(steps: Sequence[dict[str, Any]]) -> float | None:
    """mean(α) / mean(β) over all measurements of a run; None where β is not above 0 on average.

    >>> sample = {"alpha": 0.2, "beta": 0.5}
    >>> balance_ratio([{"sample": sample}, {"sample": None}, {"sample": {"alpha": 0.4, "beta": 0.5}}])
    0.6
    """
    samples = [e["sample"] for e in steps if e["sample"]]
    found = [(s["alpha"], s["beta"]) for s in samples if s["alpha"] is not None and s["beta"] is not None]
    alpha, beta = (statistics.fmean(column) for column in zip(*found, strict=True)) if found else (0.0, 0.0)
    return round(alpha / beta, 4) if beta > 0 else None


def _memory(settings: dict[str, Any], summary: dict[str, Any]) -> dict[str, int]:
    """Peaks of an iteration at the end of the run, and of its dense twin."""
    timing = summary["timing"]
    if timing is None:  # of a dense run nothing is compared
        config = resolve({**settings, "out": "unused"})
        found = compare_with_dense(Trainer(config, load_images(config.data, config.resolution)), 1)
        timing = {"peak_bytes": found.peak_bytes, "dense_peak_bytes": found.dense_peak_bytes}
    return {"peak_bytes": timing["peak_bytes"], "dense_peak_bytes": timing["dense_peak_bytes"]}
