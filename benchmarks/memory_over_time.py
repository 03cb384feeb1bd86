"""Whether the memory of a training run stays flat: a GAN iteration, over and over.

    python -m ddst.benchmarks memory-over-time
    python -m ddst.benchmarks memory-over-time --layer sngan48 --steps 500 --every 50 --from-step 100

Prints the resident memory of the process and what the allocator has given out, and says whether the last quarter of
both is on average within 1 % of the first, from a step on. Exit code 0: flat; 1: not; 2: a wrong option.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ddst.benchmarks import registry
from ddst.benchmarks.gan_iteration import D_STEPS, players_of
from ddst.freed_memory import given_out

FLAT = 0.01


@dataclass(frozen=True)
class Memory:
    """Bytes at a step: resident, and given out by the allocator (None without glibc 2.33 or later)."""

    step: int
    resident: int
    allocated: int | None

    def __str__(self) -> str:
        given = "" if self.allocated is None else f"{self.allocated / 2**20:10.2f} MiB allocated"
        return f"step {self.step:>6}: {self.resident / 2**20:10.2f} MiB resident {given}"


def memory_now(step: int) -> Memory:
    """What the process holds now.

    >>> memory_now(3).resident > 2**20
    True
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Memory(step, pages * os.sysconf("SC_PAGE_SIZE"), allocated_bytes())


def allocated_bytes() -> int | None:
    """Bytes that malloc has given out and not got back, in all arenas and mapped blocks."""
    found = given_out()
    return None if found is None else sum(found)


def growth(samples: list[Memory], from_step: int) -> dict[str, float]:
    """What was measured -> ``mean of the last quarter / mean of the first quarter − 1`` of the samples from a step on.

    Means, as resident memory wavers by a percent or two with what the allocator happens to give back.

    >>> growth([Memory(1, 50, 9), Memory(2, 100, 8), Memory(3, 103, 8)], from_step=2)
    {'resident': 0.03, 'allocated': 0.0}
    """
    late = [sample for sample in samples if sample.step >= from_step]
    quarter = max(1, len(late) // 4)
    series = {"resident": [s.resident for s in late], "allocated": [s.allocated for s in late if s.allocated]}
    return {
        name: round(sum(values[-quarter:]) / sum(values[:quarter]) - 1, 6) for name, values in series.items() if values
    }


def watch(case: registry.Case, steps: int, every: int) -> Iterator[Memory]:
    """The memory at every so many iterations of a case's networks, of fixed masks, on the same random images."""
    from ddst.train.players import gan_iteration

    players = players_of(case, "static", fused=True)
    size, latent = players.generator.resolution, players.generator.latent
    reals = [torch.rand(case.batch, 3, size, size) * 2 - 1 for _ in range(D_STEPS)]
    for step in range(1, steps + 1):
        gan_iteration(players, reals, lambda: torch.randn(case.batch, latent))
        if step % every == 0:
            yield memory_now(step)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from ddst.benchmarks.__main__ import block_of, density_of, positive

    command = argparse.ArgumentParser(
        prog="python -m ddst.benchmarks memory-over-time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--layer", choices=tuple(registry.GANS), default="sngan32", help="the GAN (default: sngan32)")
    add("--steps", type=positive, default=2000, help="iterations (default: 2000)")
    add("--every", type=positive, default=100, help="iterations between two measurements (default: 100)")
    add("--from-step", type=positive, default=200, metavar="STEP", help="judged from here on (default: 200)")
    add("--batch", type=positive, default=2, help="default: 2")
    add("--density", type=density_of, default=0.1, help="default: 0.1")
    add("--block", type=block_of, default=(16, 16), help="default: 16x16")
    add("--threads", type=positive, default=1)
    return command


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 1 if memory is not flat."""
    command = parser()
    arguments = command.parse_args(argv)
    judged = arguments.steps // arguments.every - (arguments.from_step - 1) // arguments.every
    if judged < 2:
        command.error(
            f"--steps {arguments.steps} with --every {arguments.every} leaves fewer than two measurements from "
            f"--from-step {arguments.from_step} on"
        )
    torch.set_num_threads(arguments.threads)
    case = registry.Case("gan", arguments.layer, arguments.batch, arguments.density, arguments.block)
    print(f"{case}, {arguments.threads} thread(s), torch {torch.__version__}")
    samples = []
    for sample in watch(case, arguments.steps, arguments.every):
        samples.append(sample)
        print(sample, flush=True)
    found = growth(samples, arguments.from_step)
    flat = all(abs(value) <= FLAT for value in found.values())
    spans = ", ".join(f"{name} {100 * value:.2f} %" for name, value in found.items())
    print(f"{'flat' if flat else 'NOT flat'} to {100 * FLAT:g} % from step {arguments.from_step} on: {spans}")
    return 0 if flat else 1
