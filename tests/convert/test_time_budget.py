"""sparsify(time_budget=...) from measurements that are given: the most weights that fit, or what takes the time."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

import ddst
from ddst.convert.advice_report import Advice, BlockAdvice, LayerAdvice, Measured
from ddst.measure import MedianInterval
from ddst.nn import sparse_layers

measuring = importlib.import_module("ddst.convert.advise")
SAMPLE = torch.randn(2, 64, 8, 8)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 128, 3, padding=1), nn.Conv2d(128, 128, 1), nn.Flatten(1),
        nn.Linear(128 * 64, 64),
    )  # fmt: skip


def linear_in_density(name: str, seconds: float, fixed: float = 0.0, slope: float = 1.0) -> LayerAdvice:
    """Sparse takes ``(fixed + slope · density)`` of the dense seconds."""
    points = []
    for density in (0.001, 0.5, 1.0):
        relative = fixed + slope * density
        points.append(Measured(density, seconds, seconds * relative, 1 / relative, 1 / relative))
    return LayerAdvice(name, (64, 64), 1, 0.1, tuple(points))


def advice(*layers: LayerAdvice, model_seconds: float = 10.0, block: int = 16) -> Advice:
    return Advice(0.1, (BlockAdvice((block, block), layers, model_seconds),))


def quick() -> Advice:
    """2 of 10 seconds are spent elsewhere."""
    return advice(
        linear_in_density("0", 3.0), linear_in_density("1", 3.0), linear_in_density("2", 1.0),
        linear_in_density("4", 1.0),
    )  # fmt: skip


@pytest.mark.parametrize("distribution", ["erk", "uniform", "work"])
@pytest.mark.parametrize("time_budget", [0.25, 0.4, 0.7])
def test_the_largest_density_whose_step_fits(distribution: str, time_budget: float) -> None:
    settings: dict[str, Any] = {"distribution": distribution, "sample": SAMPLE, "block": 16}
    found = ddst.sparsify(model := net(), time_budget=time_budget, only_if_faster=quick(), **settings)
    seconds = {"0": 3.0, "1": 3.0, "2": 1.0, "4": 1.0}
    left = 2.0 + sum(seconds[row.name] * (row.blocks / row.num_blocks if row.num_blocks else 1) for row in found.layers)
    assert found.time_left == pytest.approx(left / 10.0)
    assert found.time_left <= time_budget
    # Nearer than one block of each layer: 1/144 of 3 seconds, 1/288, 1/64 and 1/2048.
    assert left / 10.0 > time_budget - (3 / 144 + 3 / 288 + 1 / 64 + 1 / 2048) / 10.0
    # It is one of the distribution's own: asked for by its density, the same blocks come out, to rounding.
    density = found.multiply_adds_left if distribution == "work" else found.density
    again = ddst.sparsify(net(), density, **settings)
    assert {row.name for row in again.layers if row.blocks} == set(sparse_layers(model))
    for row, twin in zip(found.layers, again.layers, strict=True):
        assert abs(row.blocks - twin.blocks) <= max(2, 0.02 * row.num_blocks)


def test_more_time_never_means_fewer_weights() -> None:
    active = []
    for time_budget in (0.25, 0.3, 0.5, 0.8, 1.0):
        found = ddst.sparsify(net(), time_budget=time_budget, only_if_faster=quick())
        active.append(sum(row.active for row in found.layers))
    assert active == sorted(active) and active[-1] == sum(row.size for row in found.layers)


def test_layers_that_lose_stay_dense_and_the_others_make_room() -> None:
    slow = advice(
        linear_in_density("0", 3.0, fixed=1.2),
        linear_in_density("1", 3.0),
        linear_in_density("4", 1.0),
        model_seconds=10.0,
    )
    found = ddst.sparsify(net(), time_budget=0.75, only_if_faster=slow, distribution="uniform")
    rows = {row.name: row for row in found.layers}
    assert "the dense speed at density" in (rows["0"].reason or "")
    assert rows["2"].reason is None and rows["2"].seconds is None  # not measured: nothing is known to be saved
    assert found.time_left is not None and 0.74 < found.time_left <= 0.75


def test_a_budget_out_of_reach_names_the_smallest_and_what_takes_the_time() -> None:
    layers = (
        linear_in_density("0", 3.0, fixed=0.2),
        linear_in_density("1", 3.0),
        linear_in_density("2", 1.0, fixed=2.0),
    )
    model = net()
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"time_budget 0\.1 cannot be met: the smallest that can is 0\.\d+") as caught:
        ddst.sparsify(model, time_budget=0.1, only_if_faster=advice(*layers))
    message = str(caught.value)
    # 3 of 10 seconds elsewhere, then layer 2, which is left dense, then layer 0 at its fifth.
    assert "dense step, which goes to: 0.300 in all else" in message
    assert "; 0.100 in 2 (dense: 0.4" in message and "the dense speed" in message
    assert "; 0.062 in 0 (density 0.0" in message
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    smallest = float(message.split("smallest that can is ")[1].split()[0])
    found = ddst.sparsify(model, time_budget=smallest, only_if_faster=advice(*layers))
    assert found.time_left is not None and smallest - 2e-4 < found.time_left <= smallest
    with pytest.raises(ValueError, match="time_budget"):
        ddst.sparsify(net(), time_budget=smallest - 2e-4, only_if_faster=advice(*layers))


def test_without_an_advice_every_layer_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def time_pair(dense: nn.Module, sparse: Any, seen: Any, repeats: int) -> tuple[float, MedianInterval]:
        measured.append((sparse.weight_shape, round(sparse.density, 2)))
        return 1.0, MedianInterval(*(3 * [1 / (0.01 + sparse.density)]))

    monkeypatch.setattr(measuring, "time_pair", time_pair)
    monkeypatch.setattr(measuring, "time_model", lambda *_: (8.0, MedianInterval(2.0, 2.0, 2.0)))
    model = nn.Sequential(*list(net())[:3])
    found = ddst.sparsify(model, time_budget=0.75, sample=SAMPLE)
    assert {density for shape, density in measured if shape == (64, 64, 3, 3)} == {0.03, 0.1, 0.3, 1.0}
    assert {shape for shape, _ in measured} == {(64, 64, 3, 3), (128, 64, 3, 3), (128, 128, 1, 1)}
    assert found.time_left is not None and 0.74 < found.time_left <= 0.75
    assert found.multiply_adds_left is not None and found.dense_seconds == 8.0
    assert sparse_layers(model)


def test_named_densities_stay_and_the_rest_makes_room() -> None:
    found = ddst.sparsify(net(), time_budget=0.6, only_if_faster=quick(), distribution={"0": 0.5})
    rows = {row.name: row for row in found.layers}
    assert rows["0"].density == 0.5
    assert found.time_left is not None and 0.58 < found.time_left <= 0.6


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"density": 0.5}, TypeError, "density must be .* got density=0.5 and time_budget=0.5"),
        ({"time_budget": None}, TypeError, "density must be .* got neither"),
        ({"time_budget": 0.0}, ValueError, "time_budget"),
        ({"time_budget": 1.5}, ValueError, "time_budget"),
        ({"time_budget": "fast"}, TypeError, "time_budget"),
        ({"only_if_faster": False}, ValueError, "sample must be .* if there is a time_budget"),
        ({"block": 8}, ValueError, r"advice holds blocks \[\(16, 16\)\], not \(8, 8\)"),
        ({"distribution": "work"}, ValueError, 'sample must be .* if distribution="work"'),
        ({"exclude": [nn.Module]}, ValueError, "no layer to swap"),
    ],
)
def test_refusals_name_the_argument_and_change_nothing(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = net()
    before = list(model.modules())
    with pytest.raises(error, match=message):
        ddst.sparsify(model, **{"time_budget": 0.5, "only_if_faster": quick(), **arguments})
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
