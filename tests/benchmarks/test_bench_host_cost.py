"""The command that measures what calls cost on the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddst.benchmarks import __main__ as command
from ddst.benchmarks import host_cost, report
from ddst.measure import Peak


def test_it_prints_both_figures_and_what_is_expensive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "peak", lambda *_: Peak(1e11, 1e10))
    monkeypatch.setattr(host_cost, "CALLS", 1)
    monkeypatch.setitem(host_cost.SMALL, "resolution", 8)
    threads = torch.get_num_threads()
    try:
        assert (
            command.main(["host-cost", "--repeats", "1", "--profile", "3", "--json", str(tmp_path / "run.json")]) == 0
        )
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("SNGAN 32², 16 channels, 1 image: ") and ", ratio " in printed[0]
    assert [line.split(",")[0] for line in printed[1:3]] == ["conv2d 3x3", "linear"]
    assert len(printed) == 3 + 3 and " us " in printed[3]
    (row,) = report.load(tmp_path / "run.json")["rows"]
    assert row["ratio"]["low"] <= row["ratio"]["median"] and set(row["layers"]) == {"conv2d 3x3", "linear"}
