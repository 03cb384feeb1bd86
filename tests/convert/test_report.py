"""The report as text that fits a terminal, and as plain values."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import ddst
from ddst.convert import LayerReport, SparsifyReport


def report(measured: bool = True) -> SparsifyReport:
    work = (3000.0, 1000.0, 0.0) if measured else (None,) * 3
    seconds = ((2.0, 0.5), (1.0, 1.0), (None, None)) if measured else ((None, None),) * 3
    name = "decoder.blocks.0.upsample.convolution"
    long = "a parametrization that is not torch's spectral norm, " * 4
    return SparsifyReport(
        (
            LayerReport(name, "Conv2d", (64, 64, 3, 3), 9216, 36864, 36, 144, 40, None, True, work[0], *seconds[0]),
            LayerReport("a", "NonDynamicallyQuantizableLinear", (64, 64), 4096, 4096, 0, 0, 0, long, True, work[1],
                        *seconds[1]),
            LayerReport("b.weight", "Own", (8, 8), 64, 64, 0, 0, 0, "excluded", False, work[2], *seconds[2]),
        ),
        4.0 if measured else None,
    )  # fmt: skip


def test_shares_are_those_of_the_rows() -> None:
    found = report()
    assert found.density == (9216 + 4096) / (36864 + 4096)
    assert found.model_density == (9216 + 4096 + 64) / (36864 + 4096 + 64)
    assert found.multiply_adds_left == (0.25 * 3000 + 1000) / 4000
    assert found.time_left == 1 - 1.5 / 4.0
    assert (report(False).multiply_adds_left, report(False).time_left) == (None, None)


def test_work_and_time_are_shares_of_the_dense_model() -> None:
    lines = report().text(200).splitlines()
    assert lines[0].split() == ["layer", "kind", "weight", "density", "blocks", "work", "time"]
    assert lines[2].split()[3:] == ["0.2500", "36/144", "0.1875", "0.1250", "4", "slots", "in", "reserve"]
    assert lines[3].split()[3:7] == ["1.0000", "-", "0.2500", "0.2500"]
    assert "0.0000       -  left as it is: excluded" in report().text(300)
    assert lines[-1] == (
        "1 of 3 layers sparse; density 0.3250, of all weights 0.3261, of all multiply-adds 0.4375, "
        "measured step time 0.6250"
    )
    assert report(False).text(200).splitlines()[0].split() == ["layer", "kind", "weight", "density", "blocks"]


@pytest.mark.parametrize("width", [60, 72, 80, 100, 160, 300])
@pytest.mark.parametrize("measured", [False, True])
def test_no_line_is_longer_than_the_terminal_and_nothing_but_names_is_cut(width: int, measured: bool) -> None:
    text = report(measured).text(width)
    assert max(map(len, text.splitlines())) <= width
    words = text.split()
    assert sum(word == "parametrization" for word in words) == 4
    assert "36/144" in words and "0.2500" in words and "64x64" in words
    if width == 300:
        assert "…" not in text
    else:
        assert any(word.startswith("dec") and word.endswith("ion") for word in words)


def test_print_takes_the_width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("70", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        assert str(report()) == report().text(int(columns))
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr("sys.__stdout__", None)
    assert str(report()) == report().text(100)


def test_plain_values_go_through_json() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Flatten())
    del model[1]
    found = ddst.sparsify(model, 0.25, sample=(torch.randn(1, 32, 4, 4),)).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {
        "density", "model_density", "multiply_adds_left", "time_left", "dense_seconds", "sparse", "layers"
    }  # fmt: skip
    assert found["multiply_adds_left"] == found["density"] == 0.25
    assert found["layers"] == [
        {
            "name": "0", "kind": "Conv2d", "shape": [32, 32, 3, 3], "active": 2304, "size": 9216, "blocks": 9,
            "num_blocks": 36, "slots": 9, "reason": None, "counted": True, "multiply_adds": 9216.0 * 16,
            "dense_seconds": None, "seconds": None, "note": "", "density": 0.25,
        }
    ]  # fmt: skip
    assert json.loads(json.dumps(report().to_dict()))["time_left"] == 0.625


def test_a_layer_that_is_full_at_the_reserve_is_reported_as_swapped() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 16), nn.Linear(16, 512))
    found = ddst.sparsify(model, 0.3, reserve=0.95)
    assert [isinstance(layer, ddst.SparseLinear) for layer in model] == [row.reason is None for row in found.layers]
