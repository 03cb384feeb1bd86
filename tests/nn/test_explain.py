"""Kernel forms and achieved rates in ddst.explain."""

from __future__ import annotations

import importlib

import pytest
import torch

import ddst
from ddst.measure import Peak
from ddst.nn import explain, spectral_norm

# The package's attribute of that name is the function.
explain_module = importlib.import_module("ddst.nn.explain")


@pytest.fixture(autouse=True)
def _peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain_module, "peak", lambda *_: Peak(1e10, 1e9))


@pytest.mark.parametrize(
    "block, slow",
    [
        ((16, 16), ()),
        ((8, 64), ()),
        ((16, 4), ("input gradient",)),
        ((16, 12), ("input gradient",)),
        ((1, 16), ("forward",)),
        ((4, 4), ("forward", "input gradient", "weight gradient")),
    ],
)
def test_slow_block_shapes_are_announced(block: tuple[int, int], slow: tuple[str, ...]) -> None:
    found = explain(ddst.SparseLinear(64, 64, block=block), torch.zeros(1, 64), measure=False)
    assert found.rates == {}
    assert found.slow == slow
    for name, form in found.forms.items():
        assert f"{name}{' (slow)' if name in found.slow else ''}: {form}" in str(found)


def test_narrow_blocks_over_many_pixels_are_not_slow() -> None:
    layer = ddst.SparseConv2d(32, 32, 3, padding=1, block=(16, 1))
    found = explain(layer, torch.zeros(8, 32, 8, 8), measure=False)
    assert found.forms["input gradient"] == "vectors along the pixels, as 1 input channel of a block do not fill one"
    assert found.slow == ()
    strided = ddst.SparseConv2d(32, 32, 3, stride=2, padding=1, block=(16, 1))
    for slow, x in [(layer, torch.zeros(7, 32, 8, 8)), (strided, torch.zeros(8, 32, 8, 8))]:
        assert explain(slow, x, measure=False).slow == ("input gradient",)


@pytest.mark.parametrize("capability, dtype, narrow", [("avx2", torch.float32, 4), ("avx512", torch.float32, 12)])
def test_what_counts_as_narrow_depends_on_the_instruction_set(capability: str, dtype: torch.dtype, narrow: int) -> None:
    for side in (4, 8, 12, 16):
        forms, _ = explain_module.kernel_forms(
            (side, 16), pixels=(512, 512), narrow=explain_module._narrow(capability, dtype)
        )
        assert forms["forward"].startswith("vectors along the pixels") == (side <= narrow)
        assert forms["input gradient"] == "vectors along the 16 input channels of a block"


def test_rates_count_the_work_of_the_active_blocks() -> None:
    layer = ddst.SparseConv2d(32, 16, 3, padding=1, density=0.5)
    found = explain(layer, torch.randn(2, 32, 5, 5))
    assert list(found.rates) == ["forward", "backward"]
    forward, backward = found.rates.values()
    assert forward.flops == 2 * layer.active_weights * 2 * 5 * 5
    assert backward.flops == 2 * forward.flops
    assert forward.bytes == 4 * (2 * 32 * 25 + 2 * 16 * 25 + layer.values.numel())
    assert forward.peak_share == pytest.approx(forward.flops / forward.seconds / 1e10)
    assert forward.bandwidth_share == pytest.approx(forward.bytes / forward.seconds / 1e9)
    assert "% of the measured peak" in str(found)


def test_explain_changes_nothing_and_feeds_no_scores() -> None:
    layer = spectral_norm(ddst.SparseLinear(32, 32, density=0.5)).train()
    layer.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    layer.request_scores()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(3, 32)
    explain(layer, x)
    assert not layer.scores_recorded
    assert layer.training
    assert layer.values.grad is None
    assert not x.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_other_backends_and_dtypes_have_rates_too() -> None:
    layer = ddst.SparseLinear(32, 32, density=0.5)
    layer.backend = "reference"
    found = explain(layer, torch.randn(3, 32))
    assert found.forms == {}
    assert set(found.rates) == {"forward", "backward"}
    half = ddst.SparseLinear(32, 32, dtype=torch.bfloat16)
    assert set(explain(half, torch.randn(3, 32, dtype=torch.bfloat16)).rates) == set(found.rates)
