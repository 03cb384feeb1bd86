"""The command line, and the comparison of two libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddst._extension import LIBRARY
from ddst.benchmarks import __main__ as command
from ddst.benchmarks import against, report, runner
from ddst.benchmarks.registry import LAYERS, QUICK, Case, Layer
from ddst.benchmarks.runner import Settings
from ddst.measure import Peak

SMALL = Layer(16, 32, 3, 6)
LINE = ["--layer", SMALL.name, "--density", "0.5", "--batch", "2", "--repeats", "1"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, SMALL.name, SMALL)
    for module in (runner, report):
        monkeypatch.setattr(module, "peak", lambda *_: Peak(1e11, 1e10))


def test_a_run_prints_a_table_and_keeps_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, drawn = tmp_path / "run.json", tmp_path / "run.png"
    assert command.main([*LINE, "--baseline", "dense", "--json", str(kept), "--picture", str(drawn)]) == 0
    printed = capsys.readouterr().out
    assert f"{SMALL.name:<24}     2   50% 16x16 random forward" in printed
    (row,) = report.load(kept)["rows"]
    assert (row["layer"], row["baselines"], row["device"]) == (SMALL.name, ["dense"], "cpu")
    assert f"allocator: {report.load(kept)['allocator']}" in printed
    assert drawn.stat().st_size > 0
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(report.MARKERS))
    assert command.main(["table", str(kept), "--readme", str(readme)]) == 0
    assert f"| {SMALL.name} | 2 | 16x16 | random |" in readme.read_text()
    assert command.main(["table", str(kept)]) == 0
    assert SMALL.name in capsys.readouterr().out


def test_wrong_rows_make_the_command_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measure", lambda case, _: wrong_row(case))
    assert command.main(LINE) == 1


def wrong_row(case: Case) -> dict[str, Any]:
    return {**vars(case), "wrong": ["forward (error 1e+00)"]}


def test_without_a_layer_it_is_the_quick_selection(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(case) for case in QUICK]
    assert command.main(["--list", "--layer", "all", "--op", "linear", "--block", "16x16", "32x32"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert all(line.startswith("linear") for line in listed)
    assert any("32x32" in line for line in listed)


@pytest.mark.parametrize(
    "line, message",
    [
        (["--layer", "conv9"], "conv9"),
        (["--block", "16"], "16x16"),
        (["--block", "128x16"], "128x16"),
        (["--density", "0"], "density"),
        (["--threads", "0"], "positive"),
        (["--layer", "linear-128-1"], "no case"),
        (["--layer", "sngan32", "--against", "HEAD"], "no GAN"),
        (["--against", "HEAD", "--picture", "x.png"], "--picture"),
        (["--against", "no-such-revision"], "no-such-revision"),
        (["table", "missing.json"], "missing.json"),
    ],
)
def test_mistakes_are_named(line: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(line)
    assert message in capsys.readouterr().err


def test_two_libraries_are_compared_pass_by_pass() -> None:
    settings = Settings(repeats=2)
    with against.Comparison(LIBRARY, settings) as comparison:
        row = comparison.measure(Case("conv2d", SMALL.name, 2, 0.5))
        pids = {worker._process.pid for worker in comparison.workers}
    assert len(pids) == 2
    assert row["wrong"] == []
    assert list(row["passes"]) == ["forward", "dgrad", "wgrad"]
    for figures in (*row["passes"].values(), row["step"]):
        assert figures["baselines"]["revision"]["speedup"]["median"] > 0
    assert "x [" in report.text_of(row)
    assert all(worker._process.returncode == 0 for worker in comparison.workers)


def test_a_library_that_cannot_run_the_operators_is_reported(tmp_path: Path) -> None:
    other = tmp_path / "libddst.so"
    other.write_bytes(b"no library")
    with against.Comparison(other, Settings(repeats=1)) as comparison:
        row = comparison.measure(Case("conv2d", SMALL.name, 2, 0.5))
    assert row["wrong"]
    assert row["wrong"][0].startswith("the other revision")
    json.dumps(row)
