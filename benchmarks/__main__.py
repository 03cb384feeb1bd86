"""The command line of the benchmarks.

    python -m ddst.benchmarks                                            a quick selection
    python -m ddst.benchmarks --layer sngan32-g --density 0.1 0.3        the layers of a network
    python -m ddst.benchmarks --layer sngan32 --density 0.1 --batch 16   a whole GAN iteration
    python -m ddst.benchmarks --layer conv3x3-192-320-24 linear-512-2048 layers of one's own shape
    python -m ddst.benchmarks --layer targets sngan32 --against main     this build beside that of another commit
    python -m ddst.benchmarks --list --layer all                         what there is to measure
    python -m ddst.benchmarks table RUN.json [--readme README.md]        kept runs as a Markdown table
    python -m ddst.benchmarks picture RUN.json FILE.png                  a kept run as a picture
    python -m ddst.benchmarks tune --help                                the fastest configurations of a GPU's kernels
    python -m ddst.benchmarks --memory                                   peak memory and time of a GAN iteration
    python -m ddst.benchmarks goals                                      what a training step shall reach, and reaches
    python -m ddst.benchmarks operator-share                             time of an iteration outside sparse operators
    python -m ddst.benchmarks host-cost                                  what calls cost where nothing is to compute
    python -m ddst.benchmarks hopper-counts                              what kernels for sm_90a issue, in machine code
    python -m ddst.benchmarks biggan-iteration                           an iteration of BigGAN at 64 pixels
    python -m ddst.benchmarks freed-memory                               what it gains that freed memory is kept
    python -m ddst.benchmarks memory-over-time                           whether memory stays flat over 2,000 steps
    python -m ddst.benchmarks quality-of-distributions                   Fréchet distances at equal multiply-adds
    python -m ddst.benchmarks models                                     the table of docs/models.md
    python -m ddst.benchmarks paper                                      the paper's methods trained: docs/results.md

Printed for every pass: ms, the floor (the larger of useful operations at the measured peak and bytes at the measured
bandwidth), shares of both, then the dense time ("n" NCHW or "c" channels_last, the faster) and its share of peak.
With --against: ms of both builds, and the median of the paired ratios this / other with its 95 % interval.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import ddst
from ddst.benchmarks import against, registry, report
from ddst.benchmarks.problem import LAYOUTS
from ddst.benchmarks.runner import Row, Settings, measure

#: Commands that are modules of their own; a dash in a name is an underscore in the module's.
COMMANDS = (
    "biggan-iteration",
    "freed-memory",
    "goals",
    "hopper-counts",
    "host-cost",
    "memory-over-time",
    "models",
    "operator-share",
    "paper",
    "prefer",
    "quality-of-distributions",
    "tune",
)


def block_of(text: str) -> tuple[int, int]:
    """16x16 -> (16, 16)."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and 0 < int(part) <= 64 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no block, expected for example 16x16, sides from 1 to 64")
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
    command = argparse.ArgumentParser(
        prog="python -m ddst.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ", ".join(["all", *registry.NETWORKS, *registry.GANS])
    command.epilog = textwrap.fill(f"--layer NAME: {registry.GRAMMAR}; or one of {known}.", 100)
    add = command.add_argument
    add("--op", nargs="+", choices=registry.OPS, default=registry.OPS, help="only these operators")
    add(
        "--layer",
        nargs="+",
        metavar="NAME",
        help="layers, networks, GANs or 'all', see below (default: a quick selection)",
    )
    add("--density", nargs="+", type=density_of, default=[0.1, 0.3], help="default: 0.1 0.3")
    add("--block", nargs="+", type=block_of, default=[(16, 16)], help="b_out x b_in, default 16x16")
    add("--batch", nargs="+", type=positive, default=[16], help="default: 16")
    add("--mask", nargs="+", choices=registry.MASKS, default=["random"], help="skewed: rows unequal 1:4")
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    baselines = {b for table in (registry.BASELINES, registry.PEERS) for names in table.values() for b in names}
    add(
        "--baseline", nargs="+", choices=sorted(baselines), help="default: all but other packages (benchmarks/peers.py)"
    )
    add("--threads", type=positive, default=1)
    add("--repeats", type=positive, default=15, help="rounds, each measures every program once (default: 15)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine, with one thread")
    add("--layout", choices=LAYOUTS, default="channels_last", help="of the packed side's activations")
    add(
        "--against",
        metavar="BUILD",
        help="compare with another build instead of with dense torch: a commit (built once), "
        "a wheel, or a folder that ddst is installed into",
    )
    add("--exchanges", type=int, default=0, metavar="N", help="with --against: N random exchanges of every mask first")
    add("--allocator", choices=("kept", "default"), default="kept", help="freed memory stays in the process (default)")
    add("--json", type=Path, metavar="FILE", help="also keep the run in this file")
    add("--picture", type=Path, metavar="FILE", help="also draw speed-up over density")
    add("--list", action="store_true", help="print the cases, measure nothing")
    return command


def table_parser() -> argparse.ArgumentParser:
    """The command line of `table`."""
    command = argparse.ArgumentParser(prog="python -m ddst.benchmarks table", description="Kept runs as Markdown.")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN.json", help="one; of --memory any number")
    command.add_argument("--readme", type=Path, metavar="FILE", help="put it between its markers in this file")
    return command


def table(argv: list[str]) -> int:
    """`table RUN.json`: prints the table, or puts it into a file."""
    command = table_parser()
    arguments = command.parse_args(argv)
    try:
        runs = [report.load(file) for file in arguments.runs]
        text, markers = table_of(runs)
        if arguments.readme:
            report.insert(arguments.readme, text, markers)
        else:
            print(text)
    except (OSError, ValueError) as error:
        command.error(str(error))
    return 0


def picture(argv: list[str]) -> int:
    """`picture RUN.json FILE`: draws a kept run of layers or of --memory."""
    command = argparse.ArgumentParser(prog="python -m ddst.benchmarks picture", description="A kept run as a picture.")
    command.add_argument("run", type=Path, metavar="RUN.json")
    command.add_argument("file", type=Path, metavar="FILE", help="its ending says the format: .png, .svg, .pdf")
    arguments = command.parse_args(argv)
    from ddst.benchmarks.picture import draw

    try:
        draw(report.load(arguments.run), arguments.file)
    except (OSError, ValueError) as error:
        command.error(str(error))
    return 0


def table_of(runs: list[dict[str, Any]]) -> tuple[str, tuple[str, str]]:
    """The table of some runs, and between which markers it stands.

    Raises:
        ValueError: runs that make no table together.
    """
    kinds = {run.get("kind", "layers") for run in runs}
    if kinds == {"memory"}:
        from ddst.benchmarks import memory_table

        return memory_table.markdown(runs), memory_table.MARKERS
    if kinds != {"layers"} or len(runs) > 1:
        raise ValueError(f"one run of layers, or several of --memory make a table, got {len(runs)} of {sorted(kinds)}")
    others = any("of_dense" in b for row in runs[0]["rows"] for b in row.get("step", {}).get("baselines", {}).values())
    return report.markdown(runs[0]), report.PEER_MARKERS if others else report.MARKERS


def chosen_cases(arguments: argparse.Namespace) -> list[registry.Case]:
    """The cases of the command line.

    Raises:
        ValueError: an unknown layer, or no case left.
    """
    cases = registry.cases(
        arguments.layer or list(dict.fromkeys(case.layer for case in registry.QUICK)),
        ops=arguments.op,
        batches=arguments.batch,
        densities=arguments.density,
        blocks=arguments.block,
        masks=arguments.mask,
        dtype=arguments.dtype,
        device=arguments.device,
        baselines=arguments.baseline,
    )
    if not cases:
        raise ValueError("no case fits: a layer needs as many channels as the block, a skewed mask a density below 1")
    for case in cases:
        check_size(case)
    return cases


def check_size(case: registry.Case) -> None:
    """Raises ValueError if a layer and its activations cannot fit into this machine's memory."""
    if case.op == "gan":
        return
    layer = registry.layer_of(case.layer)
    sizes = ((layer.size, layer.in_channels), (layer.out_size if layer.size else 0, layer.out_channels))
    pixels = sum((size**layer.dims or 1) * channels for size, channels in sizes)
    # Tensors of the packed and the dense side, and the check in float64.
    needed = 5 * 8 * (math.prod(layer.weight_shape) + case.batch * pixels)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"--layer {case.layer} with --batch {case.batch} needs about {needed / 2**30:,.0f} GiB, "
            f"this machine has {memory / 2**30:,.0f}"
        )


