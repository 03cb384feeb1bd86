"""Settings that would do nothing in a run are refused: which, and what they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddst.gan.presets import PRESETS as METHOD_PARTS
from ddst.models.families import FAMILIES
from ddst.train.config import OPTIONS, TrainConfig
from ddst.train.methods import EXCHANGING, EXCHANGING_D, MOVING
from ddst.train.options import ConfigError, flag

MEASURED = ("digits", "shapes")  # Data with a metric of its own: ddst.metrics.classifier.TRAINED, which imports numpy.


def refuse_without_effect(given: Mapping[str, Any], config: TrainConfig) -> None:
    """Raises ConfigError if a given setting is one that does nothing in a run; names the first, and what it needs.

    Args:
        given: settings by name, also those that are given as they would be without. config: all of the run.
    """
    method, parts = config.method, METHOD_PARTS[config.method]
    for name, declared in OPTIONS.items():
        if name in given and declared.methods is not None and method not in declared.methods:
            raise ConfigError(
                f"{flag(name)} has no effect with --method {method}, only with {_having(declared.methods)}"
            )
    for names, idle, why in (
        (
            ("interval_d", "drop_fraction_d", "exempt_d"),
            not parts.steers_d and config.algorithm_d == "static",
            f"--method {method} and --algorithm-d static, under which D never changes, only with "
            "--algorithm-d rigl or set",
        ),
        (
            ("scope", "ranking", "max_norm_share", "grown_second_moment", "random_share"),
            method in EXCHANGING and not (parts.moves_g or parts.steers_d) and config.algorithm_d == "static",
            f"--method {method} and --algorithm-d static, under which no block ever moves, only with --algorithm-d "
            f"rigl or set, or --method {' or '.join(MOVING)}",
        ),
        (
            ("sn_noise",),
            not _normed(config),
            f"--model {config.model} and --method {method}, in which no sparse layer has spectral norm",
        ),
        (
            ("batch_norm",),
            not FAMILIES[config.model].batch_norm,
            f"--model {config.model}, whose generator has no batch norm",
        ),
        (
            ("drop_fraction_end", "drop_fraction_steps"),
            config.drop_schedule == "constant",
            "--drop-schedule constant, which does not fall",
        ),
        (
            ("inception",),
            not config.metric_every,
            "--metric-every 0, under which nothing is measured while the run trains",
        ),
        (
            ("metric_every", "fd_samples") if config.metric_every else ("fd_samples",),
            config.data not in MEASURED and not config.inception,
            f"--data {config.data} without --inception: only digits and shapes have a metric of their own",
        ),
        (
            ("lr_decay_start",),
            config.lr_decay_start >= config.steps,
            f"--steps {config.steps}, before which the decay must start",
        ),
    ):
        for name in names:
            if idle and name in given:
                raise ConfigError(f"{flag(name)} has no effect with {why}")


def _having(methods: tuple[str, ...]) -> str:
    """The methods that have a setting, in words."""
    if methods != EXCHANGING_D:
        return _listed(methods)
    keeping = [name for name in methods if not METHOD_PARTS[name].steers_d]
    return f"ddst-strict, or with --algorithm-d rigl or set and --method {' or '.join(keeping)}"


def _normed(config: TrainConfig) -> bool:
    """Whether a network with sparse layers has weights under spectral norm."""
    normed, parts = FAMILIES[config.model].normed, METHOD_PARTS[config.method]
    return "generator" in normed or ("discriminator" in normed and not parts.dense_d)


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
