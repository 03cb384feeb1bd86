"""The plots of a page of runs: SVG of matplotlib's, whose colours are the page's, so that they are light and dark."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What matplotlib writes, and what stands in the page instead.
_INK, _GRID = "#010101", "#020202"
COLOURS = 8
_SERIES = [f"#0303{i:02x}" for i in range(COLOURS)]
MOST_POINTS = 400


@dataclass(frozen=True)
class Line:
    """One curve: points in order of x, its colour's number, and how it is drawn."""

    x: Sequence[float]
    y: Sequence[float]
    colour: int
    style: str = "-"


def thinned(x: Sequence[float], y: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """At most `MOST_POINTS` points: means of equally many neighbours; gaps (None) are left out.

    Example:
        >>> thinned([1, 2, 3], [5.0, None, 7.0])
        ([1.0, 3.0], [5.0, 7.0])
    """
    pairs = [(float(a), float(b)) for a, b in zip(x, y, strict=True) if b is not None and math.isfinite(b)]
    size = math.ceil(len(pairs) / MOST_POINTS) or 1
    groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    means = [[sum(values) / len(values) for values in zip(*group, strict=True)] for group in groups]
    return [mean[0] for mean in means], [mean[1] for mean in means]


def plot(
    name: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    band: tuple[float, float] | None = None,
    limits: tuple[float, float] | None = None,
    log_scale: bool = False,
) -> str:
    """One plot as an ``<svg>`` element; "" where there is nothing to draw.

    Args:
        name: makes its ids differ from those of other plots. band: y between which a band lies. limits: of y.
        log_scale: of y, where all values are positive.
    """
    if not any(line.x for line in lines):
        return ""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "font.family": "sans-serif"}
    settings |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.4, 2.6), layout="constrained")
        axes = figure.subplots()
        if band is not None:
            axes.axhspan(*band, color=_GRID, alpha=0.5, lw=0)
        for line in lines:
            marker: dict[str, Any] = {"marker": "o", "ms": 3} if len(line.x) < 20 else {}
            axes.plot(line.x, line.y, line.style, color=_SERIES[line.colour % COLOURS], lw=1.4, **marker)
        if log_scale and all(value > 0 for line in lines for value in line.y):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter())
        if limits is not None:
            axes.set_ylim(*limits)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(color=_GRID, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return _coloured(svg[svg.index("<svg") :])


def _coloured(svg: str) -> str:
    svg = svg.replace(_INK, "var(--ink)").replace(_GRID, "var(--line)")
    for i, colour in enumerate(_SERIES):
        svg = svg.replace(colour, f"var(--c{i})")
    return svg.replace("<svg ", '<svg role="img" ', 1)
