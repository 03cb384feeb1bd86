"""The table of `make bench`: its commands exist, its figures are read from what they keep; it fails when it must."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from ddst.benchmarks import __main__ as command
from ddst.benchmarks import goals, registry, report
from ddst.measure import Peak

if importlib.util.find_spec("ddst.train") is None:
    pytest.skip("this build holds no training", allow_module_level=True)
from ddst.benchmarks import biggan_iteration, freed_memory, memory, operator_share
from ddst.benchmarks.goals import GOALS

PARSERS = {
    "--memory": memory.parser,
    "operator-share": operator_share.parser,
    "freed-memory": freed_memory.parser,
    "biggan-iteration": biggan_iteration.parser,
}
#: The same commands at sizes that take seconds.
SMALL = {
    "memory-64": "--memory --layer tiny --batch 2 --block 8x8 --density 0.5 --repeats 1 --rows sparse-fused",
    "iteration": "--layer tiny --batch 2 --block 8x8 --density 0.1 0.3 --repeats 1",
    "share": "operator-share --layer tiny --batch 2 --block 8x8 --density 0.5 --repeats 1",
    "step": "freed-memory --channels 16 --size 4 --batch 2 --density 0.5 --repeats 1",
    "linear": "--layer linear-32-48 --density 0.1 --batch 2 --repeats 1 --baseline dense",
    "biggan": "biggan-iteration --width 8 --batch 2 --block 8x8 --density 0.5 --repeats 1",
}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.GANS, "tiny", {"preset": "sngan32", "resolution": 8, "width_g": 16, "width_d": 16})
    monkeypatch.setattr(report, "peak", lambda *_: Peak(1e11, 1e10))
    # A process for each; no figure is read from the last one.
    monkeypatch.setattr(freed_memory, "ROWS", dict(list(freed_memory.ROWS.items())[:3]))


def kept(line: str, folder: Path) -> dict[str, Any]:
    file = folder / "run.json"
    assert command.main([*line.split(), "--json", str(file)]) == 0
    return report.load(file)


@pytest.mark.parametrize("name", GOALS)
def test_the_commands_of_a_goal_are_ones(name: str) -> None:
    goal = GOALS[name]
    words = goal.arguments.split()
    if words[0] in PARSERS:
        PARSERS[words[0]]().parse_args(words[1:])
    else:
        assert command.chosen_cases(command.parser().parse_args(words))
    if goal.compared:
        assert command.chosen_cases(command.parser().parse_args([*goal.compared.split(), "--against", "HEAD"]))


@pytest.mark.parametrize("name", SMALL)
def test_figures_are_read_from_what_their_commands_keep(name: str, tmp_path: Path) -> None:
    run = kept(SMALL[name], tmp_path)
    for figure in GOALS[name].figures:
        assert figure.read(run) > 0
    lines = goals.lines_of(GOALS[name], run)
    assert len(lines) == len(GOALS[name].figures)
    assert all(line.count("|") == 7 for line in lines)


def test_a_figure_says_whether_it_is_reached() -> None:
    (memory_goal,), (share,) = GOALS["memory-64"].figures, GOALS["share"].figures
    assert memory_goal.reached(0.5)
    assert not memory_goal.reached(0.51)
    assert share.reached(25.0)
    assert GOALS["biggan"].figures[0].reached(6.0)
    assert not GOALS["biggan"].figures[0].reached(5.9)


def test_a_command_runs_in_a_process_of_its_own_and_its_errors_are_told(tmp_path: Path) -> None:
    line = "--layer linear-32-48 --density 0.1 --batch 2 --repeats 1 --baseline dense"
    run = goals.kept_run(line.split(), tmp_path)
    assert isinstance(run, dict)
    assert run["rows"][0]["layer"] == "linear-32-48"
    told = goals.kept_run(["--layer", "conv9"], tmp_path)
    assert isinstance(told, str)
    assert "conv9" in told


def built(ratio: float) -> dict[str, Any]:
    figures = {"baselines": {"build": {"ratio": {"median": ratio, "low": ratio, "high": ratio}}}}
    row = {"layer": "sngan32", "density": 0.1, "passes": {}, "step": figures, "wrong": []}
    return {"rows": [{**row, "peak": {"bytes": 1, "other": 1, "ratio": 1.0}}]}


@pytest.mark.parametrize("ratio, code", [(1.09, 0), (1.11, 1)])
def test_what_falls_behind_another_build_fails(
    ratio: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missed = {"rows": [{"share": 0.5, "wrong": []}]}
    monkeypatch.setattr(goals, "kept_run", lambda line, folder: built(ratio) if "--against" in line else missed)
    # A goal that is missed is no failure.
    assert goals.main(["--only", "share"]) == 0
    assert "| no |" in capsys.readouterr().out
    monkeypatch.setitem(GOALS, "share", goals.Goal("operator-share", GOALS["share"].figures, "--layer sngan32"))
    assert goals.main(["--only", "share", "--against", "main"]) == code
    printed = capsys.readouterr().out
    assert ("step of sngan32 at 10 %: x1.110" in printed) == bool(code)


def test_memory_that_grows_beside_another_build_fails() -> None:
    run = built(1.0)
    run["rows"][0]["peak"]["ratio"] = 1.2
    assert goals.behind(run) == ["peak memory of sngan32 at 10 %: x1.200"]


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(goals, "kept_run", lambda line, folder: "wrong: gradient of blocks.0.conv1")
    assert goals.main(["--only", "share"]) == 1
    assert "share: wrong: gradient of blocks.0.conv1" in capsys.readouterr().out
