"""What advise decides from times that are given, what it leaves untouched, and sparsify(only_if_faster=...)."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ddst
from ddst import measure
from ddst.convert.advice_report import Advice, BlockAdvice, LayerAdvice, Measured
from ddst.convert.candidates import find_candidates
from ddst.convert.watch import Seen, watch
from ddst.measure import MedianInterval
from ddst.nn import SparseLayer, sparse_layers

# The package's attribute of that name is the function.
measuring = importlib.import_module("ddst.convert.advise")

SAMPLE = torch.randn(2, 32, 6, 6)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on what is measured for real: once is enough, on a busy machine too."""
    monkeypatch.setattr(measure, "PATIENCE", 1)


def net() -> nn.Sequential:
    """Three layers: a wide convolution, a pointwise one, a linear one."""
    return nn.Sequential(
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 32),
    )


Cost = Callable[[nn.Module, SparseLayer], float]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cost], list[SparseLayer]]:
    """Sets what a sparse layer takes, the dense one taking 1 second; returns the list of what was measured."""

    def install(cost: Cost) -> list[SparseLayer]:
        measured: list[SparseLayer] = []

        def time_pair(dense: nn.Module, sparse: SparseLayer, seen: Seen, repeats: int) -> tuple[float, MedianInterval]:
            measured.append(sparse)
            return 1.0, exactly(1.0 / cost(dense, sparse))

        monkeypatch.setattr(measuring, "time_pair", time_pair)
        monkeypatch.setattr(measuring, "time_model", lambda *_: (8.0, exactly(2.0)))
        return measured

    return install


def exactly(ratio: float) -> MedianInterval:
    return MedianInterval(ratio, ratio, ratio)


def pointwise_loses(dense: nn.Module, sparse: SparseLayer) -> float:
    return 1.5 if sparse.weight_shape[2:] == (1, 1) else 0.1 + sparse.density


def points(*pairs: tuple[float, float], busy: float = 1.0) -> tuple[Measured, ...]:
    """Of pairs of a density and the sparse over the dense time, known to within a factor ``busy`` on both sides."""
    return tuple(Measured(density, 2.0, 2.0 * r, 1 / r / busy, busy / r) for density, r in pairs)


def test_break_even_is_where_the_interpolated_time_crosses_dense() -> None:
    def layer(*pairs: tuple[float, float]) -> LayerAdvice:
        return LayerAdvice("a", (64, 64), 1, 0.1, points(*pairs))

    assert layer((0.1, 0.2), (0.5, 1.2)).break_even == pytest.approx(0.42)
    assert layer((0.1, 1.0), (0.5, 2.0)).break_even == 0.0
    assert layer((0.1, 0.2), (1.0, 0.9)).break_even == 1.0
    assert layer((0.1, 0.2), (0.5, 0.6)).speedup(0.3) == pytest.approx(2.5)
    assert layer((0.1, 0.2), (0.5, 0.6)).speedup(0.01) == pytest.approx(5.0)
    assert layer((0.1, 0.2), (0.5, 0.6)).speedup(1.0) == pytest.approx(1 / 1.1)
    assert layer((0.1, 0.2)).speedup(0.7) == pytest.approx(5.0)


def test_saved_time_counts_calls_and_only_winners() -> None:
    wins = LayerAdvice("a", (64, 64), 3, 0.1, points((0.1, 0.25), (1.0, 2.0)))
    loses = LayerAdvice("b", (64, 64), 1, 0.9, points((0.1, 0.25), (1.0, 2.0)))
    assert wins.saved_seconds == pytest.approx(3 * 2.0 * 0.75)
    assert not loses.wins
    assert loses.saved_seconds == 0.0
    found = BlockAdvice((16, 16), (wins, loses), model_seconds=9.0)
    assert found.gain == pytest.approx(9.0 / 4.5)
    assert set(found.slower({"a": 0.1, "b": 0.9})) == {"b"}
    assert set(found.slower({"a": 1.0, "b": 0.1, "unknown": 1.0})) == {"a"}


