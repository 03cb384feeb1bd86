"""One self-contained HTML page of one run or several beside each other: `ddst report`."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddst.metrics.classifier import TRAINED
from ddst.runs.plots import COLOURS, Line, plot, thinned
from ddst.train.checkpoint import replacing
from ddst.train.collapse import told, watched
from ddst.train.config import OPTIONS
from ddst.train.folder import EVALUATION, LOG, SAMPLES, SUMMARY
from ddst.train.log import lengths, read_log
from ddst.train.methods import METHODS, steered_by
from ddst.train.options import ConfigError
from ddst.train.target import check_target

MOST_GRIDS = 6
MOST_LAYERS = 12

_Plot = tuple[str, str, list[tuple[int, str]]]  # Its title, the drawing, and the colours and names of its lines.


@dataclass(frozen=True)
class LayerRow:
    """What a layer, several of them or what is none takes of an iteration.

    Attributes:
        percent: forward and backward; of what is no layer both in one.
    """

    name: str
    percent: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.percent)


@dataclass
class Run:
    """What a run's folder says: its log's lines by kind, the numbers of its end, its grids."""

    name: str
    number: int
    settings: dict[str, Any] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    figures: list[list[str]] = field(default_factory=list)
    layer_times: list[LayerRow] = field(default_factory=list)
    grids: list[tuple[int, str]] = field(default_factory=list)
    signs: str = ""

    @property
    def colour(self) -> int:
        return self.number % COLOURS

    @property
    def dashed(self) -> bool:
        """A second round of the colours is dashed."""
        return self.number >= COLOURS

    @property
    def images_per_step(self) -> int:
        """Of a step of one network, whose operations the log counts for one image; 0 where the log does not say."""
        batch, accumulate = (self.settings.get(name) for name in ("batch", "accumulate"))
        return batch * accumulate if isinstance(batch, int) and isinstance(accumulate, int) else 0

    def has(self, setting: str) -> bool:
        """Whether its method has the setting, as far as this ddst knows both."""
        option, method = OPTIONS.get(setting), self.settings.get("method")
        return option is None or option.methods is None or method not in METHODS or method in option.methods

    def series(self, name: str) -> tuple[list[float], list[float]]:
        return thinned([e["step"] for e in self.steps], [e.get(name) for e in self.steps])

    def line(self, name: str, colour: int) -> Line:
        return Line(*self.series(name), colour)


def report(folders: Sequence[Path], out: Path) -> None:
    """Write the page. It holds everything that it shows and asks no network for anything.

    Args:
        folders: of runs, finished or not. out: the page; it is replaced.

    Raises:
        ConfigError: a folder without a log of a run, or one that cannot be read; a page that cannot be, or whose name
            ends otherwise than in .html or .htm. OSError: writing broke off.
    """
    check_target("--out", out, ".html", ".htm")
    try:
        runs = [_read(folder, i) for i, folder in enumerate(folders)]
    except OSError as error:
        raise ConfigError(f"RUN cannot be read: {error.filename}: {error.strerror}") from None
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
    if not folder.is_dir():
        raise ConfigError(f"RUN {folder} is no folder of a run")
    if not (folder / LOG).is_file():
        raise ConfigError(f"RUN {folder} holds no {LOG} of a run")
    run, entries = Run(str(folder), number), list(read_log(folder / LOG))
    kinds = {None: run.steps, "metric": run.metrics, "densities": run.layers, "decision": run.decisions}
    for entry in entries:
        event = entry.get("event")
        if event == "start":
            run.settings, run.versions = dict(entry["settings"]), _dict(entry.get("versions"))
            run.rules = _dict(entry.get("rules"))
        elif event == "settings":
            run.settings |= entry["now"]
        elif event in kinds:
            kinds[event].append(entry)
    if not (run.settings or run.steps):
        raise ConfigError(f"RUN {folder}: {LOG} is no log of ddst train, none of its lines is one of a run")
    run.signs = _signs(run.settings, entries)
    if len(planned := lengths(entries)) > 1:
        run.settings["steps"] = ", then ".join(
            f"{total} from step {step} on" if step else f"{total}" for step, total in planned
        )
    summary = _json(folder / SUMMARY)
    # Of a run that goes on after its end, they are numbers of a time that is past.
    run.summary = summary if run.steps and summary.get("steps") == run.steps[-1]["step"] else {}
    run.layer_times = _layer_times(run.summary.get("layers"))
    judged = _json(folder / EVALUATION)
    figures = judged.get("figures")
    run.figures = [_figure(f, judged) for f in figures if isinstance(f, dict)] if isinstance(figures, list) else []
    run.decisions = [d for d in run.decisions if isinstance(d.get("reason"), str)]
    pictures = sorted((folder / SAMPLES).glob("step_*.png")) if (folder / SAMPLES).is_dir() else []
    numbered = [(int(path.stem[5:]), path) for path in pictures if path.stem[5:].isdecimal()]
    last = len(numbered) - 1
    chosen = sorted({round(i * last / (MOST_GRIDS - 1)) for i in range(MOST_GRIDS)}) if numbered else []
    run.grids = [(numbered[i][0], base64.b64encode(numbered[i][1].read_bytes()).decode()) for i in chosen]
    return run


def _signs(settings: dict[str, Any], entries: Sequence[dict[str, Any]]) -> str:
    """What the log of a whole run says of its collapse; nothing if its settings do not."""
    bounds, steps = settings.get("bounds"), settings.get("steps")
    if not (isinstance(steps, int) and isinstance(bounds, list) and [type(b) for b in bounds] == [float, float]):
        return ""
    return told(watched(entries, bounds, steps))


def _layer_times(said: Any) -> list[LayerRow]:
    """The layers that take most of an iteration, the others together, and what is of no layer; nothing if a run's
    summary does not say."""
    if not isinstance(said, list) or not said or not all(_is_layer_time(entry) for entry in said):
        return []
    rows = [LayerRow(f"{e['network']} {e['layer']}", (100 * e["forward"], 100 * e["backward"])) for e in said]
    rows.sort(key=lambda row: -row.total)
    most, others = rows[:MOST_LAYERS], rows[MOST_LAYERS:]
    if others:
        forward, backward = (sum(row.percent[i] for row in others) for i in range(2))
        most.append(LayerRow(f"{len(others)} others", (forward, backward)))
    rest = max(100 - sum(row.total for row in rows), 0.0)
    named = "of no layer, both ways: activations between layers, penalties, losses, optimizers, scheduler"
    return [*most, LayerRow(named, (rest,))]


def _is_layer_time(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), str) for key in ("network", "layer"))
        and all(isinstance(entry.get(key), float) and 0 <= entry[key] <= 1 for key in ("forward", "backward"))
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return _dict(json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _figure(said: dict[str, Any], judged: dict[str, Any]) -> list[str]:
    counts = [_number(said.get(name) or None, ",d") for name in ("samples", "real")]
    words = [str(said.get(name, "–")) for name in ("split", "resizer")]
    step = _number(judged.get("step"), ",")
    return [str(said.get("metric", "–")), _number(said.get("value"), ".4g"), step, *counts, *words]


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) and not isinstance(value, bool) else "–"


def _row(run: Run) -> list[str]:
    last = run.steps[-1] if run.steps else {}
    generator, discriminator = _dict(run.summary.get("generator")), _dict(run.summary.get("discriminator"))
    memory = [net.get(key, "") for key in ("state_bytes", "dense_state_bytes") for net in (generator, discriminator)]
    share = (memory[0] + memory[1]) / (memory[2] + memory[3]) if all(type(m) is int and m > 0 for m in memory) else None
    measured = [(m["metric"], m.get("samples"), m["value"]) for m in run.metrics if m["value"] is not None]
    metric = measured[-1][0] if measured else "–"
    values = [m[2] for m in measured if m[:2] == measured[-1][:2]]  # Figures of others are not smaller or larger.
    per_step = last["seconds"] / max(last["step"], 1) if isinstance(last.get("seconds"), int | float) else None
    timing = _dict(run.summary.get("timing"))
    both = all(isinstance(timing.get(key), float) and timing[key] > 0 for key in ("seconds", "dense"))
    held = all(type(timing.get(key)) is int and timing[key] > 0 for key in ("peak_bytes", "dense_peak_bytes"))
    return [
        str(run.settings.get("method", "–")),
        _number(last.get("step"), ",d"),
        _number(last.get("density_g"), ".3f"),
        _number(last.get("density_d"), ".3f"),
        str(metric),
        _number(values[-1] if values else None, ".1f"),
        _number(min(values) if values else None, ".1f"),
        _number(per_step, ".4f"),
        _number(timing["dense"] / timing["seconds"] if both else None, ".2f"),
        _number(run.summary.get("flops_ratio"), ".3f"),
        _number(share, ".3f"),
        _number(timing["peak_bytes"] / timing["dense_peak_bytes"] if held else None, ".3f"),
    ]


def _comparisons(runs: Sequence[Run]) -> list[_Plot]:
    """The metric over steps, seconds and counted operations of all images, every run that has it in its colour."""
    kinds = list(dict.fromkeys(m["metric"] for run in runs for m in run.metrics))
    plots: list[_Plot] = []
    for kind in kinds:
        for key, label, more in (
            ("step", "step", ""),
            ("seconds", "seconds of training", ""),
            ("flops", "counted operations", " (penalties not counted)"),
        ):
            lines, legend = [], []
            for run in runs:
                times = run.images_per_step if key == "flops" else 1
                points = [m for m in run.metrics if m["metric"] == kind and m.get(key) is not None and times]
                x, y = thinned([m[key] * times for m in points], [m["value"] for m in points])
                if x:
                    lines.append(Line(x, y, run.colour, "--" if run.dashed else "-"))
                    legend.append((run.colour, run.name + (" (dashed)" if run.dashed else "")))
            named = f"Embedded Fréchet distance of {kind}" if kind in TRAINED else str(kind).upper()
            title = f"{named} over {label}"
            plots.append((title, plot(f"{kind} {key}", lines, label + more, "distance", log_scale=True), legend))
    return [entry for entry in plots if entry[1]]


def _details(run: Run) -> list[_Plot]:
    """The plots of one run."""
    name = f"{run.name} {run.number}"
    steered, bounds = steered_by(run.settings) or ("", None)

    def signal(title: str, key: str, kind: str, label: str) -> _Plot:
        band = bounds if steered == kind else None
        svg = plot(f"{name} {key}", [run.line(key, 0)], "step", label, band=band)
        return title + (", with its bounds" if band else ""), svg, []

    def of_both(title: str, key: str, limits: tuple[float, float] | None) -> _Plot:
        both = [(run.line(f"{key}_g", 1), "generator"), (run.line(f"{key}_d", 0), "discriminator")]
        drawn = [(line, network) for line, network in both if line.x]
        svg = plot(f"{name} {key}", [line for line, _ in drawn], "step", key, limits=limits)
        return title, svg, [(line.colour, network) for line, network in drawn]

    found = [signal("Balance ratio", "balance_ratio", "balance_ratio", "balance ratio")]
    if steered == "real_sign":
        found.append(signal("Mean sign of D(x)", "mean_sign", steered, "mean sign of D(x)"))
    found += [of_both("Density", "density", (0, 1.05)), of_both("Losses", "loss", None)]
    for network in ("generator", "discriminator"):
        lines, legend = _layers(run, network)
        svg = plot(f"{name} {network}", lines, "step", "density", limits=(0, 1.05))
        found.append((f"Density of each layer of the {network}", svg, legend))
    return [entry for entry in found if entry[1]]


def _layers(run: Run, network: str) -> tuple[list[Line], list[tuple[int, str]]]:
    names = list(dict.fromkeys(name for entry in run.layers for name in _dict(entry.get(network))))
    lines, legend = [], []
    for i, name in enumerate(names):
        points = [
            (e["step"], e[network][name]) for e in run.layers if isinstance(_dict(e.get(network)).get(name), float)
        ]
        x, y = thinned([p[0] for p in points], [p[1] for p in points])
        if x:
            # A second round of the colours is dashed.
            lines.append(Line(x, y, i % COLOURS, "-" if i < COLOURS else "--"))
            legend.append((i % COLOURS, name + (" (dashed)" if i >= COLOURS else "")))
    return lines, legend


def _differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ, with a dash where a run's method does not have one."""
    differing = []
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values = [json.dumps(run.settings.get(name)) for run in runs]
        shown = [value if run.has(name) else "–" for run, value in zip(runs, values, strict=True)]
        if len(set(values)) > 1 and len(set(shown)) > 1:
            differing.append((name, shown))
    return differing
