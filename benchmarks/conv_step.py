"""Times one training step of a layer (forward, dgrad, wgrad): packed operators against dense torch.

Every pass of the dense layer runs in the faster of NCHW and channels_last; measurements alternate between the two
sides in one process; a speed-up is the median of the ratios of neighbouring measurements. Results are compared with
dense torch in float64 first: a wrong row is reported as wrong, and not timed.

    python -m ddst.benchmarks.conv_step --layer conv3x3-256-16 --density 0.1 0.3
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import ddst
from ddst.benchmarks.problems import LAYERS, PASSES, Layer, Problem
from ddst.benchmarks.timing import CLOCKS, Spread, fastest, interleaved

LAYOUTS = ("nchw", "channels_last")


def measure(layer: Layer, density: float, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table: a layer at a density."""
    batch = args.batch or (64 if layer.is_linear else 16)
    problem = Problem.make(layer, density, batch, args.block, args.layout == "channels_last")
    row: dict[str, Any] = {
        "layer": layer.name,
        "density": problem.values.numel() / problem.weight.numel(),
        "batch": batch,
        "block": list(args.block),
        "wrong": problem.wrong_passes(),
    }
    if row["wrong"]:
        return row
    in_layouts = [problem.dense(False), problem.dense(True)]
    clock = CLOCKS[args.clock]
    choice = [fastest([works[i] for works in in_layouts], clock) for i in range(len(PASSES))]
    dense = [in_layouts[choice[i]][i] for i in range(len(PASSES))]
    works = [work for pair in zip(problem.packed(), dense, strict=True) for work in pair]
    samples = interleaved(works, args.repeats, clock)
    packed_seconds, dense_seconds = samples[0::2], samples[1::2]
    for i, name in enumerate(PASSES):
        packed = Spread.of(packed_seconds[i]).median
        ratio = Spread.of([d / p for p, d in zip(packed_seconds[i], dense_seconds[i], strict=True)])
        row[name] = {
            "ms": 1e3 * packed,
            "gflops": 2e-9 * problem.multiply_adds() / packed,
            "dense_ms": 1e3 * Spread.of(dense_seconds[i]).median,
            "dense_gflops": 2e-9 * problem.dense_multiply_adds() / Spread.of(dense_seconds[i]).median,
            "dense_layout": LAYOUTS[choice[i]],
            "speedup": vars(ratio),
        }
    step = Spread.of(
        [
            sum(pass_[k] for pass_ in dense_seconds) / sum(pass_[k] for pass_ in packed_seconds)
            for k in range(args.repeats)
        ]
    )
    row["step"] = {"speedup": vars(step)}
    return row


def describe(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    head = f"{row['layer']:<17} {100 * row['density']:5.1f} %"
    if row["wrong"]:
        return f"{head}  WRONG: {', '.join(row['wrong'])}"
    cells = [
        f"{row[name]['ms']:7.3f} ms {row[name]['gflops']:6.1f} ({row[name]['dense_gflops']:5.1f}) "
        f"{row[name]['speedup']['median']:5.2f}x"
        for name in PASSES
    ]
    step = row["step"]["speedup"]
    return f"{head} | {' | '.join(cells)} | {step['median']:5.2f}x [{step['low']:.2f}, {step['high']:.2f}]"


def block_of(text: str) -> tuple[int, int]:
    """16x16 -> (16, 16)."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no block, expected for example 16x16")
    return int(parts[0]), int(parts[1])


def positive(text: str) -> int:
    """An int of at least one."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive int")
    return int(text)


def density_of(text: str) -> float:
    """A density above zero, at most one."""
    try:
        density = float(text)
    except ValueError:
        density = 0.0
    if not 0.0 < density <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no density, expected a number above 0, at most 1")
    return density


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="python -m ddst.benchmarks.conv_step", description=__doc__.splitlines()[0])
    command.add_argument("--layer", nargs="+", choices=[*LAYERS, "all"], default=["conv3x3-256-16"])
    command.add_argument("--density", nargs="+", type=density_of, default=[0.1, 0.3])
    command.add_argument("--batch", type=positive, help="default: 16, linear layers 64")
    command.add_argument("--threads", type=positive, default=1)
    command.add_argument("--block", type=block_of, default=(16, 16), help="b_out x b_in, default 16x16")
    command.add_argument("--layout", choices=LAYOUTS, default="channels_last", help="of the packed side's activations")
    command.add_argument("--repeats", type=positive, default=21)
    command.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: for a busy machine, one thread")
    command.add_argument("--json", type=Path, help="also write the rows to this file")
    return command


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 1 if a row was wrong."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    names = list(LAYERS) if "all" in args.layer else args.layer
    capability = torch.ops.ddst.cpu_capability()
    print(
        f"ddst {ddst.__version__} ({capability}), torch {torch.__version__}, {args.threads} thread(s), "
        f"blocks {args.block[0]}x{args.block[1]}, packed side {args.layout}, {args.repeats} pairs of {args.clock} time"
    )
    columns = " | ".join(f"{name + ': packed GFLOP/s (dense) ratio':<37}" for name in PASSES)
    print(f"{'layer':<17} density | {columns} | step [10 %, 90 %]")
    rows = []
    with torch.no_grad():
        for name in names:
            for density in args.density:
                rows.append(measure(LAYERS[name], density, args))
                print(describe(rows[-1]), flush=True)
    if args.json:
        facts = {"cpu_capability": capability, "torch": torch.__version__, "threads": args.threads, "clock": args.clock}
        args.json.write_text(json.dumps({**facts, "layout": args.layout, "rows": rows}, indent=1) + "\n")
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
