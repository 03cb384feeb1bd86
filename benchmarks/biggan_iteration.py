"""An iteration of a BigGAN-like GAN at 64 pixels, sparse at a share of the multiply-adds, beside dense in one process.

    python -m ddst.benchmarks biggan-iteration
    python -m ddst.benchmarks biggan-iteration --width 16 --batch 4 --density 0.2

The networks of `ddst.models.biggan` with the published multiples for 64 pixels of --width (published 64), conditional
batch norm, attention at 32 pixels, spectral norm in both; one D step and one G step with Adam. The density is one of
multiply-adds (``distribution="work"``), those of layers that stay dense included.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import ddst
from ddst.benchmarks import report
from ddst.benchmarks.gan_iteration import TOLERANCE
from ddst.benchmarks.network_work import forward_macs
from ddst.benchmarks.runner import Row, Settings
from ddst.measure import CLOCKS, Spread, interleaved
from ddst.models import biggan
from ddst.nn import set_backend, sparse_layers

RESOLUTION, CLASSES = 64, 10
UP, DOWN = (16, 16, 8, 4, 2), (1, 2, 4, 8, 16)


class Pair:
    """Both networks with their optimizers, dense or sparse, from the same seed."""

    def __init__(self, width: int, batch: int, density: float | None, block: tuple[int, int]) -> None:
        torch.manual_seed(0)
        attention = RESOLUTION // 2
        self.generator = biggan.Generator(multipliers=UP, width=width, classes=CLASSES, attention=attention)
        self.discriminator = biggan.Discriminator(
            multipliers=DOWN, width=width, classes=CLASSES, resolution=RESOLUTION, attention=attention
        )
        self.z, self.y = torch.randn(batch, self.generator.latent), torch.randint(CLASSES, (batch,))
        real = torch.rand(batch, 3, RESOLUTION, RESOLUTION) * 2 - 1
        self.real = real.to(memory_format=torch.channels_last)
        self.inputs = ((self.z, self.y), (self.real, self.y))
        for network, inputs in zip((self.generator, self.discriminator), self.inputs, strict=True):
            network.to(memory_format=torch.channels_last)
            if density is not None:
                ddst.sparsify(network, density, block=block, distribution="work", sample=inputs)
        self.adams = [
            torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.0, 0.999))
            for network in (self.generator, self.discriminator)
        ]

    def iteration(self) -> None:
        """A step of D, a step of G."""
        generator, discriminator, (adam_g, adam_d) = self.generator, self.discriminator, self.adams
        batch = len(self.y)
        with torch.no_grad():
            fake = generator(self.z, self.y)
        scores = discriminator(torch.cat([self.real, fake]), self.y.repeat(2))
        adam_d.zero_grad(set_to_none=True)
        (F.relu(1.0 - scores[:batch]).mean() + F.relu(1.0 + scores[batch:]).mean()).backward()
        adam_d.step()
        discriminator.requires_grad_(False)
        adam_g.zero_grad(set_to_none=True)
        (-discriminator(generator(self.z, self.y), self.y).mean()).backward()
        adam_g.step()
        discriminator.requires_grad_(True)

    def macs(self) -> int:
        """Multiply-adds of a forward pass of both networks."""
        networks = zip((self.generator, self.discriminator), self.inputs, strict=True)
        return sum(forward_macs(network, inputs) for network, inputs in networks)

    def wrong(self) -> list[str]:
        """Sparse layers whose gradient of D(G(z)) differs from that of the reference backend."""
        both = nn.ModuleList([self.generator, self.discriminator]).eval()
        layers = sparse_layers(both)
        z, y = self.z[:2], self.y[:2]
        gradients = []
        for backend in ("reference", "auto"):
            set_backend(both, backend)
            scores = self.discriminator(self.generator(z, y), y)
            gradients.append(torch.autograd.grad(scores.sum(), [layer.values for layer in layers.values()]))
        both.train()
        return [
            f"gradient of {name}"
            for name, expected, ours in zip(layers, *gradients, strict=True)
            if not (ours - expected).abs().max() <= TOLERANCE * expected.abs().max()
        ]


def measure(width: int, batch: int, density: float, block: tuple[int, int], settings: Settings) -> Row:
    """A row: ``macs_left``, seconds of both, the spread of dense / sparse."""
    torch.set_num_threads(settings.threads)
    sparse, dense = Pair(width, batch, density, block), Pair(width, batch, None, block)
    row: Row = {"layer": "biggan64", "batch": batch, "density": density, "block": list(block), "width": width}
    row |= {"threads": settings.threads, "wrong": sparse.wrong()}
    if row["wrong"]:
        return row
    row["macs_left"] = sparse.macs() / dense.macs()
    ours, theirs = interleaved([sparse.iteration, dense.iteration], settings.repeats, CLOCKS[settings.clock])
    row |= {"seconds": Spread.of(ours).median, "dense_seconds": Spread.of(theirs).median}
    return {**row, "speedup": asdict(Spread.of_ratios(theirs, ours))}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from ddst.benchmarks.__main__ import block_of, density_of, positive

    command = argparse.ArgumentParser(
        prog="python -m ddst.benchmarks biggan-iteration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--width", type=positive, default=32, help="default: 32")
    add("--batch", type=positive, default=8, help="default: 8")
    add("--density", type=density_of, default=0.1, help="of multiply-adds (default: 0.1)")
    add("--block", type=block_of, default=(16, 16), help="default: 16x16")
    add("--threads", type=positive, default=1)
    add("--repeats", type=positive, default=3, help="pairs of iterations (default: 3)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine, with one thread")
    add("--json", type=Path, metavar="FILE", help="also keep the run in this file")
    return command


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 1 if a gradient was wrong."""
    command = parser()
    arguments = command.parse_args(argv)
    settings = Settings(arguments.threads, arguments.repeats, arguments.clock)
    allocator = report.keep_freed_memory()
    try:
        row = measure(arguments.width, arguments.batch, arguments.density, arguments.block, settings)
    except ValueError as error:
        command.error(str(error))
    head = f"biggan64 width {row['width']} batch {row['batch']} {100 * row['density']:g} % of multiply-adds"
    if row["wrong"]:
        print(f"{head}: WRONG, not timed: {', '.join(row['wrong'])}")
    else:
        ratio = row["speedup"]
        print(
            f"{head}: {100 * row['macs_left']:.1f} % left, {row['seconds']:.3f} s, dense {row['dense_seconds']:.3f} s: "
            f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        )
    if arguments.json:
        report.save(arguments.json, {**report.facts(settings), "kind": "biggan", "allocator": allocator}, [row])
    return 1 if row["wrong"] else 0
