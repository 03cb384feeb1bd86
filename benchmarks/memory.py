"""Memory beside time: the peak of what a GAN iteration holds, dense and sparse, eager, compiled and checkpointed.

    python -m ddst.benchmarks --memory
    python -m ddst.benchmarks --memory --batch 64 --threads 2 --rows sparse dense-budget-0.5 --json FILE
    python -m ddst.benchmarks table FILE ... --readme README.md

The peak counts weights, gradients, Adam's state, the generator's average, saved tensors and workspaces: on the CPU by
the allocator's own events, on CUDA (not run yet) by its statistics. Each row is checked against the plain networks and
timed in turn with the dense eager one in this process. Rows that compile need a C++ compiler and minutes; they compile
whole (fullgraph=True). Exit code 1: a row was wrong.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

import ddst
from ddst.benchmarks import memory_table, registry, report
from ddst.benchmarks.gan_iteration import D_STEPS, players_of, wrong_gradients
from ddst.benchmarks.runner import Row, Settings
from ddst.measure import CLOCKS, Clock, Spread, clock_of, seconds
from ddst.peak_memory import PeakMemory, peak_memory
from ddst.train.checkpointing import checkpoint_blocks
from ddst.train.players import Players, discriminator_backward, gan_iteration, generator_backward

#: Of a gradient's largest entry. Spectral norm that is computed a second time, as compiled networks do under a small
#: budget, starts from vectors of an iteration more.
TOLERANCE = 5e-3
#: Entries below this share of a network's largest one are noise: biases in front of a batch norm have no gradient.
NOISE = 1e-3


@dataclass(frozen=True)
class Variant:
    """How the networks of a row run.

    Attributes:
        method: "dense" or "static". change: what is done to the players, in place.
        budget: compiled under this `torch._functorch.config.activation_memory_budget`; None: eager.
    """

    method: str
    change: Callable[[Players], object] | None = None
    budget: float | None = None


def checkpointed(players: Players) -> None:
    """Both networks with their residual blocks checkpointed."""
    assert checkpoint_blocks(players.generator) and checkpoint_blocks(players.discriminator)


def fused(players: Players) -> None:
    """Both networks with fused half blocks, as ``ddst train`` runs them."""
    for network in (players.generator, players.discriminator):
        ddst.fuse(network)


def settle(discriminator: nn.Module) -> None:
    """Moves the vectors of spectral norms until they stay: fresh ones give other weights at every iteration of theirs.

    What compiled networks compute anew in the backward pass under a small budget has one iteration more.
    """
    norms = [m for m in discriminator.modules() if hasattr(m, "weight")]
    with torch.no_grad():
        for _ in range(500):
            for module in norms:
                _ = module.weight


#: Row -> how its networks run.
ROWS = {
    "dense": Variant("dense"),
    "dense-compiled": Variant("dense", budget=1.0),
    "dense-budget-0.5": Variant("dense", budget=0.5),
    "dense-budget-0.3": Variant("dense", budget=0.3),
    "dense-checkpointed": Variant("dense", checkpointed),
    "sparse-fused": Variant("static", fused),
    "sparse": Variant("static"),
    "sparse-checkpointed": Variant("static", checkpointed),
    "sparse-compiled": Variant("static", budget=1.0),
    "sparse-budget-0.5": Variant("static", budget=0.5),
}
COMPILER = "inductor"
#: Those that need no compiler.
EAGER = tuple(name for name, variant in ROWS.items() if variant.budget is None)


class Runner:
    """The networks of a row, and one iteration of them on images that are always the same."""

    def __init__(self, case: registry.Case, variant: Variant) -> None:
        self.case, self.variant = case, variant
        self.players = players_of(case, variant.method)
        if variant.change is not None:
            variant.change(self.players)
        if variant.budget is not None:
            for network in (self.players.generator, self.players.discriminator):
                network.compile(fullgraph=True, dynamic=False, backend=COMPILER)
        self.average = ddst.EMA(self.players.generator)
        size, self.latent = self.players.generator.resolution, self.players.generator.latent
        drawn = torch.Generator().manual_seed(1)
        reals = (torch.rand(case.batch, 3, size, size, generator=drawn) * 2 - 1 for _ in range(D_STEPS))
        self.reals = [real.to(case.device, memory_format=torch.channels_last) for real in reals]
        self.noise = torch.randn(case.batch, self.latent, generator=drawn).to(case.device)
        settle(self.players.discriminator)

    def in_float64(self) -> Self:
        """The same networks and images in float64, for a comparison; not to be stepped."""
        self.players.generator.double()
        self.players.discriminator.double()
        self.reals, self.noise = [real.double() for real in self.reals], self.noise.double()
        return self

    def iteration(self) -> None:
        """D's steps, G's step, the average."""
        with self._budget():
            gan_iteration(self.players, self.reals, lambda: torch.randn_like(self.noise))
        self.average.update()

    def peak(self) -> PeakMemory:
        """What an iteration holds."""
        players = self.players
        networks = [players.generator, players.discriminator, self.average.module]
        return peak_memory(self.iteration, networks, [players.optimizer_g, players.optimizer_d], self.case.device)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of a step of D and of one of G, without stepping, and what both leave in the buffers."""
        players = self.players
        found: dict[str, Tensor] = {}
        with self._budget():
            for optimizer in (players.optimizer_d, players.optimizer_g):
                optimizer.zero_grad(set_to_none=True)
            discriminator_backward(players, self.reals[0], self.noise)
            found |= _gradients("D", players.discriminator)
            generator_backward(players, self.noise)
        found |= _gradients("G", players.generator)
        for name, network in (("D", players.discriminator), ("G", players.generator)):
            found |= {f"{name}.{_plain(key)}": buffer.clone() for key, buffer in network.named_buffers()}
        return found

    def _budget(self) -> AbstractContextManager[object]:
        if self.variant.budget is None:
            return nullcontext()
        return torch._functorch.config.patch(activation_memory_budget=self.variant.budget)


