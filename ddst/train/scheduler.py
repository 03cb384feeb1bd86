"""The scheduler that a run's settings describe."""

from __future__ import annotations

import warnings
from typing import Any

from ddst.gan import DDST, EMA, PRESETS
from ddst.models.families import FAMILIES
from ddst.sparsity import TopologyUpdater
from ddst.train.config import TrainConfig
from ddst.train.players import Players


def make_scheduler(config: TrainConfig, players: Players, ema: EMA) -> tuple[DDST, list[str]]:
    """The scheduler of a run's settings, and what it warns of."""
    c = config
    parts, game = PRESETS[c.method], players.game
    plain = game.plain and not FAMILIES[c.model].conditional
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler = DDST(
            players.generator,
            players.discriminator,
            players.optimizer_g,
            players.optimizer_d,
            total_steps=c.steps,
            mode=parts.mode,
            method=parts.method,
            method_d=None if c.algorithm_d == "static" else c.algorithm_d,
            signal=parts.signal,
            published=c.published,
            random_share=c.random_share,
            connected=c.connected,
            grace=c.grace,
            prune_to=c.density if parts.method == "prune" else None,
            prune_at=c.prune_at if parts.method == "prune" else None,
            generate=None if plain else lambda noise: game.images(players.generator, noise),
            score=None if plain else lambda images: game.scores_again(players.discriminator, images),
            interval_g=c.interval_g,
            interval_d=c.interval_d,
            bounds=c.bounds,
            delta=c.delta,
            density_range=(c.density_d_min, c.density_d_max),
            br_every=c.br_every,
            br_window=c.br_window,
            br_average=c.br_average,
            br_eps=c.br_eps,
            warmup=c.warmup,
            drop_fraction=c.drop_fraction,
            drop_fraction_d=c.drop_fraction_d,
            drop_fraction_end=c.drop_fraction_end,
            drop_fraction_steps=c.drop_fraction_steps,
            schedule=c.drop_schedule,
            scope=c.scope,
            ranking=c.ranking,
            max_norm_share=c.max_norm_share,
            grown_second_moment=c.grown_second_moment,
            exempt_g=() if c.exempt_g == "none" else c.exempt_g,
            exempt_d=() if c.exempt_d == "none" else c.exempt_d,
            ema=ema,
            seed=c.seed,
        )
    return scheduler, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def rules_in_force(scheduler: DDST) -> dict[str, dict[str, Any]]:
    """What moves each network's blocks, with the defaults that a run's settings leave to the library."""
    ranked, grown, exchanged = ("ranking", "connected", "exempt"), ("growth", "grown_second_moment"), ("scope", "grace")
    training, updater_d = scheduler.training_g, scheduler.updater_d
    rules: dict[str, tuple[TopologyUpdater, tuple[str, ...]]] = {}
    if training.method != "static":
        rules["generator"] = training.updater, ranked if training.method == "prune" else grown + exchanged + ranked
    if updater_d is not None:
        exchanges = scheduler.mode in ("strict", "sdst")  # Others make D denser and sparser only.
        rules["discriminator"] = updater_d, grown + (exchanged if exchanges else ()) + ranked
    return {network: {name: getattr(updater, name) for name in names} for network, (updater, names) in rules.items()}
