"""The command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddst.benchmarks import __main__ as command
from ddst.benchmarks import registry, report, runner
from ddst.benchmarks.registry import QUICK, Case, Layer
from ddst.measure import Peak

SMALL = Layer(16, 32, 3, 6)
LINE = ["--layer", SMALL.name, "--density", "0.5", "--batch", "2", "--repeats", "1"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_allocator_can_be_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "keep_freed_memory", lambda: pytest.fail("was set"))
    kept = tmp_path / "run.json"
    assert command.main([*LINE, "--baseline", "dense", "--allocator", "default", "--json", str(kept)]) == 0
    assert report.load(kept)["allocator"] == "default"
    assert "allocator: default" in capsys.readouterr().out


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


def test_layers_of_ones_own_shape(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["conv3x3-192-320-24", "linear-512-2048", "conv4x4s2-40-24-10"]
    assert command.main(["--list", "--density", "0.5", "--layer", *names]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names
    assert command.main(["--layer", "conv4x4s2-40-24-10", *LINE[2:], "--baseline", "dense"]) == 0
    assert "conv4x4s2-40-24-10" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--help"])
    helped = " ".join(capsys.readouterr().out.split())
    assert " ".join(registry.GRAMMAR.split()) in helped


@pytest.mark.parametrize(
    "line, message",
    [
        (["--layer", "conv9"], "conv9"),
        (["--block", "16"], "16x16"),
        (["--block", "128x16"], "128x16"),
        (["--density", "0"], "density"),
        (["--threads", "0"], "positive"),
        (["--layer", "linear-128-1"], "no case"),
        (["--layer", "conv3x5-16-16-8"], "square, got 3x5"),
        (["--layer", "conv3x3s0-16-16-8"], "conv3x3s0-16-16-8"),
        (["--layer", "conv9x9-16-16-8", "conv8x8-16-16-1"], "conv8x8-16-16-1"),
        (["--layer", "linear-16"], "linear-<in>-<out>"),
        (["--layer", "linear-1000000-1000000"], "--layer linear-1000000-1000000 with --batch 16 needs about"),
        (["--exchanges", "3"], "--exchanges"),
        (["--against", "HEAD", "--exchanges", "-1"], "--exchanges"),
        (["--against", "HEAD", "--picture", "x.png"], "--picture"),
        (["--against", "HEAD", "--allocator", "default"], "--allocator default"),
        (["table", "missing.json"], "missing.json"),
    ],
)
def test_mistakes_are_named(line: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(line)
    assert message in capsys.readouterr().err
