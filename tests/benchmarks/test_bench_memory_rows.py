"""Memory beside time: every row is right before it is measured, and its figures are those of its networks."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddst.benchmarks import __main__ as command
from ddst.benchmarks import registry, report
from ddst.benchmarks.registry import Case
from ddst.measure import Peak

if importlib.util.find_spec("ddst.train") is None:
    pytest.skip("this build holds no training", allow_module_level=True)
from ddst.benchmarks import memory, memory_table
from ddst.benchmarks.memory import EAGER, ROWS, Runner, Variant, wrong

CASE = Case("gan", "tiny", 2, 0.5, (8, 8))
LINE = ["--memory", "--layer", "tiny", "--batch", "2", "--density", "0.5", "--block", "8x8", "--repeats", "1"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.GANS, "tiny", {"preset": "sngan32", "resolution": 8, "width_g": 16, "width_d": 16})
    monkeypatch.setattr(report, "peak", lambda *_: Peak(1e11, 1e10))
    # As inductor: graphs are whole or an error, and partitioned under the budget; without a C++ compiler.
    monkeypatch.setattr(memory, "COMPILER", "aot_eager")


# Compiling takes half a minute a row; of those that do, the ones that repeat the most.
@pytest.mark.parametrize("name", [*EAGER, "dense-budget-0.3", "sparse-budget-0.5"])
def test_a_row_has_the_gradients_and_buffers_of_the_plain_networks(name: str) -> None:
    assert wrong(CASE, Runner(CASE, ROWS[name])) == []
    torch._dynamo.reset()


def test_a_row_that_computes_something_else_is_named_and_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(players: Any) -> None:
        with torch.no_grad():
            players.generator.to_image.bias.add_(0.5)

    monkeypatch.setitem(memory.ROWS, "dense-compiled", Variant("dense", other))
    assert command.main([*LINE, "--rows", "dense-compiled"]) == 1
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.startswith("dense-compiled "))
    assert "WRONG, not measured: " in line
    assert "D.linear.parametrizations.weight.original" in line


@pytest.mark.parametrize("method", ["dense", "static"])
def test_checkpointing_updates_statistics_once_and_saves_memory(method: str) -> None:
    case = replace(CASE, batch=64)  # of fewer images the optimizers' state decides
    plain, saving = Runner(case, Variant(method)), Runner(case, Variant(method, memory.checkpointed))
    assert wrong(case, saving) == []  # running statistics among what is compared
    for _ in range(2):
        saving.iteration()
    counts = [b for name, b in saving.players.generator.named_buffers() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in counts} == {12}  # two iterations of five D steps and one of G
    assert saving.peak().peak < plain.peak().peak


def test_the_command_prints_keeps_and_tabulates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, readme = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "README.md"
    assert command.main([*LINE, "--rows", "sparse", "--json", str(first)]) == 0
    printed = capsys.readouterr().out
    assert "strongest dense row: dense in memory (1.00 of dense)" in printed
    assert command.main([*LINE, "--batch", "64", "--rows", "dense-checkpointed", "sparse", "--json", str(second)]) == 0
    run = json.loads(second.read_text())
    rows = {row["row"]: row for row in run["rows"]}
    assert list(rows) == ["dense", "dense-checkpointed", "sparse"]
    dense, sparse = rows["dense"], rows["sparse"]
    assert sparse["state"] < dense["state"] < dense["peak"]
    assert sparse["memory"] == pytest.approx(sparse["peak"] / dense["peak"], rel=1e-3)
    assert rows["dense-checkpointed"]["memory"] < 1
    readme.write_text("before\n" + "\n".join(memory_table.MARKERS) + "\nafter\n")
    assert command.main(["table", str(first), str(second), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert "| GAN iteration | batch 2, 1 thread(s): peak | batch 2, 1 thread(s): time | batch 64," in text
    (line,) = (line for line in text.splitlines() if line.startswith("| dense-checkpointed |"))
    cells = line.split("|")[2:-1]
    assert [cell.strip() for cell in cells[:2]] == ["", ""]  # not measured at batch 2
    assert cells[2].strip().startswith("**")  # the smallest dense row at batch 64
    drawn = tmp_path / "bars.svg"
    assert command.main(["picture", str(second), str(drawn)]) == 0
    assert f"<!-- {rows['dense-checkpointed']['memory']:.2f} -->" in drawn.read_text()
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**run, "kind": "models"}))
    with pytest.raises(SystemExit):
        command.main(["picture", str(other), str(drawn)])
    assert "runs of layers and of --memory have pictures, got one of 'models'" in capsys.readouterr().err
    layers = tmp_path / "c.json"
    layers.write_text(json.dumps({**run, "kind": "layers"}))
    with pytest.raises(SystemExit):
        command.main(["table", str(first), str(layers)])


@pytest.mark.parametrize("line", [["--rows", "none"], ["--layer", "conv9"], ["--batch", "0"], ["--density", "2"]])
def test_mistakes_are_named(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--memory", *line])
    assert line[0] in capsys.readouterr().err