def run(
    cases: list[registry.Case],
    measure_one: Callable[[registry.Case], Row],
    head: str = report.HEAD,
    text_of: Callable[[Row], str] = report.text_of,
) -> list[Row]:
    """Measures and prints each case."""
    rows = []
    print(head)
    for case in cases:
        rows.append(measure_one(case))
        print(text_of(rows[-1]), flush=True)
    return rows


def run_against(arguments: argparse.Namespace, cases: list[registry.Case], settings: Settings) -> list[Row]:
    """Measures and prints each case in this build and the other."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        other = against.build_of(arguments.against, scratch, arguments.device == "cuda")
        exchanged = f", after {arguments.exchanges} exchanges of every mask" if arguments.exchanges else ""
        print(f"in place of dense: the build of {other.name}{exchanged}")
        comparison = stack.enter_context(against.Comparison(other, settings, arguments.exchanges))
        rows = run(cases, comparison.measure, against.HEAD, against.text_of)
    print(against.slowest(rows))
    return rows


def _main_of(module: str) -> Callable[[list[str]], int]:
    return importlib.import_module(f"ddst.benchmarks.{module}").main


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 1 if a row was wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["table"]:
        return table(argv[1:])
    if argv[:1] == ["picture"]:
        return picture(argv[1:])
    if "--memory" in argv:
        return _main_of("memory")([argument for argument in argv if argument != "--memory"])
    if argv and argv[0] in COMMANDS:
        return _main_of(argv[0].replace("-", "_"))(argv[1:])
    command = parser()
    arguments = command.parse_args(argv)
    if arguments.exchanges < 0 or (arguments.exchanges and not arguments.against):
        command.error(f"--exchanges must be at least 0, and needs --against, got {arguments.exchanges}")
    if arguments.against and arguments.allocator != "kept":
        command.error("--allocator default: both builds of --against keep freed memory")
    if arguments.against and arguments.picture:
        command.error("--picture draws speed-ups over dense, which --against does not measure")
    settings = Settings(arguments.threads, arguments.repeats, arguments.clock, arguments.layout)
    try:
        cases = chosen_cases(arguments)
        if arguments.list:
            print(*cases, sep="\n")
            return 0
        allocator = report.keep_freed_memory() if arguments.allocator == "kept" else "default"
        known = {**report.facts(settings, arguments.device), "allocator": allocator}
        print(
            f"ddst {ddst.__version__} at {known['commit']} ({known['machine']['capability']}), torch "
            f"{torch.__version__}, {known['machine']['cpu']}, {settings.threads} thread(s), {settings.clock} time, "
            f"packed side {settings.layout}; measured peak {known['machine']['peak_gflops']} GFLOP/s, "
            f"{known['machine']['bandwidth_gbytes']} GB/s; allocator: {allocator}"
        )
        if arguments.against:
            known["against"] = arguments.against
            rows = run_against(arguments, cases, settings)
        else:
            rows = run(cases, lambda case: measure(case, settings))
    except ValueError as error:
        command.error(str(error))
    if arguments.json:
        report.save(arguments.json, known, rows)
    if arguments.picture:
        from ddst.benchmarks.picture import draw

        draw({**known, "rows": rows}, arguments.picture)
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
