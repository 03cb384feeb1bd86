"""Time and memory of a training iteration of the run's networks beside a dense twin, measured in this process."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ddst.gan import EMA
from ddst.measure import clock_of
from ddst.peak_memory import peak_memory
from ddst.train.checkpointing import checkpoint_blocks
from ddst.train.game import Inputs
from ddst.train.layer_time import LayerTime, layer_times
from ddst.train.loop import Trainer
from ddst.train.players import Players, build_networks, gan_iteration, with_optimizers


@dataclass(frozen=True)
class Timing:
    """Medians of iterations timed in turn, and the most bytes that torch holds during one.

    Attributes:
        seconds: of the run's networks, with their present masks. dense: of the dense twin. pairs: iterations of each.
        peak_bytes: weights, gradients, Adam's state, the average, saved tensors and workspaces at their peak.
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
    """Time `pairs` GAN iterations (D steps and G step) of copies of the run's networks and of dense ones, alternately.

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
        generator_twin, discriminator_twin = build_networks(config, trainer.images.channels, trainer.classes)
        twin = with_optimizers(config, generator_twin.to(device), discriminator_twin.to(device))
        reals, draw_noise = _inputs(trainer)

        def timed(who: Players) -> float:
            started = clock()
            gan_iteration(who, reals, draw_noise)
            return clock() - started

        begun = clock()
        timed(mine), timed(twin)
        times: list[tuple[float, float]] = []
        while len(times) < pairs and (not times or clock() - begun < limit):
            times.append((timed(mine), timed(twin)))

        def peak(who: Players) -> int:
            average = EMA(who.generator)

            def iteration() -> None:
                who.game.steps_of_d = 0  # One that has the penalties.
                gan_iteration(who, reals[: config.accumulate], draw_noise)
                average.update()
                who.game.augmented_from = None  # Kept, it would be freed by the next one.

            networks = [who.generator, who.discriminator, average.module]
            return peak_memory(iteration, networks, [who.optimizer_g, who.optimizer_d], device.type).peak

        peak_bytes, dense_peak_bytes = peak(mine), peak(twin)
        listed = [checkpoint_blocks(network) for network in (twin.generator, twin.discriminator)]
        checkpointed = peak(twin) if all(listed) else None
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
        networks = {"generator": mine.generator, "discriminator": mine.discriminator}
        return layer_times(lambda: gan_iteration(mine, reals, draw_noise), networks)


def _copies(trainer: Trainer) -> Players:
    players = trainer.players
    return with_optimizers(trainer.config, copy.deepcopy(players.generator), copy.deepcopy(players.discriminator))


def _inputs(trainer: Trainer) -> tuple[list[Inputs], Callable[[], Inputs]]:
    """Real images of an iteration, and what draws its noise."""
    config, generator = trainer.config, torch.Generator().manual_seed(0)
    count = config.d_steps * config.accumulate
    picked = torch.randint(len(trainer.images), (count, config.batch), generator=generator)
    return [trainer.real_of(row) for row in picked], lambda: trainer.noise_of(generator)
