"""Rows, and what is made of them: text, file, Markdown, picture."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddst.benchmarks import picture, report, runner
from ddst.benchmarks.problem import PASSES, Problem
from ddst.benchmarks.registry import LAYERS, Case, Layer
from ddst.benchmarks.runner import Settings
from ddst.measure import Peak

SMALL = Layer(16, 32, 3, 6)
LINEAR = Layer(32, 32)
SETTINGS = Settings(repeats=2)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in (SMALL, LINEAR):
        monkeypatch.setitem(LAYERS, layer.name, layer)
    for module in (runner, report):
        monkeypatch.setattr(module, "peak", lambda *_: Peak(1e11, 1e10))


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    """A kept run as it is read back: two densities of one layer, and one row that was wrong."""

    def row(density: float, ratio: float) -> dict[str, Any]:
        case = {"op": "conv2d", "layer": "conv3x3-64-64-8", "batch": 16, "density": density, "block": [16, 16]}
        spread = {"median": ratio, "low": ratio - 0.1, "high": ratio + 0.1}
        dense = {"seconds": 0.004, "layout": "nchw", "peak_share": 0.8, "speedup": spread}
        figures = {"seconds": 0.001, "floor": 0.0005, "peak_share": 0.5, "bandwidth_share": 0.25}
        full = {**figures, "baselines": {"dense": dense}}
        passes = dict.fromkeys(PASSES, full)
        return {**case, "mask": "random", "wrong": [], "passes": passes, "step": {**full, "ceiling": 2 * ratio}}

    wrong = {**row(0.5, 1.0), "wrong": ["dgrad (error 1e+00)"]}
    machine = {"cpu": "a processor", "cores": 2, "capability": "avx2", "device": "cpu"}
    machine |= {"peak_gflops": 100.0, "bandwidth_gbytes": 20.0}
    head = {"date": "2026-01-01", "commit": "abc", "versions": {"torch": "2.13.0"}, "settings": vars(Settings())}
    return {**head, "machine": machine, "rows": [row(0.3, 3.2), row(0.1, 8.0), wrong]}


def test_a_convolution_row_holds_every_pass_and_the_step() -> None:
    row = runner.measure(Case("conv2d", SMALL.name, 2, 0.5, baselines=("dense", "masked")), SETTINGS)
    assert row["wrong"] == []
    assert list(row["passes"]) == list(PASSES)
    for figures in (*row["passes"].values(), row["step"]):
        assert {"seconds", "floor", "peak_share", "bandwidth_share"} <= figures.keys()
        assert set(figures["baselines"]) == {"dense", "masked"}
        ratio = figures["baselines"]["dense"]["speedup"]
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
    assert {row["passes"][p]["baselines"]["dense"]["layout"] for p in PASSES} <= {"nchw", "channels_last"}
    floors = [row["passes"][p]["floor"] for p in PASSES]
    assert row["step"]["floor"] == pytest.approx(sum(floors))
    assert row["step"]["ceiling"] == row["step"]["baselines"]["dense"]["seconds"] / row["step"]["floor"]
    json.dumps(row)


def test_nchw_rows_show_the_cost_of_the_layout_changes() -> None:
    row = runner.measure(Case("conv2d", SMALL.name, 2, 0.5), Settings(repeats=1, layout="nchw"))
    assert "converted" in row["step"]["baselines"]


def test_baselines_that_torch_does_not_have_are_named() -> None:
    row = runner.measure(Case("linear", LINEAR.name, 4, 0.5, baselines=("dense", "bsr", "csr")), SETTINGS)
    assert "torch has none" in row["passes"]["wgrad"]["baselines"]["bsr"]["missing"]
    assert set(row["step"]["baselines"]) == {"dense", "csr"}  # the sum of three passes needs all three
    assert "bsr none" in report.text_of(row)


def test_wrong_rows_are_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Problem.packed

    def broken(self: Problem) -> list[Any]:
        forward, dgrad, wgrad = right(self)
        return [forward, lambda: dgrad() * 1.01, wgrad]

    def no_timing(*_: object) -> None:
        raise AssertionError("a wrong row was timed")

    monkeypatch.setattr(Problem, "packed", broken)
    monkeypatch.setattr(runner, "interleaved", no_timing)
    row = runner.measure(Case("conv2d", SMALL.name, 2, 0.5), SETTINGS)
    assert [why.split()[0] for why in row["wrong"]] == ["dgrad"]
    assert "step" not in row
    assert "WRONG, not timed: dgrad" in report.text_of(row)


def test_wrong_baselines_are_not_timed_either(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Problem.masked
    monkeypatch.setattr(Problem, "masked", lambda self, last: [lambda: torch.zeros(1), *right(self, last)[1:]])
    row = runner.measure(Case("conv2d", SMALL.name, 2, 0.5, baselines=("dense", "masked")), SETTINGS)
    assert row["passes"]["forward"]["baselines"]["masked"]["missing"].startswith("wrong")
    assert "masked" not in row["step"]["baselines"]


def test_facts_name_machine_commit_and_versions() -> None:
    known = report.facts(SETTINGS)
    assert known["machine"]["cpu"]
    assert known["machine"]["cores"] >= 1
    assert known["versions"]["torch"] == torch.__version__
    assert known["commit"]
    assert known["settings"]["repeats"] == 2


def test_a_run_is_kept_and_read_back(run: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "results" / "run.json"
    rows = run["rows"]
    report.save(file, {key: value for key, value in run.items() if key != "rows"}, rows)
    assert report.load(file) == report.rounded(run)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json"):
        report.load(tmp_path / "other.json")


def test_text_has_a_line_a_pass(run: dict[str, Any]) -> None:
    lines = report.text_of(run["rows"][0]).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("conv3x3-64-64-8")
    assert "3.20x [3.10, 3.30] of 6.4x" in lines[3]


def test_markdown_has_a_line_a_layer_and_a_column_a_density(run: dict[str, Any]) -> None:
    lines = report.markdown(run).splitlines()
    assert lines[0] == "| layer | batch | block | mask | 10 % | 30 % | 50 % |"
    assert lines[1].count("|") == lines[0].count("|")
    assert lines[2] == "| conv3x3-64-64-8 | 16 | 16x16 | random | 8.00× (16.0) | 3.20× (6.4) | wrong |"
    for fact in ("a processor", "avx2", "1 thread", "abc", "2.13.0", "2026-01-01"):
        assert fact in lines[-1]


def test_the_table_replaces_what_stands_between_the_markers(run: dict[str, Any], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    begin, end = report.MARKERS
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for _ in range(2):
        report.insert(readme, "| new |")
        assert readme.read_text() == f"before\n{begin}\n| new |\n{end}\nafter\n"
    readme.write_text("no markers\n")
    with pytest.raises(ValueError, match="benchmarks: begin"):
        report.insert(readme, "| new |")
    assert readme.read_text() == "no markers\n"


def test_the_picture_has_a_panel_a_layer_and_leaves_wrong_rows_out(run: dict[str, Any], tmp_path: Path) -> None:
    found = picture.panels(run["rows"])
    assert list(found) == ["conv3x3-64-64-8"]
    (curve,) = found["conv3x3-64-64-8"].values()
    assert [row["density"] for row in curve] == [0.1, 0.3]
    picture.draw(run, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    nothing = {**copy.deepcopy(run), "rows": run["rows"][2:]}
    with pytest.raises(ValueError, match="no row"):
        picture.draw(nothing, tmp_path / "none.png")
