"""Which methods there are, and which of them have which parts: the lists that settings of a run refer to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ddst.gan.presets import PRESETS, Preset

# ddst-strict last: it has most of all settings, and what says which methods have one ends with it.
METHODS = (*(name for name in PRESETS if name != "ddst-strict"), "ddst-strict")


def _with(holds: Callable[[Preset], bool]) -> tuple[str, ...]:
    return tuple(name for name in METHODS if PRESETS[name].sparse and holds(PRESETS[name]))


SPARSE = _with(lambda m: True)
SPARSE_D = _with(lambda m: not m.dense_d)
MOVING = _with(lambda m: m.moves_g)
STEERED = _with(lambda m: m.steers_d)
CONTROLLED = _with(lambda m: m.controls_d)
# Those that exchange D's blocks where --algorithm-d says so, and those that change blocks of any network.
EXCHANGING_D = _with(lambda m: m.mode == "strict" or not (m.dense_d or m.steers_d))
CHANGING = _with(lambda m: m.moves_g or m.steers_d or m.method == "prune" or not m.dense_d)
# Of these, those in which blocks are exchanged at a constant count, and those in which blocks enter.
EXCHANGING = _with(lambda m: m.moves_g or m.mode == "strict" or not (m.dense_d or m.steers_d))
GROWING = _with(lambda m: m.moves_g or m.steers_d or not m.dense_d)
PRUNING = _with(lambda m: m.method == "prune")
# How `--help` calls the longer of these lists.
CALLED = {
    SPARSE: "all but dense",
    SPARSE_D: "methods with a sparse D",
    MOVING: "methods that move G's blocks",
    CHANGING: "methods that change blocks of a network",
    EXCHANGING: "methods that exchange blocks of a network",
    GROWING: "methods that grow blocks of a network",
    STEERED: "methods that change D's density",
    CONTROLLED: "methods that steer D's density",
    EXCHANGING_D: "ddst-strict and methods that keep D's density",
}


def steered_by(settings: Mapping[str, Any]) -> tuple[str, tuple[float, float]] | None:
    """The signal of :class:`ddst.DensityController` that a run's settings, as a log holds them, keep within bounds.

    None for methods that steer by none.

    Example:
        >>> steered_by({"method": "ddst-ada", "bounds": [0.55, 0.65]})
        ('real_sign', (0.55, 0.65))
        >>> steered_by({"method": "static", "bounds": [0.45, 0.55]})
    """
    method, bounds = settings.get("method"), settings.get("bounds")
    if method not in CONTROLLED or not isinstance(bounds, list | tuple) or len(bounds) != 2:
        return None
    if not all(isinstance(bound, float) and math.isfinite(bound) for bound in bounds):
        return None
    return PRESETS[method].signal, (bounds[0], bounds[1])
