"""A whole GAN iteration, optimizers and spectral norms included, dense against sparse: eager, and as one CUDA graph.

Everything is channels_last under bf16 autocast, with ``cudnn.benchmark``. First the gradients of every sparse layer are
compared with those of dense arithmetic in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ddst.benchmarks.gan_iteration import wrong_gradients
from ddst.benchmarks.gpu.budget import Deadline
from ddst.benchmarks.gpu.journal import NOTHING, Progress
from ddst.benchmarks.gpu.networks import NETWORKS, Autocast, Network, flops_of, players_of
from ddst.benchmarks.gpu.results import in_a_line
from ddst.benchmarks.gpu.timing import Program, Work, cudnn_benchmark, forget, precision, watch_of
from ddst.measure import Spread
from ddst.train.players import Players, gan_iteration


@dataclass(frozen=True)
class Variant:
    """One network at one density; None is dense."""

    network: str
    density: float | None
    block: tuple[int, int] = (32, 32)
    distribution: str = "erk"

    def __str__(self) -> str:
        return f"{self.network} {'dense' if self.density is None else f'{100 * self.density:g} % {self.distribution}'}"


#: In the order of importance. The dense network comes before the sparse ones that are compared with it.
#: BigGAN's channels shrink where its images grow: there ERK's 10 % are 29 % of the operations, so it is uniform there.
VARIANTS = (
    *(
        Variant(network, density, distribution=distribution)
        for densities in ((None, 0.1), (0.3, 0.5))
        for network, distribution in (("sngan32", "erk"), ("biggan128", "uniform"))
        for density in densities
    ),
    Variant("biggan128", 0.1),
)


class Eager:
    """A program that is launched from the host each time."""

    def __init__(self, work: Work) -> None:
        self.outputs: list[Any] = []
        self.replay = work


def measure_all(
    variants: Sequence[Variant],
    device: str,
    deadline: Deadline,
    rounds: int = 10,
    networks: dict[str, Network] = NETWORKS,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = NOTHING,
) -> dict[str, Any]:
    """The part "iteration": ``rows``, the sparse ones with their speed-up over the dense row; ``trimmed``."""
    part: dict[str, Any] = {"rows": [], "trimmed": [], "wrong": []}
    dense: dict[str, dict[str, Any]] = {}
    proven = {variant: progress.earlier(str(variant)) for variant in variants}
    # What is measured is compared with a dense row of the same run.
    measured = {variant.network for variant, row in proven.items() if row is None}
    for variant in variants:
        held = proven[variant]
        if held is not None and (variant.density is not None or variant.network not in measured):
            part["rows"].append(held)
            continue
        if deadline.passed:
            part["trimmed"].append(str(variant))
            continue
        network = networks[variant.network]
        row: dict[str, Any] = {**asdict(variant), "what": network.what, "batch": network.batch, "wrong": []}
        try:
            with cudnn_benchmark(True):
                row |= _measure(variant, network, device, rounds, dtype)
        except Exception as error:
            row["wrong"] = [in_a_line(error)]
        forget(device)
        if variant.density is None:
            dense[variant.network] = row
        elif not row["wrong"] and not dense.get(variant.network, {"wrong": True})["wrong"]:
            row["speedup"] = {
                way: dense[variant.network][way]["median"] / row[way]["median"] for way in ("eager", "graph")
            }
        part["rows"].append(row)
        part["wrong"] += [f"{variant}: {why}" for why in row["wrong"]]
        progress.keep(str(variant), row, part, not row["wrong"])
    return part


def _measure(variant: Variant, network: Network, device: str, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    on_cuda = device == "cuda"
    players = players_of(network, variant.density, variant.block, device, on_cuda, variant.distribution)
    wrong = []
    if variant.density is not None:
        with precision("ieee"), cudnn_benchmark(False):
            wrong = wrong_gradients(players)
    if wrong:
        return {"wrong": wrong}
    flops, dense_flops = flops_of(players, network, device)
    players = replace(
        players,
        generator=Autocast(players.generator, device, dtype),
        discriminator=Autocast(players.discriminator, device, dtype),
    )
    size, losses = network.resolution, []
    reals = [
        (torch.rand(network.batch, 3, size, size, device=device) * 2 - 1).to(memory_format=torch.channels_last)
        for _ in range(network.d_steps)
    ]

    def iteration() -> None:
        # The losses are those of the latest call; in a graph they are memory that every replay writes again.
        losses[:] = gan_iteration(players, reals, lambda: torch.randn(network.batch, network.latent, device=device))[:2]

    watch, row = watch_of(device), {"flops_share": flops / dense_flops}
    for _ in range(3):
        iteration()
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    row["eager"] = asdict(Spread.of([watch.seconds(Eager(iteration)) for _ in range(rounds)]))
    if on_cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    for optimizer in (players.optimizer_g, players.optimizer_d):
        optimizer.zero_grad(set_to_none=True)  # the graph makes gradients of its own
    program = Program(watch, [iteration], target=0.0)
    row["graph"] = asdict(Spread.of([program.seconds() for _ in range(rounds)]))
    if not all(math.isfinite(float(loss)) for loss in losses):
        return {"wrong": [f"a loss is not finite: {[float(loss) for loss in losses]}"]}
    return {**row, "wrong": unfinite(players)}


def unfinite(players: Players) -> list[str]:
    """Parameters with entries that are not finite."""
    return [
        f"{player}'s parameter {name} is not finite"
        for player in ("generator", "discriminator")
        for name, parameter in getattr(players, player).named_parameters()
        if not bool(parameter.isfinite().all())
    ]
