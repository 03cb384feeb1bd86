"""Time and memory of a training iteration of the run's networks beside a dense twin, measured in this process."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ddst.gan import EMA
from ddst.measure import clock_of
from ddst.peak_memory import peak_memory
from ddst.train.checkpointing import checkpoint_blocks
from ddst.train.config import TrainConfig
from ddst.train.game import Inputs
from ddst.train.layer_time import LayerTime, layer_times
from ddst.train.loop import Trainer
from ddst.train.options import LARGEST
from ddst.train.players import build_networks, gan_iteration, with_optimizers
from ddst.train.scheduler import make_scheduler


class Iteration:
    """An iteration of two networks as a run makes it that neither measures nor decides nor moves a block.

    The scheduler is called like any other time: what it does at every step (the moments of dense gradients with
    `published`, the average) is a part of it.

    Args:
        config: of the run, for networks that `dense` says are dense whatever its method. generator, discriminator: the
            networks, which are trained.
    """

    def __init__(self, config: TrainConfig, generator: nn.Module, discriminator: nn.Module, dense: bool) -> None:
        never: dict[str, Any] = dict.fromkeys(("steps", "interval_g", "interval_d", "br_every", "br_window"), LARGEST)
        config = replace(config, **never, prune_at=LARGEST - 1)
        if dense:
            config = replace(config, method="dense", algorithm_d="static", published=False)
        self.players = with_optimizers(config, generator, discriminator)
        self.average = EMA(generator)
        self.scheduler, _ = make_scheduler(config, self.players, self.average)

    def __call__(self, reals: Sequence[Inputs], draw_noise: Callable[[], Inputs]) -> None:
        *_, noise, scores = gan_iteration(self.players, reals, draw_noise)
        real: Any = reals[-1]
        self.scheduler.step(real=real, noise=noise, fake_scores=scores)


@dataclass(frozen=True)
class Timing:
    """Medians of iterations timed in turn, and the most bytes that torch holds during one.

    Attributes:
        seconds: of the run's networks, with their present masks. dense: of the dense twin. pairs: iterations of each.
        peak_bytes: weights, gradients, Adam's state, the average, what the scheduler keeps (with `published` moments of
            dense gradients), saved tensors and workspaces at their peak.
        dense_peak_bytes, checkpointed_peak_bytes: of the dense twin, plain and with activation checkpointing of its
            residual blocks (None: networks without such a list).
    """

    seconds: float
    dense: float
    pairs: int
    peak_bytes: int
    dense_peak_bytes: int
    checkpointed_peak_bytes: int | None

    @property
    def speedup(self) -> float:
        return self.dense / self.seconds


def compare_with_dense(trainer: Trainer, pairs: int, limit: float = 60.0) -> Timing:
    """Time `pairs` iterations of copies of the run's networks and of dense ones, alternately; see `Iteration`.

    Then the peak of memory of each, in iterations of one D step: further ones need no more.

    Args:
        trainer: the run; nothing of it is changed, the random state included.
        pairs: iterations of each, after one of each that is not counted.
        limit: seconds after which no further pair is begun.
    """
    config, device = trainer.config, trainer.device
    clock = clock_of(device.type)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        mine = _copies(trainer)
        generator, discriminator = build_networks(config, trainer.images.channels, trainer.classes)
        twin = Iteration(config, generator.to(device), discriminator.to(device), dense=True)
        reals, draw_noise = _inputs(trainer)

        def timed(iteration: Iteration) -> float:
            started = clock()
            iteration(reals, draw_noise)
            return clock() - started

        begun = clock()
        timed(mine), timed(twin)
        times: list[tuple[float, float]] = []
        while len(times) < pairs and (not times or clock() - begun < limit):
            times.append((timed(mine), timed(twin)))

        def peak(iteration: Iteration) -> int:
            players = iteration.players

            def work() -> None:
                players.game.steps_of_d = 0  # One that has the penalties.
                iteration(reals[: config.accumulate], draw_noise)
                players.game.augmented_from = None  # Kept, it would be freed by the next one.

            networks = [players.generator, players.discriminator, iteration.average.module]
            held = [tensor for tensors in iteration.scheduler.held for tensor in tensors]
            return peak_memory(work, networks, [players.optimizer_g, players.optimizer_d], device.type, held).peak

        peak_bytes, dense_peak_bytes = peak(mine), peak(twin)
        listed = [checkpoint_blocks(network) for network in (generator, discriminator)]
        checkpointed = peak(Iteration(config, generator, discriminator, dense=True)) if all(listed) else None
    sparse, dense = zip(*times, strict=True)
    medians = statistics.median(sparse), statistics.median(dense)
    return Timing(*medians, len(times), peak_bytes, dense_peak_bytes, checkpointed)


def time_of_layers(trainer: Trainer) -> list[LayerTime]:
    """What each layer takes of an iteration of copies of the run's networks; nothing of the run is changed.

    Nothing on devices, whose work is not in the recording.
    """
    if trainer.device.type != "cpu":
        return []
    with torch.random.fork_rng(devices=[]):
        mine, (reals, draw_noise) = _copies(trainer), _inputs(trainer)
        networks = {"generator": mine.players.generator, "discriminator": mine.players.discriminator}
        return layer_times(lambda: mine(reals, draw_noise), networks)


def _copies(trainer: Trainer) -> Iteration:
    generator, discriminator = map(copy.deepcopy, (trainer.players.generator, trainer.players.discriminator))
    return Iteration(trainer.config, generator, discriminator, dense=trainer.config.method == "dense")


def _inputs(trainer: Trainer) -> tuple[list[Inputs], Callable[[], Inputs]]:
    """Real images of an iteration, and what draws its noise."""
    config, generator = trainer.config, torch.Generator().manual_seed(0)
    count = config.d_steps * config.accumulate
    picked = torch.randint(len(trainer.images), (count, config.batch), generator=generator)
    return [trainer.real_of(row) for row in picked], lambda: trainer.noise_of(generator)
