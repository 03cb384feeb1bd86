"""The methods of the paper's tables by name, each a few parts that :class:`ddst.DDST` is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A method: how G's blocks move, and what becomes of D.

    Attributes:
        mode, method, signal: of :class:`ddst.DDST`.
        sparse: whether the networks are sparse at all. full_g: whether G starts with all its blocks (pruned later).
        dense_d: whether D has all its weights ("Strong"); else it starts at G's density ("Balance").
        more: further arguments of :class:`ddst.DDST` in which the method differs from others of its mode.

    >>> PRESETS["sdst-strong-rigl"].arguments
    {'mode': 'sdst', 'method': 'rigl'}
    >>> PRESETS["sdst-strong-rigl"].density_d(0.1)
    1.0
    """

    mode: str
    method: str
    dense_d: bool = False
    signal: str = "balance_ratio"
    sparse: bool = True
    full_g: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def moves_g(self) -> bool:
        """Whether blocks of G are exchanged while it trains."""
        return self.method in ("rigl", "set")

    @property
    def steers_d(self) -> bool:
        """Whether the density of D changes."""
        return self.mode != "sdst"

    @property
    def controls_d(self) -> bool:
        """Whether a measured signal decides about it."""
        return self.mode in ("relaxed", "strict")

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of :class:`ddst.DDST`: ``DDST(G, D, opt_g, opt_d, total_steps=..., **preset.arguments)``.

        With post-hoc pruning ``prune_to`` belongs to them, the density that is left.
        """
        signal = {} if self.signal == "balance_ratio" else {"signal": self.signal}
        return {"mode": self.mode, "method": self.method, **signal, **self.more}

    def density_g(self, density: float) -> float:
        """The density of G at the start where ``density`` is asked for."""
        return 1.0 if self.full_g or not self.sparse else density

    def density_d(self, density: float) -> float:
        """The same for D."""
        return 1.0 if self.dense_d or not self.sparse else density


#: By name. "static", "sdst-set" and "sdst-rigl" are the balanced ones' short names.
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "dense": Preset("sdst", "static", dense_d=True, sparse=False),
        "static": Preset("sdst", "static"),
        "static-balance": Preset("sdst", "static"),
        "static-strong": Preset("sdst", "static", dense_d=True),
        "sdst-set": Preset("sdst", "set"),
        "sdst-rigl": Preset("sdst", "rigl"),
        "sdst-balance-set": Preset("sdst", "set"),
        "sdst-balance-rigl": Preset("sdst", "rigl"),
        "sdst-strong-set": Preset("sdst", "set", dense_d=True),
        "sdst-strong-rigl": Preset("sdst", "rigl", dense_d=True),
        "ddst-relaxed": Preset("relaxed", "rigl"),
        "ddst-strict": Preset("strict", "rigl"),
        # Density adjustment of D beside a static G; the published script's bounds.
        "dda": Preset("relaxed", "static", more=MappingProxyType({"bounds": (0.5, 0.65)})),
        "ddst-ramp": Preset("ramp", "rigl"),
        "ddst-ada": Preset("relaxed", "rigl", signal="real_sign"),
        "prune": Preset("sdst", "prune", dense_d=True, full_g=True),
    }
)
