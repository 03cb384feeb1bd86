"""One self-contained HTML page of one run or several beside each other: `ddst report`."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddst.runs.plots import COLOURS, Line, plot, thinned
from ddst.train.checkpoint import replacing
from ddst.train.collapse import told, watched
from ddst.train.folder import EVALUATION, LOG, SAMPLES, SUMMARY
from ddst.train.log import read_log
from ddst.train.options import ConfigError

MOST_GRIDS = 6


@dataclass
class Run:
    """What a run's folder says: its log's lines by kind, the numbers of its end, its grids."""

    name: str
    colour: int
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    figures: list[list[str]] = field(default_factory=list)
    grids: list[tuple[int, str]] = field(default_factory=list)
    signs: str = ""

    def series(self, name: str) -> tuple[list[float], list[float]]:
        return thinned([e["step"] for e in self.steps], [e[name] for e in self.steps])

    @property
    def bounds(self) -> tuple[float, float] | None:
        bounds: Any = self.settings.get("bounds")
        numbers = isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(b, int | float) for b in bounds)
        return (float(bounds[0]), float(bounds[1])) if numbers else None


def report(folders: Sequence[Path], out: Path) -> None:
    """Write the page. It holds everything that it shows and asks no network for anything.

    Args:
        folders: of runs, finished or not. out: the page; it is replaced.

    Raises:
        ConfigError: a folder without a log of a run. OSError: a file cannot be read or written.
    """
    runs = [_read(folder, i) for i, folder in enumerate(folders)]
    page = _template().render(
        runs=runs,
        table=[_row(run) for run in runs],
        comparisons=_comparisons(runs),
        details=[(run, _details(run)) for run in runs],
        differing=_differing(runs),
        colours=COLOURS,
    )
    with replacing(out) as file:
        file.write(page.encode())


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("ddst.runs", "."), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("page.html.j2")


def _read(folder: Path, number: int) -> Run:
    if not (folder / LOG).is_file():
        raise ConfigError(f"RUN {folder} holds no {LOG} of a run")
    run = Run(str(folder), number % COLOURS)
    entries = list(read_log(folder / LOG))
    kinds = {None: run.steps, "metric": run.metrics, "densities": run.layers, "decision": run.decisions}
    for entry in entries:
        event = entry.get("event")
        if event == "start":
            run.settings, run.versions = _dict(entry.get("settings")), _dict(entry.get("versions"))
        elif event in kinds:
            kinds[event].append(entry)
    if run.bounds and isinstance(steps := run.settings.get("steps"), int):
        run.signs = told(watched(entries, run.bounds, steps))
    run.summary = _json(folder / SUMMARY)
    figures = _json(folder / EVALUATION).get("figures")
    run.figures = [_figure(f) for f in figures if isinstance(f, dict)] if isinstance(figures, list) else []
    run.decisions = [d for d in run.decisions if isinstance(d.get("reason"), str)]
    pictures = sorted((folder / SAMPLES).glob("step_*.png")) if (folder / SAMPLES).is_dir() else []
    numbered = [(int(path.stem[5:]), path) for path in pictures if path.stem[5:].isdecimal()]
    last = len(numbered) - 1
    chosen = sorted({round(i * last / (MOST_GRIDS - 1)) for i in range(MOST_GRIDS)}) if numbered else []
    run.grids = [(numbered[i][0], base64.b64encode(numbered[i][1].read_bytes()).decode()) for i in chosen]
    return run


def _json(path: Path) -> dict[str, Any]:
    try:
        return _dict(json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _figure(said: dict[str, Any]) -> list[str]:
    counts = [_number(said.get(name) or None, ",d") for name in ("samples", "real")]
    words = [str(said.get(name, "–")) for name in ("split", "resizer")]
    return [str(said.get("metric", "–")), _number(said.get("value"), ".4g"), *counts, *words]


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) and not isinstance(value, bool) else "–"


def _row(run: Run) -> list[str]:
    last = run.steps[-1] if run.steps else {}
    generator, discriminator = _dict(run.summary.get("generator")), _dict(run.summary.get("discriminator"))
    memory = [net.get(key, "") for key in ("state_bytes", "dense_state_bytes") for net in (generator, discriminator)]
    share = (memory[0] + memory[1]) / (memory[2] + memory[3]) if all(type(m) is int and m > 0 for m in memory) else None
    values = [m["value"] for m in run.metrics if m["value"] is not None]
    per_step = last["seconds"] / max(last["step"], 1) if isinstance(last.get("seconds"), int | float) else None
    timing = _dict(run.summary.get("timing"))
    both = all(isinstance(timing.get(key), float) and timing[key] > 0 for key in ("seconds", "dense"))
    return [
        str(run.settings.get("method", "–")),
        _number(last.get("step"), ",d"),
        _number(last.get("density_g"), ".3f"),
        _number(last.get("density_d"), ".3f"),
        _number(values[-1] if values else None, ".1f"),
        _number(min(values) if values else None, ".1f"),
        _number(per_step, ".4f"),
        _number(timing["dense"] / timing["seconds"] if both else None, ".2f"),
        _number(run.summary.get("flops_ratio"), ".3f"),
        _number(share, ".3f"),
    ]


def _comparisons(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(title, plot) of the metric over steps, seconds and counted operations, every run in its colour."""
    kinds = list(dict.fromkeys(m["metric"] for run in runs for m in run.metrics))
    plots = []
    for kind in kinds:
        for key, label in (("step", "step"), ("seconds", "seconds of training"), ("flops", "counted operations")):
            lines = []
            for run in runs:
                points = [m for m in run.metrics if m["metric"] == kind and m.get(key) is not None]
                x, y = thinned([m[key] for m in points], [m["value"] for m in points])
                lines.append(Line(x, y, run.colour))
            title = f"{'Embedded Fréchet distance' if kind == 'digits' else kind.upper()} over {label}"
            plots.append((title, plot(f"{kind} {key}", lines, label, "distance", log_scale=True)))
    return [(title, svg) for title, svg in plots if svg]


