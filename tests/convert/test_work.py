"""sparsify(distribution="work"): the share of multiply-adds, of models with several resolutions and shared layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ddst
from ddst.convert import SparsifyReport
from ddst.nn import sparse_layers
from ddst.sparsity import FlopCounter


class Pyramid(nn.Module):
    """Narrow at a high resolution, wide at a low one; ``mid`` runs twice, ``unused`` never."""

    def __init__(self, narrow: int = 32, wide: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, narrow, 3, padding=1)
        self.high = nn.Conv2d(narrow, narrow, 3, padding=1)
        self.down = nn.Conv2d(narrow, wide, 3, stride=4, padding=1)
        self.mid = nn.Conv2d(wide, wide, 3, padding=1)
        self.unused = nn.Linear(wide, wide)
        self.last = nn.Linear(wide, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mid(self.mid(self.down(self.high(self.first(x))))).mean((2, 3)))


SAMPLE = torch.randn(2, 3, 16, 16)


def coarsest(report: SparsifyReport, block: tuple[int, int]) -> float:
    """The largest share of all multiply-adds that one block of a swapped layer has."""
    whole = sum(layer.multiply_adds or 0 for layer in report.layers)
    each = [
        block[0] * block[1] * (layer.multiply_adds or 0) / layer.size for layer in report.layers if not layer.reason
    ]
    return max(each) / whole


@settings(max_examples=20)
@given(
    st.integers(16, 70), st.integers(16, 70), st.floats(0.25, 0.95), st.sampled_from([(16, 16), (8, 8), (16, 4)]),
    st.sampled_from(["random", "magnitude"]),
)  # fmt: skip
def test_law_the_share_is_met_within_a_block_of_the_coarsest_layer(
    narrow: int, wide: int, density: float, block: tuple[int, int], mask: str
) -> None:
    model = Pyramid(narrow, wide)
    report = ddst.sparsify(model, density, distribution="work", sample=SAMPLE, block=block, mask=mask)
    assert report.multiply_adds_left is not None
    assert abs(report.multiply_adds_left - density) <= coarsest(report, block)
    counter = FlopCounter(model, SAMPLE)
    assert counter.forward / counter.dense == pytest.approx(report.multiply_adds_left)


def test_work_left_follows_erks_rule_and_the_calls_of_a_shared_layer_count() -> None:
    report = ddst.sparsify(Pyramid(), 0.3, distribution="work", sample=SAMPLE, block=4)
    rows = {layer.name: layer for layer in report.layers}
    assert rows["mid"].multiply_adds == 2 * 64 * 64 * 9 * 16 * SAMPLE.shape[0]
    assert rows["unused"].multiply_adds == 0
    raw = {name: sum(row.shape) / (row.multiply_adds or row.size) for name, row in rows.items()}
    scale = {name: rows[name].density / raw[name] for name in ("high", "down", "mid") if rows[name].density < 1}
    assert len(scale) > 1 and max(scale.values()) == pytest.approx(min(scale.values()), rel=0.05)
    assert rows["first"].reason is not None and rows["first"].counted
    assert min(scale.values()) * raw["unused"] > 1 and rows["unused"].reason == "its density by work is 1"


def test_what_stays_dense_counts_and_what_is_excluded_does_not() -> None:
    left = nn.Conv2d(64, 64, 3, padding=2)
    left.weight_mask = nn.Buffer(torch.ones(64, 64, 3, 3))  # as torch.nn.utils.prune leaves it
    model = nn.Sequential(left, nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
    sample = torch.randn(1, 64, 8, 8)
    with pytest.raises(ValueError, match=r"density 0\.2 cannot be met.*Left dense: 0: pruned") as caught:
        ddst.sparsify(model, 0.2, distribution="work", sample=sample)
    assert not sparse_layers(model)
    smallest = float(str(caught.value).split("smallest that can is ")[1].split()[0])
    report = ddst.sparsify(copy.deepcopy(model), smallest, distribution="work", sample=sample)
    assert report.multiply_adds_left == pytest.approx(smallest, abs=coarsest(report, (16, 16)))
    report = ddst.sparsify(model, 0.2, distribution="work", sample=sample, exclude=["0"])
    work = [layer.multiply_adds or 0 for layer in report.layers[1:]]
    left = sum(layer.density * (layer.multiply_adds or 0) for layer in report.layers[1:])
    assert left / sum(work) == pytest.approx(0.2, abs=max(work) / 144 / sum(work))
    assert [layer.counted for layer in report.layers] == [False, True, True]


def test_only_if_faster_and_reserve_and_advise_take_it() -> None:
    model = Pyramid()
    report = ddst.sparsify(model, 0.3, distribution="work", sample=SAMPLE, reserve=0.5)
    for name, layer in sparse_layers(model).items():
        (row,) = [row for row in report.layers if row.name == name]
        assert row.reason is None and layer.slots > layer.nnz
    advice = ddst.advise(Pyramid(), SAMPLE, density=0.3, distribution="work", blocks=[16], densities=[0.5], repeats=1)
    asked = {layer.name: layer.asked for layer in advice.blocks[0].layers}
    rows = {row.name: row.density for row in report.layers}
    assert set(asked) == set(sparse_layers(model)) - {"unused"}
    assert all(rows[name] == pytest.approx(density, abs=0.15) for name, density in asked.items())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"sample": None}, ValueError, 'sample must be .* if distribution="work"'),
        ({"sample": "x"}, TypeError, "sample must be a tensor or a sequence"),
        ({"density": 0.001}, ValueError, "density 0.001 cannot be met.*first: 3 to 32 channels"),
        ({"exclude": [nn.Conv2d, "last"]}, ValueError, "sample must reach a layer"),
    ],
)
def test_refusals_name_the_argument_and_change_nothing(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Pyramid()
    before = list(model.modules())
    with pytest.raises(error, match=message):
        ddst.sparsify(model, **{"density": 0.3, "distribution": "work", "sample": SAMPLE, **arguments})
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
