"""What `ddst.sparsify` does for the GANs that people train: the table of docs/models.md.

    python -m ddst.benchmarks models                                     every network of `ddst.models.registry`
    python -m ddst.benchmarks models --name dcgan-g dcgan-d --density 0.2
    python -m ddst.benchmarks models --write docs/models.md --json FILE

Each network is adopted by two lines, unchanged: made, channels_last, `ddst.sparsify(network, density, sample=sample)`.
Its step (forward and backward of the mean square of its outputs) runs in turn with the dense one in the faster memory
format, after `ddst.densify` of a copy has given the same outputs. Exit code 1: a result was wrong.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ddst
from ddst.benchmarks import report
from ddst.benchmarks.network_work import (
    floor,
    forward_macs,
    layers_on_sparse_operators,
    multiplying_share,
    weight_count,
)
from ddst.benchmarks.runner import Row, Settings
from ddst.measure import CLOCKS, fastest, paired
from ddst.models.registry import MODELS, Inputs, outputs_of, train_step
from ddst.nn import sparse_layers

TOLERANCE = 1e-4  # of the largest output, in float32
UNSEEN = "weights that sparsify does not look for"
HEAD = f"{'network':<20} density  packed  with speed  mult.-adds     step ms  dense / sparse [95 %]        floor"


def laid_out(network: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """The network, in place, and its images in channels_last, if it runs so.

    torch refuses it for parameters of five dimensions, and code that takes a ``view`` of its weight fails.
    """
    if any(p.dim() == 5 for p in network.parameters()):
        return network, inputs
    last = tuple(t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs)
    try:
        copy.deepcopy(network).to(memory_format=torch.channels_last)(*last)
    except RuntimeError:
        return network, inputs
    return network.to(memory_format=torch.channels_last), last


def largest_error(sparse: nn.Module, inputs: Inputs) -> float:
    """Between the outputs of a network and of its `ddst.densify`, over the largest; in evaluation, changes nothing."""
    sparse = copy.deepcopy(sparse).eval()
    found = []
    for network in (sparse, ddst.densify(copy.deepcopy(sparse))):
        torch.manual_seed(1)
        with torch.no_grad():
            found.append(outputs_of(network(*inputs)))
    pairs = zip(*found, strict=True)
    return max(float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)) for ours, theirs in pairs)


def why_dense(adopted: ddst.SparsifyReport, total: int) -> dict[str, float]:
    """Reason -> share of all weights that were left dense for it, the largest first; numbers are left out of reasons.

    >>> network = nn.Sequential(nn.Conv2d(32, 32, 1), nn.Conv2d(3, 32, 1), nn.Conv2d(32, 4, 1))
    >>> why_dense(ddst.sparsify(network, 0.5, distribution="uniform"), 1248)
    {'fewer channels than a block of 16x16': 0.179...}
    """
    shares: dict[str, float] = {}
    for layer in adopted.layers:
        if layer.reason is not None:
            reason = re.sub(r"^\d+ to \d+ channels, fewer than", "fewer channels than", layer.reason)
            shares[reason] = shares.get(reason, 0.0) + layer.size / total
    unseen = 1 - sum(layer.size for layer in adopted.layers) / total
    if unseen > 0:
        shares[UNSEEN] = unseen
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def measure(
    name: str, densities: Sequence[float], block: tuple[int, int], distribution: str, settings: Settings
) -> list[Row]:
    """A row for each density: shares, the step's ratio and its floor, or why there is none ("error", "wrong")."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    model, clock = MODELS[name], CLOCKS[settings.clock]
    plain = model.make()
    sample = model.sample(plain)
    last, sample_last = laid_out(copy.deepcopy(plain), sample)
    layouts = [(plain, sample), (last, sample_last)]
    dense, fed = layouts[fastest([lambda one=one: train_step(*one) for one in layouts], clock, rounds=2)]
    total, macs = weight_count(dense), forward_macs(dense, fed)
    share = multiplying_share(dense, fed, min(settings.repeats, 5), clock)
    rows = []
    for density in densities:
        row: Row = {"layer": name, "density": density, "batch": len(fed[0]), "block": list(block), "wrong": []}
        row |= {"distribution": distribution, "weights": total, "multiplying_share": share}
        rows.append(row)
        # Of the untouched twin: a training step leaves spectral norm's vectors and running means changed.
        torch.manual_seed(0)
        sparse, _ = laid_out(model.make(), sample)
        try:
            adopted = ddst.sparsify(sparse, density, block=block, distribution=distribution, sample=sample_last)
        except ValueError as error:
            row["error"] = str(error)
            continue
        packed = sum(layer.size for layer in adopted.layers if layer.reason is None)
        row |= {"packed": packed / total, "dense": why_dense(adopted, total)}
        error = largest_error(sparse, sample_last)
        if not error <= TOLERANCE:
            row["wrong"] = [f"outputs differ by {error:.1e} of the largest"]
            continue
        layers = sparse_layers(sparse)
        running = [layers[name] for name in layers_on_sparse_operators(sparse, sample_last)]
        row["with_speed"] = sum(math.prod(layer.weight_shape) for layer in running) / total
        row["macs_left"] = forward_macs(sparse, sample_last) / macs
        row["floor"] = floor(share, row["macs_left"])
        seconds, ratio = paired(
            lambda: train_step(dense, fed),
            lambda sparse=sparse: train_step(sparse, sample_last),
            settings.repeats,
            clock,
        )
        row |= {"seconds": seconds / ratio.median, "speedup": asdict(ratio)}
    return rows