def _details(run: Run) -> list[tuple[str, str, list[tuple[int, str]]]]:
    """(title, plot, legend) of one run."""
    name = f"{run.name} {run.colour}"
    found = [
        (
            "Balance ratio, with its bounds",
            plot(f"{name} br", [Line(*run.series("balance_ratio"), 0)], "step", "balance ratio", band=run.bounds),
            [],
        ),
        (
            "Density",
            plot(
                f"{name} density",
                [Line(*run.series("density_g"), 1), Line(*run.series("density_d"), 0)],
                "step",
                "density",
                limits=(0, 1.05),
            ),
            [(1, "generator"), (0, "discriminator")],
        ),
        (
            "Losses",
            plot(f"{name} loss", [Line(*run.series("loss_g"), 1), Line(*run.series("loss_d"), 0)], "step", "loss"),
            [(1, "generator"), (0, "discriminator")],
        ),
    ]
    for network in ("generator", "discriminator"):
        lines, legend = _layers(run, network)
        svg = plot(f"{name} {network}", lines, "step", "density", limits=(0, 1.05))
        found.append((f"Density of each layer of the {network}", svg, legend))
    return [entry for entry in found if entry[1]]


def _layers(run: Run, network: str) -> tuple[list[Line], list[tuple[int, str]]]:
    names = list(dict.fromkeys(name for entry in run.layers for name in _dict(entry.get(network))))
    lines = []
    for i, name in enumerate(names):
        points = [
            (e["step"], e[network][name]) for e in run.layers if isinstance(_dict(e.get(network)).get(name), float)
        ]
        x, y = thinned([p[0] for p in points], [p[1] for p in points])
        # A second round of the colours is dashed.
        lines.append(Line(x, y, i % COLOURS, "-" if i < COLOURS else "--"))
    return lines, [(i % COLOURS, name + (" (dashed)" if i >= COLOURS else "")) for i, name in enumerate(names)]


def _differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    rows = [(name, [json.dumps(run.settings.get(name)) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
