"""Rows as text, as a file to keep (with machine, commit and versions), and as the README's table."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import ddst
from ddst._extension import cpu_capability
from ddst.benchmarks.runner import Row, Settings
from ddst.measure import peak

PEER_MARKERS = ("<!-- peers: begin -->", "<!-- peers: end -->")  # of a run that also measured other packages
PACKAGES = {"sparseprop": "SparseProp", "sparselab": "SparseLab"}
MARKERS = ("<!-- benchmarks: begin -->", "<!-- benchmarks: end -->")
ROOT = Path(ddst.__file__).resolve().parents[1]
HEAD = (
    f"{'layer':<24} batch dens. block {'mask':<6} {'pass':<8}     ms  floor  peak   bw | "
    "dense ms  peak  speed-up [10 %, 90 %] | other baselines"
)


def facts(settings: Settings, device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on: machine, commit, versions, measured peak."""
    torch.set_num_threads(settings.threads)
    best = peak(device)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "capability": cpu_capability(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "peak_gflops": round(best.flops / 1e9, 1),
            "bandwidth_gbytes": round(best.bandwidth / 1e9, 1),
        },
        "commit": commit(),
        "versions": {"ddst": ddst.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "settings": vars(settings),
    }


def keep_freed_memory() -> str:
    """`ddst.keep_freed_memory`, which treats all programs that are compared alike; what it did, for the record."""
    return "freed memory is kept (M_MMAP_MAX=0, M_TRIM_THRESHOLD=2^31-1)" if ddst.keep_freed_memory() else "default"


def cpu_model() -> str:
    """The processor's name: of /proc/cpuinfo the model, with family and model number, which cloud names leave out."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    numbers = [f"{key} {known[name]}" for key, name in (("family", "cpu family"), ("model", "model")) if name in known]
    return " ".join([known.get("model name", platform.machine()), *([f"({', '.join(numbers)})"] if numbers else [])])


def commit() -> str:
    """Commit of the sources, "+" added where they have changed since, or "unknown"."""
    try:
        said = [
            subprocess.run(["git", "-C", str(ROOT), *what], capture_output=True, text=True, check=True).stdout.strip()
            for what in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", "csrc", "ddst"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said[0] + ("+" if said[1] else "")


def save(file: Path, known: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes a run as JSON, one row a line."""
    lines = ",\n".join(f"  {json.dumps(rounded(row))}" for row in rows)
    head = json.dumps(known, indent=1)[:-2]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')


