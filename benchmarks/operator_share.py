"""Which share of a sparse GAN iteration's time is spent outside of ddst's operators: norms, activations, sums, Python.

    python -m ddst.benchmarks operator-share
    python -m ddst.benchmarks operator-share --batch 64 --threads 2 --top 20

The median over some iterations, each recorded by torch.profiler, which lengthens what lies between operators a little.
Printed below: the operators outside that take the most time of their own.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ddst.benchmarks import registry, report
from ddst.benchmarks.gan_iteration import D_STEPS, players_of, wrong_gradients
from ddst.benchmarks.runner import Row, Settings
from ddst.measure import Spread
from ddst.peak_memory import quiet_profiler
from ddst.train.players import gan_iteration

OURS = "ddst::"


def recorded(iteration: Any) -> tuple[float, float, Counter[str]]:
    """Seconds of one iteration, those inside of ddst's operators, and of every other one its own."""
    with quiet_profiler(), profile(activities=[ProfilerActivity.CPU]) as found:
        started = time.perf_counter()
        iteration()
        took = time.perf_counter() - started
    inside, others = 0.0, Counter[str]()
    for event in found.events():
        parents, parent = [], event.cpu_parent
        while parent is not None:
            parents.append(parent.name)
            parent = parent.cpu_parent
        if any(name.startswith(OURS) for name in parents):
            continue
        if event.name.startswith(OURS):
            inside += event.cpu_time_total / 1e6
        else:
            others[event.name] += event.self_cpu_time_total / 1e6
    return took, inside, others


def measure(case: registry.Case, settings: Settings) -> Row:
    """``share`` (outside), its spread, and the operators outside with their shares of the iteration."""
    torch.set_num_threads(settings.threads)
    players = players_of(case, "static", fused=True)
    row: Row = {"layer": case.layer, "batch": case.batch, "density": case.density, "threads": settings.threads}
    row["wrong"] = wrong_gradients(players)
    if row["wrong"]:
        return row
    size, latent = players.generator.resolution, players.generator.latent
    reals = [torch.rand(case.batch, 3, size, size) * 2 - 1 for _ in range(D_STEPS)]
    reals = [real.to(memory_format=torch.channels_last) for real in reals]

    def iteration() -> None:
        gan_iteration(players, reals, lambda: torch.randn(case.batch, latent))

    for _ in range(2):
        iteration()
    found = [recorded(iteration) for _ in range(settings.repeats)]
    shares = Spread.of([1 - inside / took for took, inside, _ in found])
    total = sum((others for *_, others in found), Counter[str]())
    whole = sum(took for took, *_ in found)
    row["outside"] = {name: seconds / whole for name, seconds in total.most_common(40)}
    return {**row, "share": shares.median, "low": shares.low, "high": shares.high}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from ddst.benchmarks.__main__ import block_of, density_of, positive

    command = argparse.ArgumentParser(
        prog="python -m ddst.benchmarks operator-share",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--layer", choices=tuple(registry.GANS), default="sngan32", help="the GAN (default: sngan32)")
    add("--batch", type=positive, default=16, help="default: 16")
    add("--density", type=density_of, default=0.1, help="default: 0.1")
    add("--block", type=block_of, default=(16, 16), help="default: 16x16")
    add("--threads", type=positive, default=1)
    add("--repeats", type=positive, default=5, help="iterations (default: 5)")
    add("--top", type=positive, default=10, help="operators to print (default: 10)")
    add("--json", type=Path, metavar="FILE", help="also keep the run in this file")
    return command


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 1 if a gradient was wrong."""
    arguments = parser().parse_args(argv)
    settings = Settings(arguments.threads, arguments.repeats)
    report.keep_freed_memory()
    case = registry.Case("gan", arguments.layer, arguments.batch, arguments.density, arguments.block)
    row = measure(case, settings)
    if row["wrong"]:
        print(f"{case}: WRONG, not timed: {', '.join(row['wrong'])}")
    else:
        print(f"{case}: {100 * row['share']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}] outside of {OURS}")
        for name, share in list(row["outside"].items())[: arguments.top]:
            print(f"  {100 * share:5.1f} % {name}")
    if arguments.json:
        report.save(arguments.json, {**report.facts(settings), "kind": "operator-share"}, [row])
    return 1 if row["wrong"] else 0
