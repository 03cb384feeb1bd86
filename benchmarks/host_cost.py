"""What sparse layers cost where there is next to nothing to compute: calls, checks and autograd, on the CPU.

    python -m ddst.benchmarks host-cost
    python -m ddst.benchmarks host-cost --repeats 60 --profile 30

An iteration of SNGAN at 32 pixels with 16 channels and one image, as ``ddst train`` runs it (fused), over that of the
dense networks, at 30 % density in blocks of 16x16: median of ratios of processor time, in turn, on one thread. Below,
for layers of one block and one pixel, the microseconds of a forward and backward pass, sparse and dense. ``--profile``:
the functions in which the sparse iteration spends the most time.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddst.benchmarks import report
from ddst.benchmarks.gan_iteration import D_STEPS
from ddst.benchmarks.runner import Settings
from ddst.measure import CLOCKS, Spread, interleaved
from ddst.nn import SparseConv2d, SparseLinear
from ddst.train.players import Players, gan_iteration

SMALL = {"resolution": 32, "width_g": 16, "width_d": 16, "batch": 1, "density": 0.3, "density_d": 0.3}
CALLS = 200  # of a layer, between two looks at the clock


def players_of(method: str) -> Players:
    """The small networks and their optimizers."""
    from ddst.train.config import resolve
    from ddst.train.players import build_networks, fuse_networks, make_sparse, with_optimizers

    config = resolve({"out": "unused", "method": method, **SMALL})
    torch.manual_seed(0)
    generator, discriminator = build_networks(config, 3)
    make_sparse(config, generator, discriminator)
    fuse_networks(config, generator, discriminator)
    return with_optimizers(config, generator, discriminator)


def iteration_of(method: str) -> Callable[[], object]:
    """An iteration on one image."""
    players = players_of(method)
    size, latent = players.generator.resolution, players.generator.latent
    reals = [(torch.rand(1, 3, size, size) * 2 - 1).to(memory_format=torch.channels_last) for _ in range(D_STEPS)]
    return lambda: gan_iteration(players, reals, lambda: torch.randn(1, latent))


def layers() -> dict[str, tuple[nn.Module, nn.Module, torch.Tensor]]:
    """Name -> (sparse, dense, input)."""
    image = torch.randn(1, 16, 1, 1).to(memory_format=torch.channels_last)
    dense = nn.Conv2d(16, 16, 3, padding=1).to(memory_format=torch.channels_last)
    return {
        "conv2d 3x3": (SparseConv2d(16, 16, 3, padding=1, density=1.0), dense, image),
        "linear": (SparseLinear(16, 16, density=1.0), nn.Linear(16, 16), torch.randn(1, 16)),
    }


def passes_of(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Many forward and backward passes."""
    x = x.detach().clone().requires_grad_()
    gradient = torch.ones_like(layer(x))

    def passes() -> None:
        for _ in range(CALLS):
            layer(x).backward(gradient)

    return passes


def measure(repeats: int) -> dict[str, Any]:
    """``iteration``: seconds and the spread of sparse / dense; ``layers``: microseconds of both, by name."""
    torch.set_num_threads(1)
    clock = CLOCKS["cpu"]
    ours, theirs = interleaved([iteration_of("static"), iteration_of("dense")], repeats, clock)
    row: dict[str, Any] = {
        "seconds": Spread.of(ours).median,
        "dense_seconds": Spread.of(theirs).median,
        "ratio": vars(Spread.of_ratios(ours, theirs)),
        "layers": {},
    }
    for name, (sparse, dense, x) in layers().items():
        own, other = interleaved([passes_of(sparse, x), passes_of(dense, x)], max(5, repeats // 2), clock)
        row["layers"][name] = [1e6 * Spread.of(times).median / CALLS for times in (own, other)]
    return row


def most_expensive(count: int, iterations: int = 20) -> str:
    """The functions in which the sparse iteration spends the most time of their own."""
    iteration = iteration_of("static")
    for _ in range(3):
        iteration()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(iterations):
        iteration()
    profile.disable()
    stats = pstats.Stats(profile)
    found: dict[Any, Any] = stats.stats  # type: ignore[attr-defined]
    lines = sorted(found.items(), key=lambda item: -item[1][2])[:count]
    return "\n".join(
        f"{1e6 * own / iterations:8.0f} us {calls // iterations:5} x  {Path(file).name}:{line} {name}"
        for (file, line, name), (_, calls, own, *_) in lines
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from ddst.benchmarks.__main__ import positive

    command = argparse.ArgumentParser(
        prog="python -m ddst.benchmarks host-cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--repeats", type=positive, default=40, help="iterations of each (default: 40)")
    command.add_argument("--profile", type=positive, metavar="N", help="print the N most expensive functions, too")
    command.add_argument("--json", type=Path, metavar="FILE", help="also keep the run in this file")
    return command


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    arguments = parser().parse_args(argv)
    row = measure(arguments.repeats)
    ratio = row["ratio"]
    print(
        f"SNGAN 32², 16 channels, 1 image: {1e3 * row['seconds']:.2f} ms an iteration, dense "
        f"{1e3 * row['dense_seconds']:.2f} ms, ratio {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    )
    for name, (own, dense) in row["layers"].items():
        print(f"{name}, forward and backward: {own:.0f} us, dense {dense:.0f} us")
    if arguments.profile:
        print(most_expensive(arguments.profile))
    if arguments.json:
        settings = Settings(1, arguments.repeats)
        report.save(arguments.json, {**report.facts(settings), "kind": "host-cost"}, [row])
    return 0
