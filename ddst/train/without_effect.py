"""Settings that would do nothing in a run are refused: which, and what they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddst.gan.presets import PRESETS as METHOD_PARTS
from ddst.models.families import FAMILIES
from ddst.train.config import OPTIONS, TrainConfig
from ddst.train.methods import EXCHANGING, EXCHANGING_D, MOVING, SPARSE_D
from ddst.train.options import ConfigError, flag

# Data with a metric of its own, ddst.metrics.classifier.TRAINED, which imports numpy: those that are read from no file.
MEASURED = ("digits", "shapes")


def refuse_without_effect(given: Mapping[str, Any], config: TrainConfig) -> None:
    """Raises ConfigError if a given setting is one that does nothing in a run; names the first, and what it needs.

    Args:
        given: settings by name, also those that are given as they would be without. config: all of the run.
    """
    method, parts = config.method, METHOD_PARTS[config.method]
    exchanges_d = parts.mode == "strict" or not (parts.steers_d or config.algorithm_d == "static")
    exchanging = (("drop_fraction", parts.moves_g), ("drop_fraction_d", exchanges_d))
    exchanged = {name: getattr(config, name) for name, has in exchanging if has}
    still = bool(exchanged) and not any(exchanged.values())
    stands = f"{' and '.join(f'{flag(name)} 0' for name in exchanged)}, under which no block is exchanged"
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
            ("scope", "ranking", "max_norm_share", "grown_second_moment", "connected", "grace", "random_share"),
            method in EXCHANGING and not (parts.moves_g or parts.steers_d) and config.algorithm_d == "static",
            f"--method {method} and --algorithm-d static, under which no block ever moves, only with --algorithm-d "
            f"rigl or set, or --method {' or '.join(MOVING)}",
        ),
        (("drop_schedule", "drop_fraction_end", "drop_fraction_steps", "scope", "grace"), still, stands),
        (
            ("ranking", "max_norm_share", "grown_second_moment", "random_share", "connected"),
            still and not parts.steers_d,
            stands,
        ),
        (("exempt_g",), config.drop_fraction == 0, "--drop-fraction 0, under which no block of G moves"),
        (
            ("exempt_d",),
            exchanged.get("drop_fraction_d") == 0 and not parts.steers_d,
            "--drop-fraction-d 0, under which no block of D moves",
        ),
        (
            ("delta",),
            config.density_d_min == config.density_d == config.density_d_max,
            f"--density-d-min and --density-d-max {config.density_d}, which is D's density",
        ),
        (
            ("block_d",),
            _full_d(config),
            f"--density-d 1 and --distribution-d {config.distribution_d}, under which D is dense",
        ),
        (
            ("sn_noise",),
            not _normed(config),
            f"--model {config.model} and --method {method}{' and --density-d 1' if _full_d(config) else ''}, in which "
            "no sparse layer has spectral norm",
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
            ("data_cache",),
            config.data in MEASURED and config.data_cache not in (None, "none"),
            f"--data {config.data}, of which no resized images are kept",
        ),
        (
            ("drop_fraction_end",),
            bool(exchanged) and config.drop_fraction_end > max(exchanged.values()),
            f"{' and '.join(f'{flag(name)} {share:g}' for name, share in exchanged.items())}, from which it falls",
        ),
        (
            ("stop_after",),
            config.stop_after is not None and config.stop_after > config.steps,
            f"--steps {config.steps}, after which the run is at its end",
        ),
        (("ema_start", "ema_ramp"), config.ema == 0, "--ema 0, under which the average is G itself"),
        (("lazy",), not (config.r1 or config.r2), "--r1 0 and --r2 0"),
        (("lr_decay_start",), config.lr_decay == "none", "--lr-decay none"),
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
    return "generator" in normed or ("discriminator" in normed and not (parts.dense_d or _full_d(config)))


def _full_d(config: TrainConfig) -> bool:
    """Whether a D that may be sparse has no sparse layer: what stays full of blocks is one of "uniform" alone."""
    steers = METHOD_PARTS[config.method].steers_d
    return config.method in SPARSE_D and config.density_d == 1 and not steers and config.distribution_d != "uniform"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