def _gradients(which: str, network: nn.Module) -> dict[str, Tensor]:
    pairs = network.named_parameters()
    return {f"{which}.{_plain(name)}": copy.deepcopy(p.grad) for name, p in pairs if p.grad is not None}


def _plain(name: str) -> str:
    """A parameter's name without the modules that a row has put around others."""
    return name.replace(".block.", ".")


def wrong(case: registry.Case, runner: Runner) -> list[str]:
    """Gradients and buffers of a row that differ from those of the plain networks of its method, in float64.

    A ReLU's zero that float32 moves changes single gradients by more than the tolerance.
    """
    plain = Variant(runner.variant.method)
    if runner.variant == plain:
        return [] if plain.method == "dense" else wrong_gradients(runner.players)
    ours, theirs = (Runner(case, variant).in_float64().gradients() for variant in (runner.variant, plain))
    # Compiled for these numbers, not for those that are measured.
    torch._dynamo.reset()
    if ours.keys() != theirs.keys():
        return [f"gradients and buffers of other names: {sorted(ours.keys() ^ theirs.keys())}"]
    return [name for name, expected in theirs.items() if not _close(ours[name], expected, _largest(theirs, name))]


def _largest(gradients: dict[str, Tensor], name: str) -> float:
    """The largest entry in the gradients and buffers of the network that a name belongs to."""
    return max(float(g.abs().max()) for other, g in gradients.items() if other[0] == name[0])


def _close(ours: Tensor, expected: Tensor, largest: float) -> bool:
    if not expected.is_floating_point():
        return torch.equal(ours, expected)
    return float((ours - expected).abs().max()) <= TOLERANCE * max(float(expected.abs().max()), NOISE * largest)


def measure(case: registry.Case, names: Sequence[str], settings: Settings) -> list[Row]:
    """The rows of a case, the dense eager one first, each printed once it is measured."""
    torch.set_num_threads(settings.threads)
    clock = CLOCKS[settings.clock] if case.device == "cpu" else clock_of(case.device)
    dense = Runner(case, ROWS["dense"])
    opponent = dense.peak()
    rows = []
    for name in dict.fromkeys(["dense", *names]):
        row: Row = {**asdict(case), "row": name, "threads": settings.threads, "wrong": []}
        runner = dense if name == "dense" else Runner(case, ROWS[name])
        row["wrong"] = wrong(case, runner)
        if not row["wrong"]:
            peak = opponent if name == "dense" else runner.peak()
            row |= {"state": peak.state, "peak": peak.peak, "memory": peak.peak / opponent.peak}
            row |= _times(dense, runner, settings.repeats, clock)
        # What one row has compiled would else serve the next one, whose budget is another.
        torch._dynamo.reset()
        rows.append(row)
        print(memory_table.text_of(row), flush=True)
    return rows


def _times(dense: Runner, runner: Runner, repeats: int, clock: Clock) -> Row:
    """Seconds of an iteration, and the spread of the ratio to the dense eager one's, taken in turn."""
    if runner is dense:
        median = Spread.of([seconds(dense.iteration, 1, clock) for _ in range(repeats)]).median
        return {"seconds": median, "time": asdict(Spread(1.0, 1.0, 1.0))}
    theirs, ours = [], []
    for _ in range(repeats):
        theirs.append(seconds(dense.iteration, 1, clock))
        ours.append(seconds(runner.iteration, 1, clock))
    return {"seconds": Spread.of(ours).median, "time": asdict(Spread.of_ratios(ours, theirs))}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from ddst.benchmarks.__main__ import block_of, density_of, positive

    command = argparse.ArgumentParser(
        prog="python -m ddst.benchmarks --memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--layer", choices=tuple(registry.GANS), default="sngan32", help="the GAN (default: sngan32)")
    add("--rows", nargs="+", choices=(*ROWS, "all"), default=list(EAGER), help="default: those that do not compile")
    add("--density", type=density_of, default=0.1, help="default: 0.1")
    add("--block", type=block_of, default=(16, 16), help="default: 16x16")
    add("--batch", type=positive, default=16, help="default: 16")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=positive, default=1)
    add("--repeats", type=positive, default=3, help="pairs of iterations (default: 3)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine, with one thread")
    add("--json", type=Path, metavar="FILE", help="also keep the run in this file")
    return command


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 1 if a row was wrong."""
    arguments = parser().parse_args(argv)
    settings = Settings(arguments.threads, arguments.repeats, arguments.clock)
    case = registry.Case(
        "gan", arguments.layer, arguments.batch, arguments.density, arguments.block, device=arguments.device
    )
    known = {**report.facts(settings, case.device), "kind": "memory", "allocator": report.keep_freed_memory()}
    print(f"{case}, {settings.threads} thread(s), torch {torch.__version__}, {known['machine']['cpu']}")
    print(memory_table.HEAD)
    rows = measure(case, list(ROWS) if "all" in arguments.rows else arguments.rows, settings)
    print("\n".join(memory_table.opponents(rows)))
    if arguments.json:
        report.save(arguments.json, known, rows)
    return 1 if any(row["wrong"] for row in rows) else 0
