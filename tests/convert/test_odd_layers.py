"""sparsify on models with a layer out of the ordinary: it is swapped, or left dense with a reason; others go on."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import ddst
from ddst.sparsity import network_stats

WIDE = np.array([32, 64])


def replaced(make_weight: Callable[[Tensor], Tensor], layer: Any) -> Any:
    layer.weight = nn.Parameter(make_weight(layer.weight.detach()))
    return layer


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


SWAPPED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "numpy widths": (lambda: nn.Conv2d(WIDE[0], WIDE[1], 3), (2, 32, 8, 8)),
    "numpy features": (lambda: nn.Linear(WIDE[1], WIDE[1]), (2, 64)),
    "numpy settings": (
        lambda: nn.Conv2d(32, 64, np.int64(3), np.int64(2), np.int32(1), np.int64(1), groups=np.int64(1)), (2, 32, 8, 8)
    ),
    "one-tuples": (lambda: nn.Conv2d(32, 64, 3, stride=(2,), padding=(1,), dilation=(1,)), (2, 32, 8, 8)),
}  # fmt: skip


@pytest.mark.parametrize("case", SWAPPED)
def test_settings_that_torch_takes_are_taken(case: str) -> None:
    make, shape = SWAPPED[case]
    model = nn.Sequential(make(), nn.Flatten(1))
    x = torch.randn(shape)
    wanted = model(x)
    ddst.sparsify(model, 1.0, distribution="uniform")
    assert isinstance(model[0], ddst.SparseConv2d | ddst.SparseLinear)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    assert type(repr(model)) is str and all(type(n) is int for n in model[0].weight_shape)


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LazyLinear": (lambda: nn.LazyLinear(64), "lazy"),
    "LazyConv2d": (lambda: nn.LazyConv2d(64, 3), "lazy"),
    "no outputs": (lambda: nn.Linear(64, 0), "no weights"),
    "no inputs": (lambda: nn.Linear(0, 64), "no weights"),
    "BSR": (lambda: replaced(lambda w: w.to_sparse_bsr((16, 16)), nn.Linear(64, 64)), "layout torch.sparse_bsr"),
    "COO": (lambda: replaced(lambda w: w.to_sparse(), nn.Linear(64, 64)), "layout torch.sparse_coo"),
    "cut linear": (lambda: replaced(lambda w: w[:, :32], nn.Linear(64, 64)), r"shape \(64, 32\)"),
    "cut conv": (lambda: replaced(lambda w: w[:48], nn.Conv2d(64, 64, 3)), r"shape \(48, 64, 3, 3\)"),
    "one-tuple kernel": (lambda: nn.Conv2d(64, 64, (3,)), r"shape \(64, 64, 3\)|kernel"),
    "complex": (lambda: nn.Linear(64, 64, dtype=torch.complex64), "complex64"),
    "pruned": (lambda: pruned(nn.Conv2d(64, 64, 3)), "prune.remove"),
    "grouped": (lambda: nn.Conv2d(64, 64, 3, groups=8), "groups=8 of 8 to 8 channels, no multiples"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
@pytest.mark.parametrize("case", LEFT)
def test_one_odd_layer_stays_dense_with_a_reason(case: str, distribution: str) -> None:
    make, reason = LEFT[case]
    odd = make()
    model = nn.Sequential(odd, nn.Linear(128, 128), nn.Linear(128, 128))
    report = ddst.sparsify(model, 0.7, distribution=distribution)
    assert [type(layer) for layer in model] == [type(odd), ddst.SparseLinear, ddst.SparseLinear]
    assert re.search(reason, report.layers[0].reason or "")
    assert str(report).count("left as it is") == 1
    if case not in ("LazyLinear", "LazyConv2d"):
        assert network_stats(model).density > 0


@pytest.mark.parametrize("case", ["pruned", "grouped", "cut linear"])
def test_a_density_out_of_reach_names_layers_and_reasons(case: str) -> None:
    make, reason = LEFT[case]
    model = nn.Sequential(make(), nn.ReLU(), nn.Conv2d(64, 16, 1))
    with pytest.raises(ValueError, match=rf"density 0\.05 cannot be met.*Left dense: 0: .*({reason})"):
        ddst.sparsify(model, 0.05)
    with pytest.raises(ValueError, match=f"no layer to swap.*({reason})"):
        ddst.sparsify(nn.Sequential(make()), 0.5, distribution="uniform")


def test_a_lazy_layer_can_be_swapped_after_the_first_run() -> None:
    model = nn.Sequential(nn.LazyLinear(64))
    model(torch.ones(2, 64))
    ddst.sparsify(model, 0.5)
    assert isinstance(model[0], ddst.SparseLinear)


def test_a_layer_by_itself_is_sent_elsewhere_by_advise_too() -> None:
    with pytest.raises(ValueError, match=r"SparseLinear\.from_dense"):
        ddst.advise(nn.Linear(64, 64), torch.randn(2, 64))
