"""Generator, discriminator and their optimizers, and the two halves of one GAN iteration."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Adam

from ddst.convert import fuse, sparsify
from ddst.distributed import average_gradients
from ddst.gan.presets import PRESETS
from ddst.models.families import FAMILIES, Sizes
from ddst.train.config import TrainConfig
from ddst.train.game import Game, Inputs
from ddst.train.options import ConfigError, flag


@dataclass
class Players:
    """The two networks and what trains them."""

    generator: Any
    discriminator: Any
    optimizer_g: Adam
    optimizer_d: Adam
    game: Game = field(default_factory=Game)


def build_networks(config: TrainConfig, channels: int, classes: int = 1) -> tuple[Any, Any]:
    """Dense networks of a config laid out channels_last, from its seed (torch's default generator is set to it)."""
    torch.manual_seed(config.seed)
    family = FAMILIES[config.model]
    sizes = Sizes(config.resolution, config.width_g, config.width_d, config.latent, channels, classes)
    generator, discriminator = family.generator(sizes), family.discriminator(sizes)
    for net in (generator, discriminator):
        for parameter in net.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if config.batch_norm == "synced":
        generator = nn.SyncBatchNorm.convert_sync_batchnorm(generator)
    return generator.train(), discriminator.train()


def game_of(config: TrainConfig) -> Game:
    """What the settings play, at its start."""
    dtype = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.precision]
    scalers = (
        [GradScaler(config.device, init_scale=2.0**10) for _ in range(2)] if dtype is torch.float16 else [None] * 2
    )
    return Game(
        config.loss,
        config.gradient_penalty,
        config.r1,
        config.r2,
        config.consistency,
        () if config.augment == "none" else tuple(config.augment.split(",")),
        dtype,
        FAMILIES[config.model].joint,
        config.accumulate,
        config.lazy,
        0,
        torch.Generator().manual_seed(config.seed + 4),
        *scalers,
    )


def learning_rates(config: TrainConfig, step: int, densities: tuple[float, float] = (1.0, 1.0)) -> tuple[float, float]:
    """``lr · decay(step) / density^P`` of G and D, for the iteration after `step` of them: nothing to resume.

    P is `lr_density_power`. At density d an output sums d times as many inputs, and each moves it by Adam's step: by √d
    of what a dense output moves, beside its own size, which a norm behind it takes away. P = 1/2 gives a sparse network
    the dense one's pace.

    Source: Dey et al., *Sparse maximal update parameterization* (2024): rates ∝ 1/d where weights start ∝ 1/√d; here
        they start as the dense layer's.
    """
    left = 1.0
    if config.lr_decay != "none":
        done = (step - config.lr_decay_start) / max(config.steps - config.lr_decay_start, 1)
        done = min(max(done, 0.0), 1.0)
        left = 1 - done if config.lr_decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    pace_g, pace_d = (density**-config.lr_density_power if density else 1.0 for density in densities)
    return config.lr * left * pace_g, config.lr_d * left * pace_d


