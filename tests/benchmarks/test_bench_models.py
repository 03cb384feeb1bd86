"""The table of networks: what is counted, what is refused, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import ddst
from ddst.benchmarks import __main__ as command
from ddst.benchmarks import models, report
from ddst.benchmarks.network_work import (
    floor,
    forward_macs,
    layers_on_sparse_operators,
    multiplying_share,
    weight_count,
)
from ddst.measure import Peak
from ddst.models.registry import MODELS, Model

MARKED = f"above\n{report.MARKERS[0]}\nold\n{report.MARKERS[1]}\nbelow\n"


def network(**_: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1))


def volumes(**_: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(3, 32, 1))


def images(_: nn.Module, batch: int) -> tuple[torch.Tensor]:
    return (torch.randn(batch, 3, 8, 8),)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "peak", lambda *_: Peak(1e11, 1e10))
    monkeypatch.setitem(MODELS, "small", Model(network, images, {}, {}, 2))
    monkeypatch.setitem(MODELS, "volumes", Model(volumes, lambda _, n: (torch.randn(n, 3, 4, 4, 4),), {}, {}, 2))


def run(*arguments: str) -> int:
    return command.main(["models", "--repeats", "1", *arguments])


def test_the_command_writes_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, kept = tmp_path / "models.md", tmp_path / "run.json"
    table.write_text(MARKED)
    assert run("--name", "small", "volumes", "--density", "0.3", "0.5", "--write", str(table), "--json", str(kept)) == 0
    rows = report.load(kept)["rows"]
    assert [(row["layer"], row["density"]) for row in rows] == [
        ("small", 0.3),
        ("small", 0.5),
        ("volumes", 0.3),
        ("volumes", 0.5),
    ]
    first, second = 3 * 32 * 9, 32 * 64 * 9
    for row in rows[:2]:
        assert row["weights"] == first + second
        assert row["packed"] == row["with_speed"] == pytest.approx(second / (first + second), abs=1e-4)
        # With ERK the first layer, which is too narrow, counts as dense; every pixel uses every weight.
        assert row["macs_left"] == pytest.approx(row["density"], abs=256 / (first + second))
        assert 1 < row["floor"] < 1 / row["macs_left"]
        assert row["dense"] == {"fewer channels than a block of 16x16": pytest.approx(first / (first + second), 1e-3)}
    assert "no layer to swap (0: Conv3d is not supported)" in rows[2]["error"]

    printed = capsys.readouterr().out
    assert "small                   30 %   95.5%       95.5%" in printed
    assert "volumes                 50 %  not sparse: model has no layer to swap" in printed
    text = table.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert "| network | weights | packed | with speed | 30 % | 50 % | dense |" in text
    assert "| small | 0.0 M | 95.5 % | 95.5 % | " in text
    assert "| volumes | 0.0 M | 0.0 % | - | - | - | model has no layer to swap (0: Conv3d is not supported) |" in text
    assert "Distribution `erk`, blocks of 16x16; wall time." in text
    assert "`python -m ddst.benchmarks models --repeats 1 --name small volumes --density 0.3 0.5" in text


def test_a_network_that_densify_changes_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    densify = ddst.densify

    def off(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            next(densify(model).parameters()).mul_(1.01)
        return model

    monkeypatch.setattr(ddst, "densify", off)
    table = tmp_path / "models.md"
    table.write_text(MARKED)
    assert run("--name", "small", "--density", "0.3", "--write", str(table)) == 1
    assert "small                   30 %  WRONG, not timed: outputs differ by" in capsys.readouterr().out
    assert "| - | wrong |" in table.read_text()


def test_a_file_without_markers_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "measure", lambda *_: pytest.fail("measured"))
    table = tmp_path / "models.md"
    for text in ("", report.MARKERS[0], f"{report.MARKERS[1]} {report.MARKERS[0]}", MARKED + MARKED):
        table.write_text(text)
        with pytest.raises(SystemExit):
            run("--name", "small", "--write", str(table))
        assert "--write" in capsys.readouterr().err
        assert table.read_text() == text


def test_weights_are_what_activations_are_multiplied_by() -> None:
    net = nn.Sequential(weight_norm(nn.Conv1d(8, 4, 3)), nn.GroupNorm(2, 4), nn.Embedding(7, 5), nn.Linear(5, 1))
    net.register_parameter("const", nn.Parameter(torch.zeros(1, 4, 4, 4)))
    assert weight_count(net) == 8 * 4 * 3 + 5


def test_multiply_adds_are_those_of_the_forward_pass_also_of_groups_and_of_views() -> None:
    x = torch.randn(2, 8, 5, 5)
    assert forward_macs(nn.Conv2d(8, 16, 3, padding=1, groups=4), (x,)) == 2 * 25 * 16 * 2 * 9
    sparse = ddst.SparseConv2d(16, 16, 1, density=0.25, block=8)
    assert forward_macs(sparse, (torch.randn(2, 16, 5, 5),)) == 2 * 25 * 64


def test_a_layer_has_speed_if_an_operator_saw_its_blocks() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) * self.read.weight.abs().sum()

    net = Net()
    ddst.sparsify(net, 0.5, block=8, distribution="uniform")
    assert layers_on_sparse_operators(net, (torch.randn(2, 16),)) == {"used"}


def test_the_share_of_time_lies_between_none_and_all() -> None:
    x = (torch.randn(4, 3, 8, 8),)
    share = multiplying_share(network(), x, 3)
    assert 0 < share < 1
    ticks = iter(range(10**6))
    # A clock that counts its own readings: two for every operator, and one of two at products.
    assert 0 < multiplying_share(network(), x, 1, clock=lambda: float(next(ticks))) < 0.5
    assert floor(share, 1.0) == pytest.approx(1.0)
