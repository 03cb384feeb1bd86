"""What a distribution of the density is worth: Fréchet distances of digits at equal multiply-adds, in pairs.

    python -m ddst.benchmarks quality-of-distributions --json RUNS.jsonl --markdown docs/notes/distributions.md

Trains the same small GAN by every method, distribution and seed. All leave the share of multiply-adds, in G and in D,
that ERK leaves at --density; differences are those of runs with the same seed, their means with 95 % intervals (t).
With --json every finished run is kept, and a run that is kept is not made again.

Distributions:

    erk   d_l = min(1, ε (c_out + c_in + k_h + k_w) / n_l): the weights left in a layer follow the sum of its sizes
    work  d_l = min(1, ε (c_out + c_in + k_h + k_w) / f_l): its multiply-adds do
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import t
from torch import Tensor, nn

from ddst import sparsify
from ddst.benchmarks import report
from ddst.convert import SparsifyReport
from ddst.data import load_images
from ddst.train import Trainer, resolve, train
from ddst.train.config import TrainConfig
from ddst.train.report import summarize

DISTRIBUTIONS = ("erk", "work")
METHODS = ("static", "ddst-relaxed")
#: Small enough for a minute a run on one core; three resolutions in each network.
SETTINGS: dict[str, Any] = {
    "resolution": 16,
    "width_g": 128,
    "width_d": 64,
    "latent": 128,
    "batch": 32,
    "d_steps": 2,
    "lr": 5e-4,
    "ema": 0.98,
    "block": (16, 16),
    "interval_g": 25,
    "interval_d": 40,
    "br_every": 2,
    "br_window": 40,
    "compare_steps": 0,
    "fd_samples": 1797,
    "threads": 1,
    "sample_every": 10**6,
    "checkpoint_every": 10**6,
}


class Run(NamedTuple):
    """One training run: which one, and what it came to.

    Attributes:
        multiply_adds_g, multiply_adds_d: shares left at the start. density_g, density_d: of weights at the start.
        flops: operations of the whole run, relative to dense. distance: Fréchet's, smaller is better.
    """

    method: str
    distribution: str
    seed: int
    steps: int
    density: float
    multiply_adds_g: float
    multiply_adds_d: float
    density_g: float
    density_d: float
    flops: float
    distance: float
    seconds: float

    @property
    def key(self) -> tuple[Any, ...]:
        """Which run it is."""
        return self[:5]


def convert(
    net: nn.Module, sample: Tensor, density: float, distribution: str, block: tuple[int, int]
) -> SparsifyReport:
    """Makes a network sparse with the multiply-adds that ERK leaves at a density."""
    by_erk = sparsify(copy.deepcopy(net), density, block=block, sample=sample, generator=torch.Generator())
    left = by_erk.multiply_adds_left
    assert left is not None
    if distribution == "erk":
        return sparsify(net, density, block=block, sample=sample)
    return sparsify(net, left, block=block, sample=sample, distribution=distribution)


def make_sparse(
    config: TrainConfig, generator: nn.Module, discriminator: nn.Module, distribution: str
) -> list[SparsifyReport]:
    """Both networks of a run."""
    shapes = (2, config.latent), (2, 1, config.resolution, config.resolution)
    return [
        convert(net, torch.zeros(shape), config.density, distribution, config.block)
        for net, shape in zip((generator, discriminator), shapes, strict=True)
    ]


def settings_of(method: str, seed: int, steps: int, density: float) -> dict[str, Any]:
    """Of a run; the folder is still to be chosen."""
    return {**SETTINGS, "method": method, "seed": seed, "steps": steps, "density": density, "out": "unused"}


def train_once(method: str, distribution: str, seed: int, steps: int, density: float) -> Run:
    """Trains and judges one GAN."""
    reports: list[SparsifyReport] = []

    def sparse(*networks: Any) -> None:
        reports.extend(make_sparse(*networks, distribution))

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        settings = {**settings_of(method, seed, steps, density), "out": str(Path(scratch) / "run")}
        trainer = Trainer(resolve(settings), load_images("digits", settings["resolution"]), sparse)
        if train(trainer, None) is not None:
            raise KeyboardInterrupt
        summary = summarize(trainer)
    assert summary.quality is not None
    shares = [adopted.multiply_adds_left or 0.0 for adopted in reports]
    shares += [adopted.model_density for adopted in reports]
    seconds = time.perf_counter() - begun
    return Run(
        method, distribution, seed, steps, density, *shares, summary.flops_ratio, summary.quality.distance, seconds
    )


def all_runs(
    methods: Sequence[str], distributions: Sequence[str], seeds: int, steps: int, density: float, kept: Path | None
) -> Iterator[Run]:
    """Every run, seed by seed, so that what is there at any moment is in pairs; those that are kept are read."""
    known = {run.key: run for run in load(kept)} if kept is not None and kept.exists() else {}
    for seed, method in itertools.product(range(seeds), methods):
        for distribution in distributions:
            key = (method, distribution, seed, steps, density)
            if key not in known:
                known[key] = train_once(*key)
                if kept is not None:
                    with kept.open("a") as lines:
                        lines.write(json.dumps(known[key]._asdict()) + "\n")
            yield known[key]


def load(path: Path) -> list[Run]:
    """The runs of a file that ``--json`` wrote.

    Raises:
        ValueError: it holds something else.
    """
    runs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            runs.append(Run(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number} is no run of this program: {error}") from None
    return runs


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and its 95 % interval by Student's t: ``mean ± t_{n−1} · s / √n``, from at least two numbers.

    >>> [round(bound, 3) for bound in interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    mean, n = statistics.fmean(differences), len(differences)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half


def tables(runs: Iterable[Run]) -> str:
    """Markdown: what each distribution came to, and the paired differences to ERK."""
    runs = list(runs)
    lines = [
        "| method | distribution | multiply-adds G, D | weights G, D | operations of the run | Fréchet distance "
        "| minus ERK's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, distribution in dict.fromkeys((run.method, run.distribution) for run in runs):
        found = [run for run in runs if (run.method, run.distribution) == (method, distribution)]
        base = {run.seed: run.distance for run in runs if (run.method, run.distribution) == (method, "erk")}
        paired = [run.distance - base[run.seed] for run in found if run.seed in base and distribution != "erk"]
        difference = "{:+.2f} ({:+.2f} to {:+.2f})".format(*interval(paired)) if len(paired) > 1 else "-"
        cells = (
            f"{found[0].multiply_adds_g:.4f}, {found[0].multiply_adds_d:.4f}",
            f"{found[0].density_g:.4f}, {found[0].density_d:.4f}",
            f"{statistics.fmean(run.flops for run in found):.4f}",
            f"{statistics.fmean(run.distance for run in found):.2f}",
        )
        lines.append(f"| {method} | {distribution} | {' | '.join(cells)} | {difference} |")
    seeds = sorted({run.seed for run in runs})
    lines += [
        "",
        f"{runs[0].steps} steps, ERK's density {runs[0].density:g}, seeds {', '.join(map(str, seeds))}; settings in "
        "`benchmarks/quality_of_distributions.py`. Multiply-adds and weights are the shares left at the start, "
        "operations those of the whole run, all relative to dense. Differences of runs with equal seeds, mean and 95 % "
        f"interval; below 0 is better than ERK. torch {torch.__version__}, one thread, "
        f"{statistics.median(run.seconds for run in runs):.0f} s a run.",
    ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line of `quality-of-distributions`."""
    from ddst.benchmarks.__main__ import density_of, positive

    command = argparse.ArgumentParser(
        prog="python -m ddst.benchmarks quality-of-distributions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--method", nargs="+", choices=METHODS, default=METHODS)
    add("--distribution", nargs="+", choices=DISTRIBUTIONS, default=DISTRIBUTIONS)
    add("--seeds", type=positive, default=5, help="default: 5")
    add("--steps", type=positive, default=200, help="generator iterations of a run (default: 200)")
    add("--density", type=density_of, default=0.1, help="ERK's, which sets the multiply-adds of all (default: 0.1)")
    add("--json", type=Path, metavar="FILE", help="keep every run here, a JSON object a line, and make none twice")
    add(
        "--markdown",
        type=Path,
        metavar="FILE",
        help=f"put the table between {' and '.join(report.MARKERS)} of this file",
    )
    return command


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    command = parser()
    arguments = command.parse_args(argv)
    torch.set_num_threads(1)
    runs = []
    try:
        settings = (arguments.seeds, arguments.steps, arguments.density, arguments.json)
        for run in all_runs(arguments.method, arguments.distribution, *settings):
            runs.append(run)
            print(
                f"seed {run.seed} {run.method:<13} {run.distribution:<8} multiply-adds G {run.multiply_adds_g:.4f} "
                f"D {run.multiply_adds_d:.4f}, distance {run.distance:.2f}, {run.seconds:.0f} s",
                flush=True,
            )
        if arguments.markdown:
            report.insert(arguments.markdown, tables(runs))
    except (OSError, ValueError) as error:
        command.error(str(error))
    print(tables(runs))
    return 0
