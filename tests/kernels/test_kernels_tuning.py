"""Tuning tables: what is measured is chosen, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ddst.kernels import tuning
from ddst.kernels.configs import Problem, WeightGradConfig
from ddst.kernels.tuning import Table

ONE = (1, 1)
PROBLEM = Problem(
    "weight_grad", False, torch.bfloat16, (16, 16), (256, 256, 3, 3), ONE, ONE, ONE, 64, (32, 32), (32, 32), 230
)
GATHER = PROBLEM._replace(op="forward")
SOURCE = {"device": "Device 1", "triton": "3.6.0", "commit": "abc", "date": "2025-01-01", "command": "tune"}


@pytest.fixture(autouse=True)
def _tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder without tables, and nothing remembered."""

    def forget() -> None:
        tuning.table_of.cache_clear()
        tuning.choose.cache_clear()

    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    forget()
    yield
    forget()


def times(problem: Problem, fastest: int) -> list[tuple[Any, float]]:
    """A measurement of all candidates in which one of them wins."""
    return [(c, 1.0 if i == fastest else 2.0 + i) for i, c in enumerate(tuning.candidates_for(problem))]


def test_without_a_table_the_default_runs() -> None:
    for problem in (PROBLEM, GATHER):
        assert tuning.choose(problem, "Device 1") == tuning.candidates_for(problem)[0]
    with pytest.raises(ValueError, match="block_scores has no configurations"):
        tuning.choose(PROBLEM._replace(op="block_scores"), "Device 1")


def test_the_fastest_is_chosen_and_survives_the_file() -> None:
    for problem in (PROBLEM, GATHER):
        wanted = tuning.candidates_for(problem)[2]
        tuning.record(problem, times(problem, fastest=2), SOURCE, "Device 1")
        assert tuning.choose(problem, "Device 1") == wanted
        assert tuning.choose(problem, "Device 2") != wanted
        similar = problem._replace(images=60, blocks=200)
        assert tuning.choose(similar, "Device 1") == wanted
        assert tuning.choose(problem._replace(blocks=2000), "Device 1") != wanted
    path = tuning.save("Device 1")
    assert path.name == "device-1.json"
    tuning.table_of.cache_clear()
    tuning.choose.cache_clear()
    for problem in (PROBLEM, GATHER):
        assert tuning.choose(problem, "Device 1") == tuning.candidates_for(problem)[2]
    assert Table.load(path).sources == [SOURCE]


def test_provenance_and_every_time_are_kept() -> None:
    tuning.record(PROBLEM, times(PROBLEM, fastest=1), SOURCE, "Device 1")
    tuning.record(GATHER, times(GATHER, fastest=1), SOURCE | {"commit": "def"}, "Device 1")
    content = json.loads(tuning.save("Device 1").read_text())
    assert content["device"] == "Device 1"
    lines = {line["op"]: line for line in content["entries"]}
    assert content["sources"][lines["weight_grad"]["source"]] == SOURCE
    assert content["sources"][lines["forward"]["source"]]["commit"] == "def"
    assert len(lines["weight_grad"]["measured"]) == len(tuning.candidates_for(PROBLEM))
    assert lines["weight_grad"]["measured"][1] == {
        "config": dataclasses.asdict(tuning.candidates_for(PROBLEM)[1]),
        "ms": 1.0,
    }


def test_an_untested_configuration_is_never_chosen() -> None:
    """Neither recorded, nor taken from a file that claims it is fastest."""
    untested = WeightGradConfig("row", 4, pixels=256, warps=8)
    with pytest.raises(ValueError, match="candidates of the problem"):
        tuning.record(PROBLEM, [(untested, 0.1)], SOURCE, "Device 1")
    with pytest.raises(ValueError, match="got none"):
        tuning.record(PROBLEM, [], SOURCE, "Device 1")
    tuning.record(PROBLEM, times(PROBLEM, fastest=3), SOURCE, "Device 1")
    path = tuning.save("Device 1")
    content = json.loads(path.read_text())
    measured = content["entries"][0]["measured"]
    for claimed in (dataclasses.asdict(untested), {"by": "row"}, {"nonsense": 1}):
        measured.append({"config": claimed, "ms": 0.01})
    path.write_text(json.dumps(content))
    tuning.table_of.cache_clear()
    tuning.choose.cache_clear()
    assert tuning.choose(PROBLEM, "Device 1") == tuning.candidates_for(PROBLEM)[3]
    content["entries"][0]["measured"] = measured[-3:]
    path.write_text(json.dumps(content))
    tuning.table_of.cache_clear()
    tuning.choose.cache_clear()
    assert tuning.choose(PROBLEM, "Device 1") == tuning.candidates_for(PROBLEM)[0]


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "device-1.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"device-1.json must be a table of format 1, got 99"):
        tuning.choose(PROBLEM, "Device 1")


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure before the end leaves the former file, and no rubbish beside it."""
    tuning.record(PROBLEM, times(PROBLEM, fastest=1), SOURCE, "Device 1")
    path = tuning.save("Device 1")
    before = path.read_text()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tuning.save("Device 1")
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["device-1.json"]
