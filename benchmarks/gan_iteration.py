"""Times a whole GAN iteration (D steps and a G step, optimizers included), sparse beside dense in one process.

    python -m ddst.benchmarks.gan_iteration --density 0.1 --batch 16

The networks are those of ``ddst train --preset sngan32``: SNGAN 32×32 with 256 and 128 channels, 5 D steps. Both sides
run channels_last on the same random images; iterations alternate, and the ratio is taken pair by pair.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import ddst
from ddst.train.config import resolve
from ddst.train.players import Players, build_networks, gan_iteration, make_sparse, with_optimizers


def players_of(arguments: argparse.Namespace, method: str) -> Players:
    """Networks and optimizers of a method, from the same seed."""
    config = resolve(
        {
            "out": "unused",
            "preset": "sngan32",
            "method": method,
            "density": arguments.density,
            "block": (arguments.block, arguments.block),
            "batch": arguments.batch,
            "width_g": arguments.width_g,
            "width_d": arguments.width_d,
        }
    )
    torch.manual_seed(0)
    generator, discriminator = build_networks(config, 3)
    if method != "dense":
        make_sparse(config, generator, discriminator)
    return with_optimizers(config, generator, discriminator)


def measure(arguments: argparse.Namespace) -> dict[str, float | list[float]]:
    """Seconds per iteration of both sides (medians) and the quartiles of the pairwise ratio dense / sparse."""
    sides = players_of(arguments, "dense"), players_of(arguments, "static")
    reals = [
        (torch.rand(arguments.batch, 3, 32, 32) * 2 - 1).contiguous(memory_format=torch.channels_last)
        for _ in range(arguments.d_steps)
    ]

    def draw_noise() -> Tensor:
        return torch.randn(arguments.batch, 128)

    def timed(players: Players) -> float:
        started = time.perf_counter()
        gan_iteration(players, reals, draw_noise)
        return time.perf_counter() - started

    for players in sides:
        timed(players)
    pairs = [(timed(sides[0]), timed(sides[1])) for _ in range(arguments.repeats)]
    ratios = [dense / sparse for dense, sparse in pairs]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "dense_seconds": statistics.median(dense for dense, _ in pairs),
        "sparse_seconds": statistics.median(sparse for _, sparse in pairs),
        "speedup": statistics.median(ratios),
        "speedup_quartiles": [quartiles[0], quartiles[2]],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ddst.benchmarks.gan_iteration", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--density", type=float, default=0.1, help="of both networks (default: 0.1)")
    parser.add_argument("--block", type=int, default=16, help="side of the square blocks (default: 16)")
    parser.add_argument("--batch", type=int, default=16, help="images per batch (default: 16)")
    parser.add_argument("--width-g", type=int, default=256, help="channels of G (default: 256)")
    parser.add_argument("--width-d", type=int, default=128, help="channels of D (default: 128)")
    parser.add_argument("--d-steps", type=int, default=5, help="D steps per iteration (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--repeats", type=int, default=7, help="timed pairs (default: 7)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments)
    low, high = result["speedup_quartiles"]  # type: ignore[misc]
    print(
        f"SNGAN 32x32, {arguments.width_g}/{arguments.width_d} channels, batch {arguments.batch}, density "
        f"{arguments.density}, blocks {arguments.block}x{arguments.block}, {arguments.threads} thread(s)\n"
        f"dense {result['dense_seconds']:.3f} s, sparse {result['sparse_seconds']:.3f} s per iteration: "
        f"{result['speedup']:.2f}x faster (quartiles {low:.2f} to {high:.2f}, {arguments.repeats} pairs)"
    )
    if arguments.json:
        settings = {k: v for k, v in vars(arguments).items() if k != "json"}
        versions = {"ddst": ddst.__version__, "torch": torch.__version__, "python": platform.python_version()}
        record = {**settings, **result, **versions, "capability": torch.ops.ddst.cpu_capability()}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
