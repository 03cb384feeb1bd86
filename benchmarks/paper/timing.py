"""Seconds of a training step of the table's rows, each beside the dense one in pairs: for a machine without other work.

A step is a whole one: D's steps, G's step, the measured balance ratio, the exchange of blocks where one is due, the
average. Steps are timed in turns of one interval between exchanges, so that each turn holds one. D has the mean density
that it had over the kept runs of the row, and keeps it; a row without a kept run is not timed, nor is pruning, which is
dense for two thirds of its run.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ddst.benchmarks import report
from ddst.benchmarks.paper.estimates import Record, Runs, cell_of
from ddst.benchmarks.paper.plan import Cell
from ddst.data import load_images
from ddst.gan import PRESETS
from ddst.measure import MedianInterval, paired
from ddst.train import Trainer, resolve
from ddst.train.config import OPTIONS
from ddst.train.methods import CONTROLLED, SPARSE_D, STEERED

FILE = "timing.json"
PAIRS = 6


def time_rows(cells: Sequence[Cell], records: Sequence[Record], kept: Path) -> dict[str, Any]:
    """Times the rows of some cells, in their order, and keeps each at once; returns the file's contents.

    Args:
        cells: of the rows. One that is timed already, has no kept run, or has further settings is left out.
        records: kept runs. kept: the file.
    """
    runs = Runs(records)
    torch.set_num_threads(1)
    known = json.loads(kept.read_text()) if kept.exists() else _head()
    done = {cell_of(row).group for row in known["rows"]}
    for group in dict.fromkeys(cell.group for cell in cells):
        if group in done or group not in runs.groups or group[-1] or PRESETS[group[1]].full_g:
            continue
        row = time_row(list(runs.groups[group].values()))
        known["rows"].append(row)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{cell_of(row).name}: {1e3 * row['seconds']:.1f} ms a step, {row['speedup']['median']:.2f}x", flush=True)
    return known


def _head() -> dict[str, Any]:
    return {
        "kind": "paper timing",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": report.commit(),
        "machine": {"cpu": report.cpu_model(), "cores": os.cpu_count()},
        "rows": [],
    }


def time_row(records: Sequence[Record], pairs: int = PAIRS) -> dict[str, Any]:
    """One row: median seconds of a step, and how many times as fast as the dense one, with its 95 % interval."""
    record = records[0]
    cell = cell_of(record)
    density_d = statistics.fmean(r["mean_density_d"] for r in records)
    with tempfile.TemporaryDirectory() as scratch:
        mine = trainer_of(record["settings"], Path(scratch), density_d)
        dense = trainer_of({**record["settings"], "method": "dense", "algorithm_d": "static"}, Path(scratch), 1.0)
        turn = record["settings"]["interval_g"]

        def steps(trainer: Trainer) -> None:
            for _ in range(turn):
                trainer.train_step()

        load = os.getloadavg()[0]
        seconds, slower = paired(lambda: steps(mine), lambda: steps(dense), pairs)
    speedup = MedianInterval(1 / slower.median, 1 / slower.high, 1 / slower.low)
    return {
        "cell": {**record["cell"], "seed": cell.seed},
        "seconds": seconds / turn,
        "speedup": asdict(speedup),
        "steps_of_a_turn": turn,
        "density_g": mine.scheduler.density_g,
        "density_d": mine.scheduler.density_d,
        "load": {"before": round(load, 2), "after": round(os.getloadavg()[0], 2)},
    }


def trainer_of(settings: dict[str, Any], scratch: Path, density_d: float) -> Trainer:
    """A run at its beginning, whose D has a density and keeps it: no decision comes while it is timed."""
    method = settings["method"]
    held: dict[str, Any] = {"out": str(scratch), "steps": 10**6}
    if method in SPARSE_D:
        held["density_d"] = density_d
    if method in CONTROLLED:
        held["warmup"] = 10**6
    if method in STEERED:
        held["density_d_max"] = max(density_d, settings["density_d_min"])
    kept = {name: value for name, value in settings.items() if name in OPTIONS}
    config = resolve({**kept, **held})
    return Trainer(config, load_images(config.data, config.resolution))


__all__ = ["FILE", "Cell", "time_row", "time_rows", "trainer_of"]