def text_of(row: Row) -> str:
    """A row as a line."""
    head = f"{row['layer']:<20} {100 * row['density']:5g} %"
    if "error" in row:
        return f"{head}  not sparse: {row['error']}"
    if row["wrong"]:
        return f"{head}  WRONG, not timed: {', '.join(row['wrong'])}"
    ratio = row["speedup"]
    return (
        f"{head} {100 * row['packed']:6.1f}% {100 * row['with_speed']:10.1f}% {100 * row['macs_left']:10.1f}% "
        f"{1e3 * row['seconds']:11.2f} {ratio['median']:8.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}] "
        f"of {row['floor']:5.2f}x"
    )


def markdown(run: dict[str, Any]) -> str:
    """The table of a run: a line a network, a column a density.

    Shares and reasons are those at the density nearest to 20 %.
    """
    densities = sorted({row["density"] for row in run["rows"]})
    lines = [
        "| network | weights | packed | with speed | " + " | ".join(f"{100 * d:g} %" for d in densities) + " | dense |",
        "| --- " * (5 + len(densities)) + "|",
    ]
    networks: dict[str, dict[float, Row]] = {}
    for row in run["rows"]:
        networks.setdefault(row["layer"], {})[row["density"]] = row
    for name, rows in networks.items():
        shown = rows[min(rows, key=lambda density: abs(density - 0.2))]
        cells = [name, f"{shown['weights'] / 1e6:.1f} M", _percent(shown.get("packed", 0.0))]
        cells += [_percent(shown["with_speed"]) if "with_speed" in shown else "-"]
        cells += [_cell(rows[density]) if density in rows else "" for density in densities]
        reasons = [f"{_percent(share)} {reason}" for reason, share in shown.get("dense", {}).items() if share >= 5e-4]
        lines.append(f"| {' | '.join([*cells, shown.get('error', '; '.join(reasons)).replace('|', '/')])} |")
    machine, settings = run["machine"], run["settings"]
    lines += [
        "",
        f"Distribution `{run['distribution']}`, blocks of {run['block'][0]}x{run['block'][1]}; {settings['clock']} "
        f"time. {machine['cpu']}, {machine['capability']}, {settings['threads']} thread(s); torch "
        f"{run['versions']['torch']}, commit {run['commit']}, {run['date']}; `{run['command']}`.",
    ]
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _cell(row: Row) -> str:
    if "error" in row:
        return "-"
    return "wrong" if row["wrong"] else f"{row['speedup']['median']:.2f}× ({row['floor']:.1f})"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from ddst.benchmarks.__main__ import block_of, density_of, positive

    command = argparse.ArgumentParser(
        prog="python -m ddst.benchmarks models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--name", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}")
    add("--density", nargs="+", type=density_of, default=[0.1, 0.2, 0.3], help="default: 0.1 0.2 0.3")
    add("--block", type=block_of, default=(16, 16), help="default: 16x16")
    add("--distribution", choices=("erk", "work", "uniform"), default="erk", help="default: erk")
    add("--repeats", type=positive, default=7, help="pairs of steps, at least six, at first (default: 7)")
    add("--threads", type=positive, default=1)
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine, with one thread")
    add("--write", type=Path, metavar="FILE", help=f"put the table between {' and '.join(report.MARKERS)} of this file")
    add("--json", type=Path, metavar="FILE", help="also keep the run in this file")
    return command


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 1 if a row was wrong."""
    command = parser()
    arguments = command.parse_args(argv)
    settings = Settings(arguments.threads, arguments.repeats, arguments.clock)
    if arguments.write:
        try:
            report.check_markers(arguments.write)
        except (OSError, ValueError) as error:
            command.error(f"--write: {error}")
    known = {**report.facts(settings), "allocator": report.keep_freed_memory()}
    known |= {"block": list(arguments.block), "distribution": arguments.distribution}
    known["command"] = shlex.join(["python", "-m", "ddst.benchmarks", "models", *(argv or [])])
    rows: list[Row] = []
    print(HEAD)
    for name in arguments.name:
        for row in measure(name, arguments.density, arguments.block, arguments.distribution, settings):
            rows.append(report.rounded(row))
            print(text_of(row), flush=True)
    if arguments.json:
        report.save(arguments.json, known, rows)
    if arguments.write:
        report.insert(arguments.write, markdown({**known, "rows": rows}))
    return 1 if any(row["wrong"] for row in rows) else 0