def test_the_block_that_saves_most_is_chosen() -> None:
    def found(block: tuple[int, int], relative: float) -> BlockAdvice:
        return BlockAdvice(block, (LayerAdvice("a", (64, 64), 1, 0.1, points((0.1, relative))),), 10.0)

    advice = Advice(0.1, (found((16, 16), 0.5), found((32, 32), 0.3), found((8, 8), 0.9)))
    assert advice.best.block == (32, 32)
    assert advice.best_block("a") == (32, 32)
    assert "choose block=(32, 32)" in str(advice)
    slow = Advice(0.1, (found((16, 16), 1.5),))
    assert slow.best_block("a") is None
    assert "leave dense" in str(slow)
    assert str(slow).endswith("stay dense")
    with pytest.raises(ValueError, match=r"\(16, 16\).*not \(4, 4\)"):
        slow.of((4, 4))


def test_advise_measures_each_layer_at_the_densities_asked_for(timed: Any) -> None:
    measured = timed(pointwise_loses)
    found = ddst.advise(net(), SAMPLE, density=0.5, blocks=[16, (8, 8)], densities=(1.0, 0.25), distribution="uniform")
    assert [f.block for f in found.blocks] == [(16, 16), (8, 8)]
    for block in found.blocks:
        assert [layer.name for layer in block.layers] == ["0", "3", "6"]
        assert [[p[0] for p in layer.points] for layer in block.layers] == [[0.25, 1.0]] * 3
        assert [layer.asked for layer in block.layers] == [0.5] * 3
        assert [layer.wins for layer in block.layers] == [True, False, True]
        assert block.model_seconds > 0
    assert {(layer.block, round(layer.density, 2)) for layer in measured} == {
        (block, density) for block in ((16, 16), (8, 8)) for density in (0.25, 1.0)
    }
    text = str(found)
    assert text.count("leave dense") == 2
    assert "wins below" in text


def test_the_asked_density_is_what_sparsify_would_give(timed: Any) -> None:
    timed(pointwise_loses)
    advice = ddst.advise(net(), SAMPLE, density=0.3, blocks=[16])
    report = ddst.sparsify(model := net(), 0.3)
    densities = {layer.name: layer.density for layer in report.layers if layer.reason is None}
    for layer in advice.of((16, 16)).layers:
        assert layer.asked == pytest.approx(densities[layer.name], abs=0.5 / 4)
    assert len(sparse_layers(model)) == len(advice.of((16, 16)).layers)


def test_layers_that_are_alike_are_measured_once(timed: Any) -> None:
    measured = timed(pointwise_loses)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    ddst.advise(model, torch.randn(2, 32), blocks=[16], densities=[0.5], distribution="uniform")
    assert len(measured) == 2  # the first needs no gradient of its input, the others do


def test_calls_and_input_gradients_are_seen() -> None:
    shared = nn.Linear(32, 32)
    model = nn.Sequential(nn.Linear(32, 32), shared, nn.Sequential(shared))
    candidates = find_candidates(model)
    _, seen = watch(model, (torch.randn(2, 32),), candidates)
    assert {name: (s.calls, s.input_grad) for name, s in seen.items()} == {"0": (1, False), "1": (2, True)}


def test_layers_the_step_does_not_reach_are_left_out(timed: Any) -> None:
    timed(pointwise_loses)

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor, scale: float) -> dict[str, list[torch.Tensor]]:
            return {"out": [scale * self.used(x)]}

    found = ddst.advise(Partly(), (torch.randn(2, 32), 2.0), blocks=[16], densities=[0.5], distribution="uniform")
    assert [layer.name for layer in found.blocks[0].layers] == ["used"]


