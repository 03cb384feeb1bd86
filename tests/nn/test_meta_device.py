"""Layers without memory: made and described on the meta device, whichever way it is asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

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


@both
def test_a_layer_on_meta_gives_the_shape_of_its_output_and_refuses_other_devices(make: Make) -> None:
    layer, real = make(device="meta"), make()
    shape = (2, 20, 7, 6) if isinstance(real, ddst.SparseConv2d) else (2, 5, 40)
    out = layer(torch.empty(shape, device="meta"))
    assert out.is_meta
    assert out.shape == real(torch.randn(shape)).shape
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        layer(torch.randn(shape))


@both
def test_fake_tensors_go_through_layers_made_and_moved_under_their_mode(make: Make) -> None:
    torch.manual_seed(3)
    real = make()
    shape = (2, 20, 7, 6) if isinstance(real, ddst.SparseConv2d) else (2, 5, 40)
    expected = real(torch.randn(shape)).shape
    with FakeTensorMode():
        x = torch.empty(shape)
        torch.manual_seed(3)
        layer = make()
        out = layer(x)
        assert isinstance(out, FakeTensor)
        assert out.shape == expected
        assert layer.density == real.density


@both
@pytest.mark.parametrize("how", ["load_state_dict", "assign", "reset_parameters", "skip_init"])
def test_deferred_initialisation_from_memory_that_holds_anything(make: Make, how: str) -> None:
    torch.use_deterministic_algorithms(True)  # fills empty memory
    try:
        source = make()
        source.set_block_mask(source.block_mask.flip(0))
        if how == "skip_init":
            kernel = (3,) if isinstance(source, ddst.SparseConv2d) else ()
            sizes = (source.weight_shape[1], source.weight_shape[0])
            layer = torch.nn.utils.skip_init(type(source), *sizes, *kernel, density=0.3)
        elif how == "assign":
            layer = make(device="meta")
        else:
            layer = make(device="meta").to_empty(device="cpu")
        if how == "load_state_dict":
            layer.load_state_dict(source.state_dict())
        elif how == "assign":
            layer.load_state_dict(source.state_dict(), assign=True)
        else:
            layer.reset_parameters()
        x = torch.randn((2, 20, 7, 6) if isinstance(source, ddst.SparseConv2d) else (2, 40))
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
        if how in ("load_state_dict", "assign"):
            assert torch.equal(layer(x), source(x))
    finally:
        torch.use_deterministic_algorithms(False)
