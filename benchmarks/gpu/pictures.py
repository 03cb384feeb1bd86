"""The pictures of a run: kernels' speed-up over density, and whole iterations. Need matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddst.benchmarks.problem import PASSES

Part = dict[str, Any]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_kernels(parts: dict[str, Part], file: Path) -> None:
    """Speed-up with a cold cache over density: a row of panels a layer, a column a pass, a line a block and backend.

    Raises:
        ValueError: no row to draw.
    """
    rows = [r for r in parts.get("kernels", {}).get("rows", []) if "cold" in r and r["kind"] == "bf16"]
    rows = rows or [r for r in parts.get("kernels", {}).get("rows", []) if "cold" in r]
    if not rows:
        raise ValueError("no row to draw")
    plt = _pyplot()
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure, axes = plt.subplots(
        len(layers), len(PASSES), figsize=(12, 3 * len(layers)), squeeze=False, layout="constrained"
    )
    for i, layer in enumerate(layers):
        for j, name in enumerate(PASSES):
            axis = axes[i][j]
            of_pass = [row for row in rows if (row["layer"], row["pass"]) == (layer, name)]
            for key in sorted({(*row["block"], row["backend"]) for row in of_pass}):
                line = sorted(
                    (100 * row["density"], row["cold"]["speedup"]["median"], row["dense_floor"] / row["floor"])
                    for row in of_pass
                    if (*row["block"], row["backend"]) == key
                )
                x, y, ceiling = zip(*line, strict=True)
                axis.plot(x, y, "o-", markersize=3, label=f"{key[0]}×{key[1]} {key[2]}")
            if of_pass:
                axis.plot(x, ceiling, "--", color="grey", alpha=0.6, label="ratio of the floors")
                axis.legend(fontsize=7)
            axis.axhline(1.0, color="grey", linewidth=1)
            axis.set(
                title=f"{layer}, {name}", xlabel="density, %", ylabel="speed-up over dense", xscale="log", yscale="log"
            )
            axis.set_xticks([10, 20, 30, 50], ["10", "20", "30", "50"], minor=False)
            axis.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    figure.suptitle(_title(parts), fontsize=9)
    figure.savefig(file, dpi=100, format="png")
    plt.close(figure)


def draw_iterations(parts: dict[str, Part], file: Path) -> None:
    """Milliseconds of a whole iteration, eager and as a graph, by network and density.

    Raises:
        ValueError: no row to draw.
    """
    rows = [row for row in parts.get("iteration", {}).get("rows", []) if not row["wrong"]]
    if not rows:
        raise ValueError("no row to draw")
    plt = _pyplot()
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(1, len(networks), figsize=(5 * len(networks), 3.6), squeeze=False, layout="constrained")
    for axis, network in zip(axes[0], networks, strict=True):
        own = sorted((row for row in rows if row["network"] == network), key=lambda row: -(row["density"] or 2.0))
        for k, way in enumerate(("eager", "graph")):
            heights = [1e3 * row[way]["median"] for row in own]
            bars = axis.bar([i + 0.4 * k for i in range(len(own))], heights, 0.38, label=way)
            axis.bar_label(bars, fmt="%.1f", fontsize=7)
        labels = ["dense" if r["density"] is None else f"{100 * r['density']:g} %\n{r['distribution']}" for r in own]
        axis.set_xticks([i + 0.2 for i in range(len(own))], labels)
        axis.set(title=network, ylabel="ms per iteration")
        axis.legend(fontsize=7)
    figure.suptitle(_title(parts), fontsize=9)
    figure.savefig(file, dpi=100, format="png")
    plt.close(figure)


def _title(parts: dict[str, Part]) -> str:
    known = parts.get("environment", {})
    torch = known.get("versions", {}).get("torch", "")
    return f"{known.get('device', '')}, torch {torch}, commit {known.get('commit', '')}"


#: Part -> file name and what draws it.
PICTURES = {"kernels": ("kernels.png", draw_kernels), "iteration": ("iteration.png", draw_iterations)}