def test_a_sample_that_reaches_no_layer_is_refused(timed: Any) -> None:
    timed(pointwise_loses)

    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ValueError, match=r"sample must reach a layer"):
        ddst.advise(Elsewhere(), torch.randn(2, 32), blocks=[16], densities=[0.5], distribution="uniform")


def test_blocks_too_large_for_every_layer_are_left_out(timed: Any) -> None:
    timed(pointwise_loses)
    model, x = nn.Sequential(nn.Linear(32, 32)), torch.randn(2, 32)
    found = ddst.advise(model, x, blocks=[64, 16], densities=[0.5], density=0.5)
    assert [f.block for f in found.blocks] == [(16, 16)]
    found = ddst.advise(model, x, blocks=[64, 16], densities=[0.5], distribution="uniform")
    assert [f.block for f in found.blocks] == [(16, 16)]
    for distribution, message in (("uniform", "no layer to swap"), ("erk", "no layer would be sparse")):
        with pytest.raises(ValueError, match=message):
            ddst.advise(model, x, blocks=[64], distribution=distribution)


def test_the_model_is_left_as_it_was() -> None:
    model = net()
    nn.utils.parametrizations.spectral_norm(model[6])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    random = torch.get_rng_state()
    found = ddst.advise(model, SAMPLE, blocks=[16], densities=[0.5], repeats=1, distribution="uniform")
    assert all(math.isfinite(s) and s > 0 for layer in found.blocks[0].layers for p in layer.points for s in p)
    assert torch.equal(torch.get_rng_state(), random)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in model.parameters())
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert model.training


def test_a_layer_that_is_not_told_is_not_advised() -> None:
    def layer(relative: float, busy: float) -> LayerAdvice:
        return LayerAdvice("a", (64, 64), 1, 0.1, points((0.1, relative), busy=busy))

    quiet, close, clear, lost = layer(0.5, 1.1), layer(0.95, 1.1), layer(0.2, 2.0), layer(1 / 65, 100.0)
    assert [x.known(0.1) for x in (quiet, close, clear, lost)] == [True, True, False, False]
    assert [x.told(0.1) for x in (quiet, close, clear, lost)] == [True, True, True, False]
    assert [x.wins for x in (quiet, close, clear, lost)] == [True, True, True, False]
    assert clear.saved_seconds == pytest.approx(2.0 * (1 - 1 / 2.5))  # the least that the interval allows
    assert lost.saved_seconds == 0.0
    assert quiet.why_dense(0.1) is None
    assert lost.why_dense(0.1) == "0.65x to 6500.00x the dense speed at density 0.1: this machine is too busy to tell"
    found = BlockAdvice((16, 16), (clear, lost), 10.0)
    assert set(found.slower({"a": 0.1})) == {"a"}
    text = str(Advice(0.1, (found,)))
    assert "65.00x" not in text
    assert "0.65x to 6500.00x" in text
    assert "busy machine: not told" in text
    assert (
        "1 of 2 layers win, 1 cannot be told on this busy machine; the model's step of 10000.0 ms would be at" in text
    )
    assert "at least" not in str(BlockAdvice((16, 16), (quiet,), 10.0))
    assert "at least" in str(BlockAdvice((16, 16), (quiet,), 10.0, known=False))


