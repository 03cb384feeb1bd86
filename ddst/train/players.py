"""Generator, discriminator and their optimizers, and the two halves of one GAN iteration."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from ddst.convert import fuse, sparsify
from ddst.distributed import average_gradients
from ddst.models import Discriminator, Generator
from ddst.train.config import TrainConfig
from ddst.train.options import ConfigError, flag


@dataclass
class Players:
    """The two networks and what trains them."""

    generator: Generator
    discriminator: Discriminator
    optimizer_g: Adam
    optimizer_d: Adam


def build_networks(config: TrainConfig, channels: int) -> tuple[Generator, Discriminator]:
    """Dense networks of a config laid out channels_last, from its seed (torch's default generator is set to it)."""
    torch.manual_seed(config.seed)
    generator = Generator(config.resolution, config.width_g, channels, config.latent)
    discriminator = Discriminator(config.resolution, config.width_d, channels)
    for net in (generator, discriminator):
        for parameter in net.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if config.batch_norm == "synced":
        generator = nn.SyncBatchNorm.convert_sync_batchnorm(generator)
    return generator.train(), discriminator.train()


def check_memory(config: TrainConfig, channels: int) -> None:
    """Raises MemoryError if this machine could never hold the networks as they are built, dense."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # No layer has more weights than 36 of these squares (a 6x6 map, a 3x3 kernel), and there are no 128 layers: to
    # build networks on the meta device takes half a second, which those of usual sizes are spared.
    if 128 * 36 * 8 * max(config.latent, config.width_g, config.width_d, channels) ** 2 < there:
        return
    with torch.device("meta"):
        networks = build_networks(config, channels)
    needed = sum(p.numel() * p.element_size() for net in networks for p in net.parameters())
    if needed > there:
        raise MemoryError(f"built dense they need {needed / 1e9:.1f} GB, this machine has {there / 1e9:.1f} GB")


def make_sparse(config: TrainConfig, generator: Generator, discriminator: Discriminator) -> None:
    """Swap the layers of both networks for block-sparse ones, as the config says; nothing for the method "dense".

    Raises:
        ConfigError: a density that these networks and blocks cannot have.
    """
    if config.method == "dense":
        return
    images = (2, discriminator.channels, config.resolution, config.resolution)
    for name, net, density, size in (
        ("density", generator, config.density, (2, config.latent)),
        ("density_d", discriminator, config.density_d, images),
    ):
        # ERK at density 1 swaps nothing; layers whose density may change are swapped full of blocks.
        starts_full = density == 1 and net is discriminator and config.method.startswith("ddst")
        distribution = "uniform" if starts_full else config.distribution
        net.eval()  # torch's SyncBatchNorm trains on devices only
        try:
            sparsify(
                net,
                density,
                block=config.block,
                distribution=distribution,
                backend=config.backend,
                spectral_norm_noise=config.sn_noise,
                sample=torch.zeros(size) if distribution == "work" else None,
            )
        except ValueError as error:
            raise ConfigError(f"{flag(name)} {density}: {' '.join(str(error).split())}") from error
        net.train()


def fuse_networks(config: TrainConfig, generator: Generator, discriminator: Discriminator) -> None:
    """What the config says of fusing (:func:`ddst.fuse`); dense networks have nothing that could be."""
    if config.fuse and config.method != "dense":
        fuse(generator)
        fuse(discriminator)


def with_optimizers(config: TrainConfig, generator: Generator, discriminator: Discriminator) -> Players:
    """The networks with an Adam each. Call it after `make_sparse`, which replaces parameters.

    On the CPU Adam is torch's fused one: a single pass over parameter, gradient and moments, a third to a quarter of
    the time, and no temporaries. It counts on gradients that have the strides of their parameters, as `backward` makes
    them. Elsewhere torch chooses. The last bits differ between the two.
    """

    def adam(net: nn.Module, lr: float) -> Adam:
        on_cpu = all(parameter.device.type == "cpu" for parameter in net.parameters())
        return Adam(net.parameters(), lr=lr, betas=config.betas, fused=True if on_cpu else None)

    return Players(generator, discriminator, adam(generator, config.lr), adam(discriminator, config.lr_d))


def discriminator_backward(players: Players, real: Tensor, noise: Tensor) -> Tensor:
    """loss_D = E[max(0, 1 − D(x))] + E[max(0, 1 + D(G(z)))], its gradient in D's parameters; returns the loss.

    Real and generated images pass D as one batch (it has no batch norm, so the scores are the same). With several
    processes the gradient is the mean over them, the loss that of this one's share of the batch.
    """
    with torch.no_grad():
        fake = players.generator(noise)
    scores = players.discriminator(torch.cat([real, fake]))
    loss = F.relu(1.0 - scores[: len(real)]).mean() + F.relu(1.0 + scores[len(real) :]).mean()
    players.optimizer_d.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(players.discriminator.parameters())
    return loss.detach()


def generator_backward(players: Players, noise: Tensor) -> tuple[Tensor, Tensor]:
    """loss_G = −E[D(G(z))], its gradient in G's parameters; returns the loss and the scores D(G(z))."""
    # D only passes the gradient on: its own weights need none here, which saves a third of the work in D.
    players.discriminator.requires_grad_(False)
    try:
        scores = players.discriminator(players.generator(noise))
        loss = -scores.mean()
        players.optimizer_g.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(players.generator.parameters())
    finally:
        players.discriminator.requires_grad_(True)
    return loss.detach(), scores.detach()


def gan_iteration(
    players: Players, reals: Iterable[Tensor], draw_noise: Callable[[], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One D step per batch of `reals`, then one G step.

    Returns:
        Mean loss of D over its steps, loss of G, the noise of G's step and the scores of its images before the step.
    """
    losses = []
    for real in reals:
        losses.append(discriminator_backward(players, real, draw_noise()))
        players.optimizer_d.step()
    noise = draw_noise()
    loss_g, scores = generator_backward(players, noise)
    players.optimizer_g.step()
    return torch.stack(losses).mean(), loss_g, noise, scores