def check_memory(config: TrainConfig, channels: int, classes: int) -> None:
    """Raises MemoryError if this machine could never hold the networks as they are built, dense."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # No layer has more weights than 36 of these squares (a 6x6 map, a 3x3 kernel), and there are no 128 layers: to
    # build networks on the meta device takes half a second, which those of usual sizes are spared.
    if 128 * 36 * 8 * max(config.latent, config.width_g, config.width_d, channels, classes) ** 2 < there:
        return
    with torch.device("meta"):
        networks = build_networks(config, channels, classes)
    needed = sum(p.numel() * p.element_size() for net in networks for p in net.parameters())
    if needed > there:
        raise MemoryError(f"built dense they need {needed / 1e9:.1f} GB, this machine has {there / 1e9:.1f} GB")


def make_sparse(config: TrainConfig, generator: Any, discriminator: Any) -> None:
    """Swap the layers of both networks for block-sparse ones, as the config says; nothing for the method "dense".

    Those of SNGAN are of torch's kinds alone. Others are run on a sample, which shows what they do with weights.

    Raises:
        ConfigError: a density that these networks and blocks cannot have.
    """
    if config.method == "dense":
        return
    parts = PRESETS[config.method]
    labels = [torch.zeros(2, dtype=torch.int64)] if FAMILIES[config.model].conditional else []
    images = torch.zeros(2, discriminator.channels, config.resolution, config.resolution)
    for name, net, density, block, distribution, changes, sample in (
        ("density", generator, parts.density_g(config.density), config.block, config.distribution,
         parts.full_g, torch.zeros(2, config.latent)),
        ("density_d", discriminator, config.density_d, config.block_d, config.distribution_d,
         parts.steers_d, images),
    ):  # fmt: skip
        # ERK at density 1 swaps nothing; layers whose density may change are swapped full of blocks.
        distribution = "uniform" if density == 1 and changes else distribution
        looked_at = distribution == "work" or config.model != "sngan"
        net.eval()  # torch's SyncBatchNorm trains on devices only
        try:
            sparsify(
                net,
                density,
                block=block,
                distribution=distribution,
                backend=config.backend,
                spectral_norm_noise=config.sn_noise,
                sample=[sample, *labels] if looked_at else None,
            )
        except ValueError as error:
            raise ConfigError(f"{flag(name)} {density}: {' '.join(str(error).split())}") from error
        net.train()


def fuse_networks(config: TrainConfig, generator: Any, discriminator: Any) -> None:
    """What the config says of fusing (:func:`ddst.fuse`); dense networks have nothing that could be."""
    if config.fuse and config.method != "dense":
        fuse(generator)
        fuse(discriminator)


def with_optimizers(config: TrainConfig, generator: Any, discriminator: Any) -> Players:
    """The networks with an Adam each. Call it after `make_sparse`, which replaces parameters.

    On the CPU Adam is torch's fused one: a single pass over parameter, gradient and moments, a third to a quarter of
    the time, and no temporaries. It counts on gradients that have the strides of their parameters, as `backward` makes
    them. Elsewhere torch chooses. The last bits differ between the two.
    """

    def adam(net: nn.Module, lr: float) -> Adam:
        on_cpu = all(parameter.device.type == "cpu" for parameter in net.parameters())
        return Adam(net.parameters(), lr=lr, betas=config.betas, fused=True if on_cpu else None)

    optimizers = adam(generator, config.lr), adam(discriminator, config.lr_d)
    return Players(generator, discriminator, *optimizers, game_of(config))


def discriminator_backward(players: Players, real: Inputs, noise: Inputs) -> Tensor:
    """Adds the gradient of D's loss of one batch (`Game.loss_of_d`) to that of its parameters; returns the loss."""
    game = players.game
    with torch.no_grad():
        fake = game.images(players.generator, noise)
    loss = game.loss_of_d(players.discriminator, real, fake)
    game.backward(loss, game.scaler_d)
    return loss.detach()


def generator_backward(players: Players, noise: Inputs, real: Inputs | None = None) -> tuple[Tensor, Tensor]:
    """Adds the gradient of G's loss of one batch to that of its parameters; returns the loss and the scores D(G(z))."""
    game = players.game
    # D only passes the gradient on: its own weights need none here, which saves a third of the work in D.
    players.discriminator.requires_grad_(False)
    try:
        loss, scores = game.loss_of_g(players.generator, players.discriminator, noise, real)
        game.backward(loss, game.scaler_g)
    finally:
        players.discriminator.requires_grad_(True)
    return loss.detach(), scores.detach()


def gan_iteration(
    players: Players, reals: Iterable[Inputs], draw_noise: Callable[[], Inputs]
) -> tuple[Tensor, Tensor, Inputs, Tensor]:
    """D steps, one for every `accumulate` batches of `reals`, then one G step.

    With several processes gradients are the mean over them, losses those of this one's share of the batch.

    Returns:
        Mean loss of D and of G over their batches, the noise of G's last batch and the scores of its images before the
        step.
    """
    game, batches = players.game, list(reals)
    losses, losses_g = [], []
    for first in range(0, len(batches), game.accumulate):
        players.optimizer_d.zero_grad(set_to_none=True)
        for real in batches[first : first + game.accumulate]:
            losses.append(discriminator_backward(players, real, draw_noise()))
        average_gradients(players.discriminator.parameters())
        game.step(players.optimizer_d, game.scaler_d)
        game.steps_of_d += 1
    players.optimizer_g.zero_grad(set_to_none=True)
    for _ in range(game.accumulate):
        noise = draw_noise()
        loss, scores = generator_backward(players, noise, batches[-1])
        losses_g.append(loss)
    average_gradients(players.generator.parameters())
    game.step(players.optimizer_g, game.scaler_g)
    return torch.stack(losses).mean(), torch.stack(losses_g).mean(), noise, scores
