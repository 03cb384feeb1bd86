"""``python -m ddst.benchmarks prefer RESULTS.json``: lets "auto" take the CUDA C++ kernels where they were the fastest.

Reads the rows that ``make gpu`` left, and rewrites this device's lines of ``ddst/ops/cuda/preferred.json``. A kind of
call (operator, dtype, block, kernel, stride) is preferred between two densities if at every density measured between
them, and on every layer, CUDA C++ was faster than Triton and than dense from a cold cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddst.benchmarks.gpu.environment import KINDS
from ddst.benchmarks.gpu.results import write_whole
from ddst.benchmarks.registry import layer_of
from ddst.ops.cuda import preferred
from ddst.ops.cuda.preferred import Kind

OPERATORS = {"forward": "", "dgrad": "_input_grad", "wgrad": "_weight_grad"}


def fastest(rows: Sequence[dict[str, Any]], device: str) -> dict[Kind, tuple[float, float]]:
    """Kinds of calls, and the longest run of measured densities at which CUDA C++ won everything.

    >>> fastest([], "X1")
    {}
    """
    timed: dict[tuple[Kind, float, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row.get("wrong") or "cold" not in row:
            continue
        layer = layer_of(row["layer"])
        block = (row["block"][0], row["block"][1])
        dtype: torch.dtype = KINDS[row["kind"]][0]
        sides = ((layer.kernel,) * 2, (layer.stride,) * 2)
        op, tf32 = layer.op + OPERATORS[row["pass"]], row["kind"] == "tf32"
        kind = preferred.kind(device, op, dtype, block, *sides, tf32=tf32)
        timed.setdefault((kind, row["density"], f"{row['layer']} {row['batch']}"), {})[row["backend"]] = row["cold"]
    wins: dict[Kind, dict[float, bool]] = {}
    for (kind, density, _), by_backend in timed.items():
        cuda, triton = by_backend.get("cuda"), by_backend.get("triton")
        won = cuda is not None and cuda["seconds"] < min(
            cuda["dense_seconds"], triton["seconds"] if triton is not None else float("inf")
        )
        densities = wins.setdefault(kind, {})
        densities[density] = densities.get(density, True) and won
    runs = {kind: longest_run(densities) for kind, densities in wins.items()}
    return {kind: run for kind, run in runs.items() if run is not None}


def longest_run(won: dict[float, bool]) -> tuple[float, float] | None:
    """First and last density of the longest run of wins; None without a win.

    >>> longest_run({0.1: True, 0.2: True, 0.3: False, 0.5: True})
    (0.1, 0.2)
    """
    runs: list[list[float]] = [[]]
    for density in sorted(won):
        if won[density]:
            runs[-1].append(density)
        else:
            runs.append([])
    longest = max(runs, key=len)
    return (longest[0], longest[-1]) if longest else None


def main(argv: list[str]) -> int:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m ddst.benchmarks prefer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("results", type=Path, metavar="RESULTS.json", help="of a run of make gpu")
    command.add_argument("--file", type=Path, default=preferred.FILE, help="the table that is rewritten")
    arguments = command.parse_args(argv)
    try:
        kept = json.loads(arguments.results.read_text())
        device, rows = kept["environment"]["device"], kept["kernels"]["rows"]
    except (OSError, ValueError, KeyError) as error:
        command.error(f"{arguments.results} holds no rows of make gpu: {error}")
    found = {kind: run for kind, run in preferred.read(arguments.file).items() if kind.device != device}
    found |= fastest(rows, device)
    lines = [{"kind": kind._asdict(), "from": low, "to": high} for kind, (low, high) in sorted(found.items())]
    preferred.load.cache_clear()
    write_whole(arguments.file, json.dumps({"lines": lines}, indent=1) + "\n")
    print(*(f"{line['kind']} from {line['from']} to {line['to']}" for line in lines), sep="\n")
    return 0
