"""The GAN iteration as a row: right before it is timed, dense and sparse from the same settings."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from ddst.benchmarks import gan_iteration, registry, report, runner
from ddst.benchmarks.registry import Case
from ddst.benchmarks.runner import Settings
from ddst.nn import sparse_layers

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ddst.train") is None, reason="this build holds no training")
CASE = Case("gan", "tiny", 2, 0.5, (8, 8))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"preset": "sngan32", "resolution": 16, "width_g": 16, "width_d": 16}
    monkeypatch.setitem(registry.GANS, "tiny", tiny)


def test_a_row_holds_the_iteration_and_the_update() -> None:
    row = runner.measure(CASE, Settings(repeats=2))
    assert row["wrong"] == []
    assert row["step"]["seconds"] > 0
    assert set(row["step"]["baselines"]) == {"dense"}
    assert row["step"]["update_iterations"]["low"] <= row["step"]["update_iterations"]["high"]
    assert "a topology update adds" in report.text_of(row)


def test_both_sides_have_the_same_settings_and_one_is_sparse() -> None:
    sparse, dense = gan_iteration.players_of(CASE, "static"), gan_iteration.players_of(CASE, "dense")
    assert sparse_layers(sparse.generator)
    assert sparse_layers(sparse.discriminator)
    assert not sparse_layers(dense.generator)
    assert {layer.block for layer in sparse_layers(sparse.generator).values()} == {(8, 8)}
    assert sparse.generator.resolution == dense.generator.resolution == 16


def test_a_wrong_gradient_is_found_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    players = gan_iteration.players_of(CASE, "static")
    assert gan_iteration.wrong_gradients(players) == []
    right = torch.autograd.grad
    calls: list[int] = []

    def first_is_wrong(*args: object, **kwargs: object) -> tuple[torch.Tensor, ...]:
        calls.append(1)
        gradients = right(*args, **kwargs)
        return tuple(g * 1.01 for g in gradients) if len(calls) == 1 else gradients

    monkeypatch.setattr(torch.autograd, "grad", first_is_wrong)
    row = runner.measure(CASE, Settings(repeats=1))
    assert row["wrong"]
    assert all(why.startswith("gradient of ") for why in row["wrong"])
    assert "step" not in row
