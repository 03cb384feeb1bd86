"""Which configuration runs a problem: measured tables per device, and a default where nothing was measured.

``tables/<device>.json`` (written by ``python -m ddst.benchmarks tune``) holds, per (operator, shape class, block,
dtype, density bucket), the times of the candidates and where they come from. The fastest is chosen. A configuration
that :func:`.configs.candidates` does not list is not tested for exactness and never chosen, whatever a table says.

No table is in the repository, as none has been measured yet: everything runs with the defaults. These depend on the
bucket too (:func:`.configs.gather_default`), and a layer's first call compiles those of all buckets. What a table
chooses for another bucket is compiled at the first call there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from .configs import (
    GatherConfig,
    Problem,
    WeightGradConfig,
    candidates,
    density_bucket,
    gather_default,
    gather_runs,
    shape_class,
)

Config = GatherConfig | WeightGradConfig
Result = TypeVar("Result")

TABLES = Path(__file__).with_name("tables")
FORMAT = 1


def device_file(name: str) -> str:
    """File name of a device's table.

    >>> device_file("NVIDIA H200")
    'nvidia-h200.json'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


def candidates_for(problem: Problem) -> list[Config]:
    """What tuning may choose from for a problem, the default first; empty where there is no choice."""
    allowed = [c for c in candidates(problem.op, problem.dtype, problem.block) if runs(c, problem)]
    gathering = [c for c in allowed if isinstance(c, GatherConfig)]
    if gathering:
        default = gather_default(gathering, problem)
        allowed.sort(key=lambda config: config != default)  # stable
    return allowed


def defaults(problem: Problem) -> list[Config]:
    """The defaults at every density, that of the problem first."""
    all_blocks = math.prod(problem.grid)
    densities = (problem, *(problem._replace(blocks=blocks) for blocks in (0, all_blocks)))
    return list(dict.fromkeys(candidates_for(p)[0] for p in densities))


def runs(config: Config, problem: Problem) -> bool:
    """Whether a configuration can run a problem: some serve certain strides, kernels or channel counts only."""
    return not isinstance(config, GatherConfig) or gather_runs(config, problem)


def table_key(problem: Problem) -> tuple[str, str, str, str, float]:
    """What a table is asked by: operator, shape class, block, dtype, density bucket."""
    block = f"{problem.block[0]}x{problem.block[1]}"
    dtype = str(problem.dtype).removeprefix("torch.")
    return problem.op, shape_class(problem), block, dtype, density_bucket(problem.density)


class Table:
    """Measurements on one device: ``entries`` by :func:`table_key`, and the ``sources`` that they refer to."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.sources: list[dict[str, Any]] = []
        self.entries: dict[tuple[str, str, str, str, float], dict[str, Any]] = {}

    @staticmethod
    def load(path: Path) -> Table:
        """The table of a file.

        Raises:
            ValueError: a file of another format.
        """
        content = json.loads(path.read_text())
        if content.get("format") != FORMAT:
            raise ValueError(f"{path} must be a table of format {FORMAT}, got {content.get('format')!r}")
        table = Table(content["device"])
        table.sources = content["sources"]
        for line in content["entries"]:
            key = (line["op"], line["shape"], line["block"], line["dtype"], line["density"])
            table.entries[key] = {"source": line["source"], "measured": line["measured"]}
        return table

    def record(self, problem: Problem, measured: list[tuple[Config, float]], source: dict[str, Any]) -> None:
        """Adds (or replaces) the times of a problem's candidates.

        Args:
            measured: pairs of a configuration and its time in milliseconds.
            source: where they come from: driver and library versions, commit, date, command.

        Raises:
            ValueError: nothing measured, or a configuration that is no candidate.
        """
        allowed = candidates_for(problem)
        unknown = [config for config, _ in measured if config not in allowed]
        if unknown or not measured:
            raise ValueError(f"measured must hold candidates of the problem, got {unknown or 'none'}")
        if source not in self.sources:
            self.sources.append(source)
        times = [{"config": dataclasses.asdict(config), "ms": ms} for config, ms in measured]
        self.entries[table_key(problem)] = {"source": self.sources.index(source), "measured": times}

    def fastest(self, problem: Problem) -> Config | None:
        """The measured candidate of least time; None where there is none."""
        entry = self.entries.get(table_key(problem), {"measured": []})
        by_content = {_content(config): config for config in candidates_for(problem)}
        known = [(line["ms"], by_content.get(_content(line["config"]))) for line in entry["measured"]]
        return min(((ms, c) for ms, c in known if c is not None), key=lambda pair: pair[0], default=(0.0, None))[1]

    def save(self, path: Path) -> None:
        """Writes the table to a file, all or nothing."""
        names = ("op", "shape", "block", "dtype", "density")
        lines = [dict(zip(names, key, strict=True)) | entry for key, entry in sorted(self.entries.items())]
        content = {"format": FORMAT, "device": self.device, "sources": self.sources, "entries": lines}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            partial.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _content(config: Config | dict[str, Any]) -> str:
    """A configuration in one line, the same for an object and for what JSON makes of it."""
    return json.dumps(config if isinstance(config, dict) else dataclasses.asdict(config), sort_keys=True)


@functools.cache
def table_of(device: str) -> Table:
    """The table of a device model: its file, or an empty one."""
    path = TABLES / device_file(device)
    return Table.load(path) if path.is_file() else Table(device)


@functools.cache
def device_name(index: int) -> str:
    """Model of a CUDA device; "cpu" for -1, where the interpreter runs."""
    return torch.cuda.get_device_name(index) if index >= 0 else "cpu"


_remembered: list[Any] = []


def remember(chooses: Callable[..., Result]) -> Callable[..., Result]:
    """A cache for a function whose results depend on the tables: emptied when something is recorded."""
    cached = functools.lru_cache(maxsize=4096)(chooses)
    _remembered.append(cached)
    return cached


@remember
def choose(problem: Problem, device: str) -> Config:
    """The configuration that runs a problem on a device model: the fastest measured one, else the default.

    Raises:
        ValueError: an operator without configurations.
    """
    allowed = candidates_for(problem)
    if not allowed:
        raise ValueError(f"{problem.op} has no configurations to choose from")
    return table_of(device).fastest(problem) or allowed[0]


def record(problem: Problem, measured: list[tuple[Config, float]], source: dict[str, Any], device: str) -> None:
    """:meth:`Table.record` in the table of a device model; what runs from now on chooses by it."""
    table_of(device).record(problem, measured, source)
    for cached in _remembered:
        cached.cache_clear()


def save(device: str, path: Path | None = None) -> Path:
    """Writes the table of a device model, by default into the package, and returns where."""
    path = path or TABLES / device_file(device)
    table_of(device).save(path)
    return path
