"""Seconds per training iteration of the run's networks beside a dense twin, measured alternately in this process."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ddst.train.loop import Trainer
from ddst.train.players import Players, build_networks, gan_iteration, with_optimizers


@dataclass(frozen=True)
class Timing:
    """Medians of iterations timed in turn.

    Attributes:
        seconds: of the run's networks, with their present masks. dense: of the dense twin. pairs: iterations of each.
    """

    seconds: float
    dense: float
    pairs: int

    @property
    def speedup(self) -> float:
        return self.dense / self.seconds


def compare_with_dense(trainer: Trainer, pairs: int, limit: float = 60.0) -> Timing:
    """Time `pairs` GAN iterations (D steps and G step) of copies of the run's networks and of dense ones, alternately.

    Args:
        trainer: the run; nothing of it is changed, the random state included.
        pairs: iterations of each, after one of each that is not counted.
        limit: seconds after which no further pair is begun.
    """
    config, players = trainer.config, trainer.players
    with torch.random.fork_rng(devices=[]):
        mine = with_optimizers(config, copy.deepcopy(players.generator), copy.deepcopy(players.discriminator))
        twin = with_optimizers(config, *build_networks(config, trainer.images.channels))
        generator = torch.Generator().manual_seed(0)
        picked = torch.randint(len(trainer.images), (config.d_steps, config.batch), generator=generator)
        reals = [trainer.images.batch(row) for row in picked]

        def draw_noise() -> Tensor:
            return torch.randn(config.batch, config.latent, generator=generator)

        def timed(who: Players) -> float:
            started = time.perf_counter()
            gan_iteration(who, reals, draw_noise)
            return time.perf_counter() - started

        begun = time.perf_counter()
        timed(mine), timed(twin)
        times: list[tuple[float, float]] = []
        while len(times) < pairs and (not times or time.perf_counter() - begun < limit):
            times.append((timed(mine), timed(twin)))
    sparse, dense = zip(*times, strict=True)
    return Timing(statistics.median(sparse), statistics.median(dense), len(times))