def test_the_model_cannot_gain_more_than_its_layers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers' own seconds are of other, busier moments than the model's."""
    monkeypatch.setattr(measuring, "time_pair", lambda *_: (1000.0, exactly(1e6)))
    for interval, known, share in ((exactly(4.0), True, 0.25), (MedianInterval(4.0, 2.0, 10.0), False, 0.1)):
        monkeypatch.setattr(measuring, "time_model", lambda *_, interval=interval: (8.0, interval))
        (found,) = ddst.advise(net(), SAMPLE, density=0.5, blocks=[16], densities=[0.5], distribution="uniform").blocks
        assert (found.model_seconds, found.known) == (8.0, known)
        assert sum(layer.dense_seconds for layer in found.layers) == pytest.approx(8.0 * share)
        assert found.gain == pytest.approx(1 / (1 - share), rel=1e-4)


def test_a_model_can_be_copied_after_it_was_measured() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.utils.spectral_norm(nn.Linear(32, 32))
            self.last, self.calls = None, 0
            self.register_buffer("mean", torch.zeros(2, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last, self.calls, self.mean = self.layer(x), self.calls + 1, self.mean + x
            return self.last

    model, x = Remembers(), torch.randn(2, 32)
    weight, mean = model.layer.weight, model.mean
    ddst.advise(model, x, density=0.5, blocks=[16], densities=[0.5])
    assert (model.last, model.calls) == (None, 0)
    assert model.layer.weight is weight
    assert model.mean is mean
    assert not mean.any()
    copy.deepcopy(model)
    report = ddst.sparsify(model, 0.5, block=16, only_if_faster=True, sample=x)
    assert len(report.layers) == 1
    copy.deepcopy(model)


def test_explain_leaves_a_layer_that_can_be_copied() -> None:
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(32, 32)))
    ddst.sparsify(model, 0.5, block=16, distribution="uniform")
    ddst.explain(model[0], torch.randn(2, 32))
    copy.deepcopy(model)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"density": 0.0}, "density"),
        ({"densities": ()}, "densities"),
        ({"densities": (2.0,)}, "densities"),
        ({"blocks": []}, "blocks"),
        ({"blocks": [(0, 1)]}, "block"),
        ({"repeats": 0}, "repeats"),
        ({"backend": "none"}, "backend"),
        ({"distribution": "none"}, "distribution"),
        ({"exclude": ["none"]}, "exclude"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ddst.advise(net(), SAMPLE, **change)


def wide_loses(dense: nn.Module, sparse: SparseLayer) -> float:
    return 1.5 if sparse.weight_shape[2:] == (3, 3) else 0.5


@pytest.mark.parametrize("distribution", ["uniform", "erk", {"0": 0.25, "3": 0.5}])
def test_sparsify_leaves_slower_layers_dense(timed: Any, distribution: Any) -> None:
    timed(wide_loses)
    report = ddst.sparsify(model := net(), 0.3, distribution=distribution, only_if_faster=True, sample=SAMPLE)
    assert isinstance(model[0], nn.Conv2d)
    (reason,) = [layer.reason for layer in report.layers if layer.name == "0"]
    assert "0.67x the dense speed at density" in reason
    expected = ddst.sparsify(twin := net(), 0.3, distribution=distribution)
    assert set(sparse_layers(twin)) - set(sparse_layers(model)) == {"0"}
    others = [layer.density for layer in report.layers if layer.name != "0"]
    assert others == [layer.density for layer in expected.layers if layer.name != "0"]


def test_sparsify_uses_an_advice_without_measuring(timed: Any) -> None:
    timed(lambda dense, sparse: 2.0 * sparse.density)
    advice = ddst.advise(net(), SAMPLE, blocks=[16], densities=(0.25, 1.0), distribution="uniform")
    measured = timed(pointwise_loses)
    fast = ddst.sparsify(net(), 0.25, distribution="uniform", only_if_faster=advice)
    slow = ddst.sparsify(net(), 0.75, distribution="uniform", only_if_faster=advice)
    assert [layer.reason is None for layer in fast.layers] == [True] * 3
    assert [layer.reason is None for layer in slow.layers] == [False] * 3
    assert measured == []
    with pytest.raises(ValueError, match=r"\(8, 8\)"):
        ddst.sparsify(net(), 0.5, block=8, only_if_faster=advice)


def test_only_if_faster_needs_a_sample_and_changes_nothing_without() -> None:
    model = net()
    with pytest.raises(ValueError, match="sample"):
        ddst.sparsify(model, 0.5, only_if_faster=True)
    assert not sparse_layers(model)
