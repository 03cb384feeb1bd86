"""A whole GAN iteration (D steps and a G step, optimizers included), sparse beside dense in one process.

The networks are those of ``ddst train --preset …``, both densities the case's. Both sides run channels_last on the same
random images; iterations alternate, and the ratio is taken pair by pair.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from ddst.benchmarks.registry import GANS, Case
from ddst.measure import CLOCKS, Spread, clock_of, interleaved
from ddst.nn import set_backend, sparse_layers
from ddst.sparsity import TopologyUpdater

if TYPE_CHECKING:
    from ddst.benchmarks.runner import Settings
    from ddst.train.players import Players

D_STEPS = 5
DROPPED = 0.3  # share of G's blocks that an update exchanges
TOLERANCE = 1e-3  # of a gradient that went through both networks, in float32


def measure_gan(case: Case, settings: Settings) -> dict[str, Any]:
    """``wrong`` and ``step`` of a row: seconds of an iteration, and the spread of dense / sparse.

    ``step["update_iterations"]``: what a topology update of G by gradient (scores, drop, grow, index, optimizer state)
    adds to an iteration, in iterations.
    """
    from ddst.train.players import gan_iteration

    sparse, dense = players_of(case, "static", fused=True), players_of(case, "dense")
    wrong = wrong_gradients(sparse)
    if wrong:
        return {"wrong": wrong}
    size, latent = sparse.generator.resolution, sparse.generator.latent
    reals = [
        (torch.rand(case.batch, 3, size, size, device=case.device) * 2 - 1).to(memory_format=torch.channels_last)
        for _ in range(D_STEPS)
    ]

    def iteration(players: Players) -> object:
        return gan_iteration(players, reals, lambda: torch.randn(case.batch, latent, device=case.device))

    clock = CLOCKS[settings.clock] if case.device == "cpu" else clock_of(case.device)
    updater = TopologyUpdater(sparse.generator, sparse.optimizer_g)

    def iteration_with_update() -> None:
        updater.scores.request()
        iteration(sparse)
        updater.exchange(DROPPED)
        updater.scores.cancel()

    works = [lambda: iteration(sparse), lambda: iteration(dense), iteration_with_update]
    ours, theirs, updating = interleaved(works, settings.repeats, clock)
    baseline = {"seconds": Spread.of(theirs).median, "speedup": asdict(Spread.of_ratios(theirs, ours))}
    baseline["layout"] = "channels_last"
    extra = asdict(Spread.of_ratios([u - o for u, o in zip(updating, ours, strict=True)], ours))
    step = {"seconds": Spread.of(ours).median, "baselines": {"dense": baseline}, "update_iterations": extra}
    return {"wrong": [], "step": step}


def players_of(case: Case, method: str, *, fused: bool = False) -> Players:
    """Networks and optimizers of a method, from the same seed; fused as ``ddst train`` runs sparse ones."""
    from ddst.train.config import resolve
    from ddst.train.players import build_networks, fuse_networks, make_sparse, with_optimizers

    settings = {"out": "unused", "method": method, "density": case.density, "block": case.block, "batch": case.batch}
    config = resolve({**settings, **GANS[case.layer]})
    torch.manual_seed(0)
    generator, discriminator = build_networks(config, 3)
    if method != "dense":
        make_sparse(config, generator, discriminator)
    if fused:
        fuse_networks(config, generator, discriminator)
    return with_optimizers(config, generator.to(case.device), discriminator.to(case.device))


def wrong_gradients(players: Players) -> list[str]:
    """Names of sparse layers whose gradient of D(G(z)) differs from that of the reference backend; changes nothing."""
    model = copy.deepcopy(torch.nn.Sequential(players.generator, players.discriminator)).eval()
    noise = torch.randn(2, players.generator.latent, generator=torch.Generator().manual_seed(0))
    noise = noise.to(next(model.parameters()).device)
    layers = sparse_layers(model)
    gradients = []
    for backend in ("auto", "reference"):
        set_backend(model, backend)
        gradients.append(torch.autograd.grad(model(noise).sum(), [layer.values for layer in layers.values()]))
    return [
        f"gradient of {name}"
        for name, ours, expected in zip(layers, *gradients, strict=True)
        if not (ours - expected).abs().max() <= TOLERANCE * expected.abs().max()
    ]
