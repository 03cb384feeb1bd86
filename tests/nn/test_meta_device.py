"""Layers without memory: made and described on the meta device, whichever way it is asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import ddst
from ddst.nn import SparseLayer
from ddst.sparsity.density import NetworkDensity

Make = Callable[..., SparseLayer]

both = pytest.mark.parametrize(
    "make",
    [
        lambda **k: ddst.SparseConv2d(20, 24, 3, density=0.3, **k),
        lambda **k: ddst.SparseLinear(40, 24, density=0.3, **k),
    ],
    ids=["conv", "linear"],
)


def devices(layer: SparseLayer) -> set[str]:
    return {t.device.type for t in (*layer.parameters(), layer.topology)}


@both
@pytest.mark.parametrize("how", ["argument", "context"])
def test_a_layer_made_on_meta_knows_its_density_and_repr(make: Make, how: str) -> None:
    torch.manual_seed(3)
    real = make()
    torch.manual_seed(3)
    if how == "argument":
        layer = make(device="meta")
    else:
        with torch.device("meta"):
            layer = make()
            assert repr(layer) == repr(real)
    assert devices(layer) == {"meta"}
    assert repr(layer) == repr(real)
    assert layer.active_weights == real.active_weights > 0
    assert layer.density == real.density
    assert NetworkDensity(layer).density == NetworkDensity(real).density


@both
def test_an_explicit_device_goes_before_the_default_one(make: Make) -> None:
    with torch.device("meta"):
        layer = make(device="cpu")
    assert devices(layer) == {"cpu"}
    assert int(layer.block_mask.sum()) == layer.nnz


@both
def test_the_count_follows_the_mask_and_moves_to_meta(make: Make) -> None:
    layer = make()
    mask = torch.zeros_like(layer.block_mask)
    mask[-1, -1] = True  # edge blocks, which hold fewer weights
    layer.set_block_mask(mask)
    count = int(layer.dense_weight().detach().new_ones(layer.values.shape).sum())
    inside = {4: 9 * 8 * 4, 2: 8 * 8}[len(layer.weight_shape)]
    assert layer.active_weights == inside < count
    assert layer.to("meta").active_weights == inside
    other = make()
    packed = {"slot_blocks": layer.slot_blocks, "values": torch.zeros(layer.values.shape)}
    other.load_state_dict({**other.state_dict(), **packed})
    assert other.active_weights == inside
