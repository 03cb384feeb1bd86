"""Other packages as baselines: right before they are timed, on the same weights, and left out where they are not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ddst import topology
from ddst.benchmarks import __main__ as command
from ddst.benchmarks import peers, registry, report, runner
from ddst.benchmarks.peers import Peer
from ddst.benchmarks.problem import Problem
from ddst.benchmarks.registry import Case
from ddst.benchmarks.runner import Settings
from ddst.measure import Peak

CONV, LINEAR = "conv3x3-32-16-6", "linear-32-48"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (runner, report):
        monkeypatch.setattr(module, "peak", lambda *_: Peak(1e11, 1e10))


def case_of(layer: str, *names: str) -> Case:
    (case,) = registry.cases(
        [layer], batches=[16], densities=[0.5], blocks=[(16, 16)], masks=["random"], baselines=["dense", *names]
    )
    return case


def dense_peer(problem: Problem, factor: float = 1.0) -> list[Peer]:
    """A package that computes densely, and is wrong by a factor in its weight gradient."""
    weight = problem.weight.clone().requires_grad_()
    function = (
        (lambda x: F.linear(x, weight)) if problem.layer.op == "linear" else lambda x: F.conv2d(x, weight, None, 1, 1)
    )
    return [Peer(function, weight, lambda gradient: gradient * factor)]


@pytest.mark.parametrize("layer", [CONV, LINEAR])
def test_a_package_has_a_step_beside_ours_and_beside_dense(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.MAKERS, "sparseprop", dense_peer)
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: "9.9")
    row = runner.measure(case_of(layer, "sparseprop"), Settings(repeats=2))
    figures = row["step"]["baselines"]["sparseprop"]
    assert row["baselines"] == ["dense", "sparseprop"]
    assert figures["version"] == "9.9"
    assert figures["seconds"] > 0 < figures["speedup"]["median"]
    assert figures["of_dense"]["low"] <= figures["of_dense"]["median"]
    assert "sparseprop" not in row["passes"]["forward"]["baselines"]
    assert "x dense)" in report.text_of(row)
    known: dict[str, Any] = report.facts(Settings(repeats=2))
    lines = report.markdown({**known, "rows": [row]}).splitlines()
    assert lines[3].startswith(f"| {layer}, SparseProp 9.9 | 16 | 16x16 | random | ")


@pytest.mark.parametrize("layer", [CONV, LINEAR])
def test_a_wrong_package_is_not_timed(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.MAKERS, "sparseprop", lambda problem: dense_peer(problem, 1.001))
    row = runner.measure(case_of(layer, "sparseprop"), Settings(repeats=1))
    assert row["step"]["baselines"]["sparseprop"]["missing"].startswith("wrong: wgrad (error ")
    assert "sparseprop none (wrong: wgrad" in report.text_of(row)


def test_packages_are_measured_where_they_are_named_only() -> None:
    (case,) = registry.cases([CONV], batches=[16], densities=[0.5], blocks=[(16, 16)], masks=["random"])
    assert case.baselines == registry.BASELINES["conv2d"]
    assert case_of(LINEAR, "sparseprop", "sparselab").baselines == ("dense", "sparseprop", "sparselab")
    assert case_of(CONV, "sparselab").baselines == ("dense",)  # it has no convolution


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sparselab", None)
    line = [
        "--layer",
        LINEAR,
        "--density",
        "0.5",
        "--batch",
        "16",
        "--repeats",
        "1",
        "--baseline",
        "dense",
        "sparselab",
    ]
    assert command.main(line) == 0
    assert "sparselab none (sparselab is not installed)" in capsys.readouterr().out


def test_the_table_of_a_run_with_other_packages_has_a_place_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(peers.MAKERS, "sparseprop", dense_peer)
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: "9.9")
    kept, readme = tmp_path / "run.json", tmp_path / "README.md"
    readme.write_text("\n".join(["top", *report.MARKERS, *report.PEER_MARKERS, "end"]))
    line = ["--layer", CONV, "--density", "0.5", "--batch", "16", "--repeats", "1"]
    assert command.main([*line, "--baseline", "dense", "sparseprop", "--json", str(kept)]) == 0
    assert command.main(["table", str(kept), "--readme", str(readme)]) == 0
    before, after = readme.read_text().split(report.PEER_MARKERS[0])
    assert before.splitlines() == ["top", *report.MARKERS]
    assert f"| {CONV}, SparseProp 9.9 | 16 |" in after


def test_what_a_package_cannot_do_is_said() -> None:
    case = case_of(LINEAR, "sparselab")
    with torch.no_grad():
        problem = Problem.make(Case(**{**vars(case), "dtype": "float64"}))
        assert peers.measure("sparselab", problem, [], [], 1, lambda: 0.0) == {"missing": "float32 on the CPU only"}


@pytest.mark.parametrize(
    "name, layer",
    [("sparseprop", CONV), ("sparseprop", "conv3x3s2-16-16-8"), ("sparseprop", LINEAR), ("sparselab", LINEAR)],
)
def test_the_packages_compute_what_we_do(name: str, layer: str) -> None:
    pytest.importorskip(name)
    problem = Problem.make(case_of(layer, name))
    with torch.no_grad():
        expected = problem.expected()
        for peer in peers.MAKERS[name](problem):
            assert peer.wrong(problem, expected) == []
            dense = peer.to_dense(peer.step(problem.input, problem.grad_output)[2])
            assert topology.pack(dense, problem.mask, problem.block).abs().max() > 0
