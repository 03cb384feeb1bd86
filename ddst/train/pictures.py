"""What report.png and replay.png are made of: a signal with its bounds, and D's density with the decisions on it.

A legend names what is drawn, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddst.train.checkpoint import replacing

Points = Sequence[tuple[float, float]]

# Signal of ddst.DensityController -> how it is called, the range in which it is shown, and where it leaves room.
_SIGNALS = {
    "balance_ratio": ("balance ratio", (-0.25, 1.5), "upper right"),
    "real_sign": ("mean sign of D(x)", (-1.05, 1.05), "lower right"),
}
_MARKERS = {"grow": "^", "drop": "v", "exchange": "o"}


@contextmanager
def panels(path: Path, count: int) -> Iterator[list[Any]]:
    """Axes one below the other over steps, to draw into; a PNG at the end of the block.

    Raises:
        ModuleNotFoundError: matplotlib is not installed. OSError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 0.4 + 2.6 * count))
        figure.subplots_adjust(left=0.09, right=0.98, top=0.98, bottom=0.2 / count, hspace=0.08)
        axes = list(figure.subplots(count, sharex=True))
        yield axes
        axes[-1].set(xlabel="step")
        for each in axes:
            _legend(each, "best")
            each.grid(alpha=0.3)
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=110)


def _legend(axes: Any, where: str) -> None:
    if axes.get_legend() is None and axes.get_legend_handles_labels()[0]:
        axes.legend(loc=where, fontsize=8)


def line(axes: Any, points: Points, style: str = "-", **how: Any) -> None:
    """A line or markers, where there are points; one point alone is a dot."""
    if points:
        style = "." if style == "-" and len(points) == 1 else style
        axes.plot(*zip(*points, strict=True), style, **how)


def draw_signal(
    axes: Any, signal: str, window: Points, bounds: tuple[float, float] | None, single: Points = ()
) -> None:
    """A signal's average over its window, single measurements, and the bounds that it is held within."""
    name, limits, room = _SIGNALS[signal]
    line(axes, single, ".", ms=2, color="0.7", label="single measurement")
    line(axes, window, color="C0", label="window")
    if bounds is not None:
        axes.axhspan(*bounds, color="C2", alpha=0.2, label="bounds")
    axes.set(ylabel=name, ylim=limits)
    _legend(axes, room)


def draw_decisions(axes: Any, decisions: Iterable[tuple[int, str, float]], label: str) -> None:
    """(step, action, new density) of decisions that change something."""
    decisions = list(decisions)
    for action, marker in _MARKERS.items():
        at = [(step, density) for step, done, density in decisions if done == action]
        line(axes, at, marker, ms=5, color="C3", ls="", label=f"{label}: {action}")
    axes.set(ylabel="density", ylim=(0, 1.05))
