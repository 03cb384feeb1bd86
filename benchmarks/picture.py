"""Speed-up over density, one panel a layer, with break-even and the ceiling."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ddst.benchmarks.runner import Row


def panels(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """Layer -> curve (batch, block and mask) -> its right rows by density; curves without one are left out."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: float(row["density"])):
        if not row["wrong"] and "dense" in row["step"]["baselines"]:
            label = f"{row['block'][0]}x{row['block'][1]} {row['mask']}, batch {row['batch']}"
            found.setdefault(row["layer"], {}).setdefault(label, []).append(row)
    return found


def draw(run: dict[str, Any], file: Path) -> None:
    """Writes the picture of a run; the format follows the file's suffix. Needs matplotlib.

    Solid: measured, median with the 10th and 90th percentile. Dashed in the same colour: the ceiling, what the floor of
    the packed passes would give. Grey: break-even.

    Raises:
        ValueError: no row to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    layers = panels(run["rows"])
    if not layers:
        raise ValueError("no row with a ratio to draw")
    across = min(4, len(layers))
    down = math.ceil(len(layers) / across)
    figure, axes = plt.subplots(down, across, figsize=(4.2 * across, 3.4 * down), squeeze=False, layout="constrained")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis in axes.flat[len(layers) :]:
        axis.set_visible(False)
    for axis, (name, curves) in zip(axes.flat, layers.items(), strict=False):
        for label, rows in curves.items():
            x = [100 * row["density"] for row in rows]
            ratios = [row["step"]["baselines"]["dense"]["speedup"] for row in rows]
            (line,) = axis.plot(x, [r["median"] for r in ratios], "o-", markersize=3, label=label)
            axis.fill_between(x, [r["low"] for r in ratios], [r["high"] for r in ratios], alpha=0.2)
            if all("ceiling" in row["step"] for row in rows):
                axis.plot(x, [row["step"]["ceiling"] for row in rows], "--", color=line.get_color(), alpha=0.6)
        axis.axhline(1.0, color="grey", linewidth=1)
        axis.set(title=name, xscale="log", yscale="log", xlabel="density, %", ylabel="speed-up of the step")
        axis.set_xticks(sorted({100 * row["density"] for rows in curves.values() for row in rows}))
        axis.set_yticks([0.5, 1, 2, 5, 10, 20])
        for part in (axis.xaxis, axis.yaxis):
            part.set_major_formatter(plain)
            part.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    machine = run["machine"]
    figure.suptitle(f"{machine['cpu']}, {run['settings']['threads']} thread(s), commit {run['commit']}", fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)
