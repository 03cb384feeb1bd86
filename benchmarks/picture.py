"""Kept runs as pictures: speed-up over density, a panel a layer; time and memory of a GAN iteration, a bar a row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ddst.benchmarks.memory_table import MIB
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

    Raises:
        ValueError: no row to draw, or a run of a kind that has no picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kind = run.get("kind", "layers")
    if kind not in ("layers", "memory"):
        raise ValueError(f"runs of layers and of --memory have pictures, got one of {kind!r}")
    figure = _bars(run, plt) if kind == "memory" else _curves(run, plt)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _curves(run: dict[str, Any], plt: Any) -> Any:
    """Solid: measured, median with the 10th and 90th percentile. Dashed in the same colour: the ceiling, what the floor
    of the packed passes would give. Grey: break-even.
    """
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
    return figure


def _bars(run: dict[str, Any], plt: Any) -> Any:
    """Time of an iteration, and the most it holds, of each right row relative to dense; sparse rows are coloured."""
    rows = [row for row in run["rows"] if not row["wrong"]]
    if not rows or rows[0]["row"] != "dense":
        raise ValueError("no row to draw, or none of dense to compare with")
    figure, axes = plt.subplots(1, 2, figsize=(9, 1.1 + 0.4 * len(rows)), sharey=True, layout="constrained")
    names = [row["row"].replace("-", ", ", 1) for row in rows]
    colors = ["tab:green" if row["row"].startswith("sparse") else "silver" for row in rows]
    panels = (
        ("time of an iteration", [row["time"]["median"] for row in rows], f"{rows[0]['seconds']:.2f} s"),
        ("peak memory", [row["memory"] for row in rows], f"{rows[0]['peak'] / MIB:.0f} MiB"),
    )
    for axis, (title, shares, of_dense) in zip(axes, panels, strict=True):
        bars = axis.barh(names, shares, color=colors)
        axis.bar_label(bars, [of_dense, *(f"{share:.2f}" for share in shares[1:])], padding=4)
        axis.set(xlim=(0, 1.2 * max(shares)), xticks=[])
        axis.set_title(f"{title}, of dense", fontsize=11)
        axis.tick_params(left=False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].invert_yaxis()
    row, machine = rows[0], run["machine"]
    figure.supxlabel(
        f"{row['layer']} at {100 * row['density']:g} %, blocks of {row['block'][0]}x{row['block'][1]}, batch "
        f"{row['batch']}; {machine['cpu']}, {row['threads']} thread(s), commit {run['commit']}",
        fontsize=8,
    )
    return figure