def load(file: Path) -> dict[str, Any]:
    """Reads what `save` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    run = json.loads(file.read_text())
    if not isinstance(run, dict) or not {"machine", "commit", "versions", "settings", "rows"} <= run.keys():
        raise ValueError(f"{file} is no run of the benchmarks")
    return run


def rounded(value: Any) -> Any:
    """Floats of a nested value to four digits.

    >>> rounded({"a": [1.23456, 2]})
    {'a': [1.235, 2]}
    """
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def text_of(row: Row) -> str:
    """A row as lines of text: one a pass and one for the step, or one that says what is wrong."""
    block = f"{row['block'][0]}x{row['block'][1]}"
    head = f"{row['layer']:<24} {row['batch']:>5} {100 * row['density']:4g}% {block:<5} {row['mask']:<6}"
    if row["wrong"]:
        return f"{head} WRONG, not timed: {', '.join(row['wrong'])}"
    parts = [*row.get("passes", {}).items(), ("step", row["step"])]
    lines = [f"{head} {_figures(name, figures)}" for name, figures in parts]
    return "\n".join([lines[0], *(" " * len(head) + line[len(head) :] for line in lines[1:])])


def _figures(name: str, figures: dict[str, Any]) -> str:
    def percent(key: str, of: dict[str, Any]) -> str:
        return f"{100 * of[key]:4.0f}%" if key in of else "    -"

    floor = f"{1e3 * figures['floor']:6.3f}" if "floor" in figures else "     -"
    cells = f"{name:<8} {1e3 * figures['seconds']:6.3f} {floor} {percent('peak_share', figures)} "
    cells += percent("bandwidth_share", figures)
    baselines = dict(figures["baselines"])
    dense = baselines.pop("dense", None)
    if dense is not None and "speedup" in dense:
        ratio = dense["speedup"]
        layout = {"nchw": "n", "channels_last": "c"}.get(dense.get("layout", ""), " ")
        cells += f" | {1e3 * dense['seconds']:7.3f}{layout} {percent('peak_share', dense)} "
        cells += f"{ratio['median']:6.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        if "ceiling" in figures:
            cells += f" of {figures['ceiling']:.1f}x"
    if "update_iterations" in figures:
        cells += f", a topology update adds {figures['update_iterations']['median']:.2f} iterations"
    others = [_other(k, b) for k, b in baselines.items()]
    return f"{cells} | {', '.join(others)}" if others else cells


def _other(name: str, figures: dict[str, Any]) -> str:
    """A baseline that is not dense torch: our speed-up over it, and of another package that over dense."""
    if "speedup" not in figures:
        return f"{name} none" + (f" ({figures['missing']})" if name in PACKAGES else "")
    text = f"{name} {figures['speedup']['median']:.2f}x"
    return text + (f" (itself {figures['of_dense']['median']:.2f}x dense)" if "of_dense" in figures else "")


def markdown(run: dict[str, Any]) -> str:
    """The README's table of a run: speed-up of a training step over dense, a line a layer, a column a density."""
    densities = sorted({row["density"] for row in run["rows"]})
    lines = [
        "| layer | batch | block | mask | " + " | ".join(f"{100 * d:g} %" for d in densities) + " |",
        "| --- " * (4 + len(densities)) + "|",
    ]
    table: dict[tuple[Any, ...], dict[float, str]] = {}
    for row in run["rows"]:
        key = (row["layer"], row["batch"], f"{row['block'][0]}x{row['block'][1]}", row["mask"])
        table.setdefault(key, {})[row["density"]] = _cell(row)
        for name, cell in _package_cells(row):
            table.setdefault((f"{row['layer']}, {name}", *key[1:]), {})[row["density"]] = cell
    for key, cells in table.items():
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells.get(d, '') for d in densities)} |")
    machine, settings = run["machine"], run["settings"]
    where = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    lines += [
        "",
        f"Training step (forward, input gradient, weight gradient; for a GAN a whole iteration) against dense torch in "
        f"the faster of NCHW and channels_last for every pass: median of {settings['repeats']} paired "
        f"ratios of {settings['clock']} time, in "
        f"brackets what the floor allows. {where}, {machine['capability']}, {settings['threads']} thread(s), measured "
        f"peak {machine['peak_gflops']:g} GFLOP/s and {machine['bandwidth_gbytes']:g} GB/s; torch "
        f"{run['versions']['torch']}, commit {run['commit']}, {run['date']}; allocator: "
        f"{run.get('allocator', 'the C library, as it is')}.",
    ]
    return "\n".join(lines)


def _package_cells(row: Row) -> Iterator[tuple[str, str]]:
    """Other packages in a row: name with version, and its step's speed-up over dense torch."""
    for name, figures in row.get("step", {}).get("baselines", {}).items():
        if "of_dense" in figures:
            yield f"{PACKAGES[name]} {figures['version']}", f"{figures['of_dense']['median']:.2f}×"


def _cell(row: Row) -> str:
    if row["wrong"]:
        return "wrong"
    dense = row["step"]["baselines"].get("dense")
    if dense is None:
        return ""
    ratio = dense["speedup"]["median"]
    ceiling = row["step"].get("ceiling")
    return f"{ratio:.2f}×" + (f" ({ceiling:.1f})" if ceiling else "")


def check_markers(readme: Path, markers: tuple[str, str] = MARKERS) -> str:
    """The text of a file that a table can be put into.

    Raises:
        ValueError: the file does not hold the two markers, once each and in order.
    """
    text = readme.read_text()
    first, second = (text.find(marker) for marker in markers)
    if not 0 <= first < second or any(text.count(marker) != 1 for marker in markers):
        raise ValueError(f"{readme} must hold the lines {markers[0]} and {markers[1]}, once each")
    return text


def insert(readme: Path, table: str, markers: tuple[str, str] = MARKERS) -> None:
    """Replaces what stands between the two markers of a file.

    Raises:
        ValueError: the file does not hold the two markers, once each and in order.
    """
    text = check_markers(readme, markers)
    before, after = text.partition(markers[0])[0], text.partition(markers[1])[2]
    readme.write_text(f"{before}{markers[0]}\n{table}\n{markers[1]}{after}")
