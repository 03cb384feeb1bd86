"""sparsify and densify on models of transposed, 1-D and grouped convolutions, and of subclasses and odd instances."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hooked_spectral_norm

import ddst
from ddst.nn import sparse_layers
from ddst.sparsity import FlopCounter
from helpers.dense import active_entries
from helpers.tolerances import assert_close


class Vocoder(nn.Module):
    """A 1-D generator and a grouped discriminator, as those of audio have them, with images in between."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(32, 48, 8, 4, 2)
        self.mid = nn.Conv1d(48, 64, 7, padding=9, dilation=3)
        self.grouped = nn.Conv1d(64, 64, 5, padding=2, groups=2, bias=False)
        self.first = nn.ConvTranspose2d(64, 32, 4, 1, 0)
        self.second = nn.ConvTranspose2d(32, 64, 4, 2, 1, groups=2)
        self.last = nn.Conv2d(64, 32, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(torch.tanh(self.mid(torch.tanh(self.up(x)))))
        y = self.second(torch.tanh(self.first(torch.tanh(y).mean(2)[:, :, None, None])), output_size=(9, 9))
        return self.last(torch.tanh(y))


NAMES = ["up", "mid", "grouped", "first", "second", "last"]


@pytest.mark.parametrize("mask", ["random", "magnitude"])
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
@pytest.mark.parametrize("block", [16, (16, 8), (8, 16)], ids=str)
def test_outputs_are_those_of_the_masked_dense_model_and_densify_keeps_them(
    block: Any, distribution: str, mask: str
) -> None:
    model, x = Vocoder().double(), torch.randn(3, 32, 9, dtype=torch.float64)
    dense, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    report = ddst.sparsify(model, 0.3, block=block, distribution=distribution, mask=mask)
    layers = sparse_layers(model)
    assert list(layers) == NAMES
    assert [layer.kind for layer in report.layers] == [type(dense.get_submodule(name)).__name__ for name in NAMES]
    area = 256 if block == 16 else 128
    assert abs(report.density - 0.3) * sum(layer.size for layer in report.layers) <= area
    b_out, b_in = (16, 16) if block == 16 else block
    for name, layer in layers.items():
        transposed = name in ("up", "first", "second")
        assert layer.block == ((b_in, b_out) if transposed else (b_out, b_in))
        weight = dense.get_submodule(name).weight
        weight.data *= active_entries(layer.block_mask, layer.weight_shape, layer.block)
    y = dense(x)
    assert_close(model(x), y, "sparse")
    loaded = Vocoder().double()
    loaded.load_state_dict(ddst.dense_state_dict(model))
    assert_close(loaded(x), y, "dense state dict")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.load_state_dict(state)
    assert_close(model(x), y, "a dense state dict loaded")
    ddst.densify(model)
    assert_close(model(x), y, "densified")
    assert [type(model.get_submodule(n)) for n in NAMES] == [type(dense.get_submodule(n)) for n in NAMES]
    assert repr(model) == repr(dense)


def test_random_masks_cover_the_rows_and_columns_of_every_group() -> None:
    model = nn.Sequential(nn.Conv2d(128, 256, 1, groups=4), nn.ConvTranspose1d(256, 64, 3, groups=2))
    ddst.sparsify(model, 0.26, block=8, distribution="uniform")
    for layer in model:
        mask = layer.block_mask.flatten(2).any(2).view(layer.groups, -1, layer.mask_shape[1])
        assert mask.any(1).all()
        assert mask.any(2).all()


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_training_moves_blocks_of_every_layer(method: str) -> None:
    torch.manual_seed(0)
    model, x = Vocoder(), torch.randn(3, 32, 9)
    ddst.sparsify(model, 0.4, block=8, distribution="uniform", reserve=0.5)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    training = ddst.SparseTraining(model, optimizer, method=method, total_steps=20, interval=2, scope="layer")
    before = {name: layer.block_mask for name, layer in sparse_layers(model).items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        training.step()
    for name, layer in sparse_layers(model).items():
        assert not torch.equal(layer.block_mask, before[name]), name
        assert int(layer.block_mask.sum()) == int(before[name].sum())
        assert layer.slots == round(0.5 * layer.num_blocks)
        assert layer.storage_version == 0


def attach(style: str, layer: nn.Module, **options: Any) -> nn.Module:
    norm: Any = hooked_spectral_norm if style == "hook" else parametrizations.spectral_norm
    return norm(layer, **options)


NORMED: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "transposed": (lambda: nn.ConvTranspose2d(10, 21, 4, 2, 1), (2, 10, 5, 5), {}),
    "transposed 1-D": (lambda: nn.ConvTranspose1d(19, 10, 4, 2, 1), (2, 19, 6), {}),
    "transposed over rows": (lambda: nn.ConvTranspose2d(10, 21, 3), (2, 10, 5, 5), {"dim": 0}),
    "1-D": (lambda: nn.Conv1d(10, 21, 3), (2, 10, 9), {}),
    "over columns": (lambda: nn.Conv2d(10, 21, 3), (2, 10, 5, 5), {"dim": 1}),
    "linear over columns": (lambda: nn.Linear(10, 21), (2, 10), {"dim": 1}),
    "grouped": (lambda: nn.Conv2d(16, 32, 3, groups=2), (2, 16, 5, 5), {}),
    "grouped transposed": (lambda: nn.ConvTranspose2d(16, 32, 3, groups=2), (2, 16, 5, 5), {}),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("style", ["hook", "parametrization"])
@pytest.mark.parametrize("case", NORMED)
def test_spectral_norm_is_that_of_torch_on_the_masked_weight(case: str, style: str, backend: str) -> None:
    make, shape, options = NORMED[case]
    model = nn.Sequential(attach(style, make().double(), **options))
    x = torch.randn(shape, dtype=torch.float64)
    raw = "weight_orig" if style == "hook" else "parametrizations.weight.original"
    ddst.sparsify(model, 0.6, block=(8, 4), distribution="uniform", backend=backend, spectral_norm_noise=0)
    dense = copy.deepcopy(model)
    dense = ddst.densify(dense)
    mask = active_entries(model[0].block_mask, model[0].weight_shape, model[0].block)
    assert torch.equal(dense[0].get_parameter(raw) != 0, mask)
    for _ in range(3):
        assert_close(model(x), dense(x), "in training")
    model.eval(), dense.eval()
    assert_close(model(x), dense(x), "in evaluation")
    grads = [torch.autograd.grad(m(x).pow(3).sum(), w)[0] for m, w in zip(
        (model, dense), (model[0].values, dense[0].get_parameter(raw)), strict=True)]  # fmt: skip
    assert_close(ddst.topology.unpack_slots(grads[0], model[0].slot_blocks, mask.shape), grads[1] * mask, "gradient")
    back = ddst.densify(copy.deepcopy(model))
    assert set(back.state_dict()) == set(dense.state_dict())
    for key, value in dense.state_dict().items():
        assert_close(back.state_dict()[key], value, key)
    assert_close(back(x), dense(x), "densified")
    model.load_state_dict(dense.state_dict())
    assert_close(model(x), dense(x), "loaded")


def test_spectral_norm_of_a_transposed_layer_settles_after_its_blocks_have_moved() -> None:
    layer = ddst.nn.spectral_norm(ddst.SparseConvTranspose2d(40, 24, 3, density=0.3, block=8).double())
    assert layer.spectral_norm.u.shape == (24,)
    layer.set_block_mask(~layer.block_mask)
    with torch.no_grad():
        layer.weight.normal_()
    for _ in range(40):
        layer(torch.randn(1, 40, 2, 2, dtype=torch.float64))
    exact = torch.linalg.matrix_norm(layer.dense_weight().transpose(0, 1).flatten(1), 2)
    assert layer.spectral_norm.sigma(layer).item() == pytest.approx(exact.item(), rel=0.01)


class Orthogonal(nn.Conv2d):
    """What many GANs have: an initialisation of their own."""

    gain: float

    def __init__(self, *sizes: Any, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        nn.init.orthogonal_(self.weight)
        self.gain = 0.5


class Deeper(Orthogonal):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)


class Mixed(nn.Conv2d):
    scale = 2.0


class Helped(nn.Conv2d):
    def half(self) -> Tensor:
        return self.weight / 2


class Mixin:
    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)

    def extra(self) -> None:
        pass


class WithMixin(nn.ConvTranspose2d, Mixin):
    pass


def test_subclasses_that_add_an_init_are_swapped_with_what_their_instances_hold() -> None:
    model = nn.Sequential(Orthogonal(32, 32, 3, padding=1), Deeper(32))
    model[1].tags = ["a"]
    tags, x = model[1].tags, torch.randn(2, 32, 6, 6)
    expected = model(x)
    ddst.sparsify(model, 1.0, distribution="uniform")
    assert [type(layer) for layer in model] == [ddst.SparseConv2d] * 2
    assert (model[0].gain, model[1].gain) == (0.5, 0.5)
    assert model[1].tags is tags
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(model)
    assert again[1].tags == ["a"]
    model[0].gain = 0.25
    ddst.densify(model)
    assert [type(layer) for layer in model] == [nn.Conv2d] * 2
    assert (model[0].gain, model[1].gain) == (0.25, 0.5)
    assert model[1].tags is tags
    assert not hasattr(nn.Conv2d(1, 1, 1), "gain")


@pytest.mark.parametrize("make", [lambda: Mixed(32, 32, 3), lambda: Helped(32, 32, 3), lambda: WithMixin(32, 32, 3)])
def test_a_class_with_anything_else_stays_and_its_weight_is_packed_where_it_is(make: Any) -> None:
    model = nn.Sequential(make(), nn.Linear(32, 32))
    kept = model[0]
    report = ddst.sparsify(model, 0.6, distribution="uniform")
    assert model[0] is kept and type(model[0]).__name__ == type(make()).__name__
    assert report.layers[0].reason is None and isinstance(model[0].packed_weight, ddst.nn.PackedParameter)


def test_from_dense_takes_such_a_subclass_and_refuses_a_patched_instance() -> None:
    dense, x = Deeper(32), torch.randn(2, 32, 6, 6)
    torch.testing.assert_close(ddst.SparseConv2d.from_dense(dense, density=1.0)(x), dense(x), rtol=1e-4, atol=1e-5)
    dense.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="a forward pass of its own"):
        ddst.SparseConv2d.from_dense(dense)
    linear = nn.Linear(32, 32)
    linear.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="a forward pass of its own"):
        ddst.SparseLinear.from_dense(linear)


def test_a_grouped_layer_named_in_a_distribution_must_fit() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, groups=8), nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"distribution names '0'.*groups=8 of 8 to 8 channels, no multiples"):
        ddst.sparsify(model, 0.5, distribution={"0": 0.5})
    ddst.sparsify(model, 0.5, distribution={"0": 0.5}, block=8)
    assert model[0].num_blocks == 8 * 1 * 9


def test_advise_measures_every_kind() -> None:
    found = ddst.advise(
        Vocoder(), torch.randn(2, 32, 6), density=0.3, blocks=[(16, 8)], densities=(0.3,), distribution="uniform",
        repeats=1,
    )  # fmt: skip
    assert [layer.name for layer in found.blocks[0].layers] == NAMES


def test_operations_of_every_kind_are_counted_as_of_the_dense_model() -> None:
    model, x = Vocoder(), torch.randn(2, 32, 9)
    dense = FlopCounter(copy.deepcopy(model), x)
    ddst.sparsify(model, 0.3, distribution="uniform")
    sparse = FlopCounter(model, x)
    assert sparse.dense == dense.dense == dense.forward
    assert sparse.forward == pytest.approx(0.3 * dense.dense, rel=0.05)
