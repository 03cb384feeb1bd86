"""Weight norm across sparsify, densify and state dicts of both forms."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import remove_weight_norm as torch_remove_weight_norm
from torch.nn.utils import weight_norm as hooked_weight_norm

from ddst.convert import dense_state_dict, densify, sparsify
from ddst.nn import SparseConv2d, SparseLayer, sparse_layers, weight_norm
from helpers.dense import block_norms, unpack_blocks

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

ATTACH: dict[str, Callable[..., nn.Module]] = {
    "hook": hooked_weight_norm,
    "parametrization": parametrizations.weight_norm,
}
KEYS = {
    "hook": ("weight_g", "weight_v"),
    "parametrization": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
}
styles = pytest.mark.parametrize("style", ATTACH)
dims = pytest.mark.parametrize("dim", [0, None])


def dense_net(style: str, dim: int | None = 0, seed: int = 0) -> nn.Sequential:
    """Ragged layers, one without bias, one that is shared, and a layer too small to be sparse."""
    torch.manual_seed(seed)
    attach = ATTACH[style]
    shared = attach(nn.Conv2d(20, 20, (1, 3), padding=(0, 1), bias=False), dim=dim)
    net = nn.Sequential(
        attach(nn.Conv2d(3, 20, 1), dim=dim),
        attach(nn.Conv2d(20, 20, 3, padding=1), dim=dim),
        nn.LeakyReLU(0.1),
        *(shared, nn.LeakyReLU(0.1), shared, nn.Flatten()),
        attach(nn.Linear(20 * 20, 24), dim=dim),
    ).double()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(KEYS[style][0]):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return net


def sparse_net(style: str, dim: int | None = 0, seed: int = 0) -> nn.Sequential:
    net = dense_net(style, dim, seed)
    sparsify(net, 0.5, block=(8, 8), distribution="uniform")
    assert list(sparse_layers(net)) == ["1", "3", "7"]
    return net


def images() -> Tensor:
    return torch.randn(2, 3, 4, 5, dtype=torch.float64)


def effective(layer: SparseLayer) -> Tensor:
    return unpack_blocks(layer.effective_values().detach(), layer.slot_blocks, layer.weight_shape)


def part(net: nn.Module, style: str, name: str, which: int) -> nn.Parameter:
    return net.get_parameter(f"{name}.{KEYS[style][which]}")


def without_first_row(net: nn.Module) -> None:
    for layer in sparse_layers(net).values():
        mask = layer.block_mask.clone()
        mask[0] = False
        layer.set_block_mask(mask)


@styles
@dims
@pytest.mark.parametrize("training", [True, False])
def test_the_weight_stays_at_active_blocks_and_everything_of_the_layer_is_kept(
    style: str, dim: int | None, training: bool
) -> None:
    dense = dense_net(style, dim).train(training)
    part(dense, style, "1", 0).requires_grad_(False)
    part(dense, style, "7", 1).requires_grad_(False)
    calls: list[str] = []
    dense[1].register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
    dense(images())
    weights = {name: dense.get_submodule(name).weight.detach().clone() for name in ("1", "3", "7")}
    biases = dense[1].bias, dense[7].bias
    report = sparsify(dense, 0.5, block=(8, 8), distribution="uniform")
    assert [layer.name for layer in report.layers if layer.reason is None] == ["1", "3", "7"]
    for name, layer in sparse_layers(dense).items():
        active = unpack_blocks(torch.ones_like(layer.values), layer.slot_blocks, layer.weight_shape)
        torch.testing.assert_close(effective(layer), weights[name] * active, rtol=1e-12, atol=1e-15)
        assert (layer.weight_norm.style, layer.weight_norm.dim) == (style, dim)
        assert layer.weight_norm.training == training
        assert layer.norm is layer.weight_norm
        trained = (layer.weight_norm.g.requires_grad, layer.values.requires_grad)
        assert trained == (name != "1", name != "7")
    assert dense[3] is dense[5]
    assert (dense[1].bias, dense[7].bias) == biases
    dense(images())
    assert [name.removeprefix("Parametrized") for name in calls] == ["Conv2d", "SparseConv2d"]


@styles
@dims
def test_densify_returns_to_torchs_form(style: str, dim: int | None) -> None:
    model = sparse_net(style, dim)
    model[1].weight_norm.g.requires_grad_(False)
    model[7].values.requires_grad_(False)
    want = dense_net(style, dim)
    x = images()
    y, weights = model(x), {name: effective(layer) for name, layer in sparse_layers(model).items()}
    state, random = dense_state_dict(model), torch.get_rng_state()
    densify(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert list(model.state_dict()) == list(want.state_dict()) == list(state)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    assert model[3] is model[5]
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-12, atol=1e-15)
        assert parametrize.is_parametrized(layer) == (style == "parametrization")
        assert part(model, style, name, 0).requires_grad == (name != "1")
        assert part(model, style, name, 1).requires_grad == (name != "7")
    for name in ("1", "3", "7"):
        layer = model.get_submodule(name)
        if style == "hook":
            assert len(layer._forward_pre_hooks) == 1
            torch_remove_weight_norm(layer)
        else:
            parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    assert list(model[1].state_dict()) in (["bias", "weight"], ["weight", "bias"])


@styles
@dims
def test_a_densified_model_can_be_sparse_again(style: str, dim: int | None) -> None:
    model = sparse_net(style, dim)
    x = images()
    y = model(x)
    densify(model)
    sparsify(model, 1.0, block=(8, 8), distribution="uniform")
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    for layer in sparse_layers(model).values():
        assert (layer.weight_norm.style, layer.weight_norm.dim) == (style, dim)
    if style == "hook":
        for layer in set(sparse_layers(model).values()):
            torch_remove_weight_norm(layer)
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


@styles
@dims
def test_to_dense_has_the_norm_and_shares_nothing(style: str, dim: int | None) -> None:
    layer = weight_norm(SparseConv2d(20, 24, 3, block=8, density=0.5, dtype=torch.float64), dim, style)
    layer.weight_norm.g.data.mul_(1.5)
    x = torch.randn(1, 20, 5, 5, dtype=torch.float64)
    dense, y = layer.to_dense(), layer(x)
    torch.testing.assert_close(dense(x), y, rtol=1e-12, atol=1e-12)
    for parameter in dense.parameters():
        parameter.data.zero_()
    assert torch.equal(layer(x), y)


@styles
@dims
def test_dense_state_dict_loads_strictly_into_the_dense_model(style: str, dim: int | None) -> None:
    sparse, dense = sparse_net(style, dim), dense_net(style, dim, seed=1)
    file = io.BytesIO()
    torch.save(dense_state_dict(sparse), file)
    file.seek(0)
    dense.load_state_dict(torch.load(file, weights_only=True), strict=True)
    x = images()
    torch.testing.assert_close(dense(x), sparse(x), rtol=1e-12, atol=1e-12)


@styles
@dims
def test_a_dense_checkpoint_loads_strictly_and_its_weight_stays_at_active_blocks(style: str, dim: int | None) -> None:
    dense = dense_net(style, dim, seed=1)
    dense(images())
    for into in ATTACH:
        sparse = sparse_net(into, dim, seed=2)
        held = dict(sparse.named_parameters())
        state = {key: value.clone() for key, value in dense.state_dict().items()}
        if into != style:  # of the other kind; of the layer that stays dense torch knows itself one way only
            for old, new in zip(KEYS[style], KEYS[into], strict=True):
                state[f"0.{new}"] = state.pop(f"0.{old}")
        before = {key: value.clone() for key, value in state.items()}
        sparse.load_state_dict(state, strict=True)
        torch.testing.assert_close(state, before, rtol=0, atol=0)
        for name, layer in sparse_layers(sparse).items():
            active = unpack_blocks(torch.ones_like(layer.values), layer.slot_blocks, layer.weight_shape)
            want = dense.get_submodule(name).weight.detach() * active
            torch.testing.assert_close(effective(layer), want, rtol=1e-12, atol=1e-15)
            assert layer.weight_norm.g is held[f"{name}.weight_norm.g"]


@styles
@dims
def test_round_trip_through_the_dense_form_is_exact(style: str, dim: int | None) -> None:
    sparse, other = sparse_net(style, dim), sparse_net(style, dim, seed=3)
    for name, layer in sparse_layers(other).items():
        layer.set_block_mask(sparse_layers(sparse)[name].block_mask)
    other.load_state_dict(dense_state_dict(sparse), strict=True)
    torch.testing.assert_close(dense_state_dict(other), dense_state_dict(sparse), rtol=0, atol=0)
    for name, layer in sparse_layers(other).items():
        assert torch.equal(layer.weight_norm.g, sparse_layers(sparse)[name].weight_norm.g)
        assert torch.equal(layer.dense_weight(), sparse_layers(sparse)[name].dense_weight())


@styles
@dims
def test_rows_without_blocks_are_finite_in_torchs_form_and_learn_there(style: str, dim: int | None) -> None:
    sparse = sparse_net(style, dim)
    without_first_row(sparse)
    if dim is None:
        sparse[1].set_block_mask(torch.zeros_like(sparse[1].block_mask))
    x = images()
    y, dense = sparse(x), dense_net(style, dim)
    dense.load_state_dict(dense_state_dict(sparse), strict=True)
    again = sparse_net(style, dim)
    again.load_state_dict(dense_state_dict(sparse), strict=True)
    for name, layer in sparse_layers(sparse).items():
        torch.testing.assert_close(effective(sparse_layers(again)[name])[:8], effective(layer)[:8])
    for model in (dense, densify(sparse)):
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
        model(x).square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        assert part(model, style, "7", 0).grad.any()


@styles
def test_states_that_do_not_fit_are_refused(style: str) -> None:
    sparse = sparse_net(style)
    state = dense_net(style).state_dict()
    with pytest.raises(RuntimeError, match=r"weight_norm\.g"):
        sparse.load_state_dict({key: value for key, value in state.items() if key != f"7.{KEYS[style][0]}"})
    with pytest.raises(RuntimeError, match=r"7\.weight_norm\.g"):
        sparse_net(style).load_state_dict({**state, f"7.{KEYS[style][0]}": torch.ones(25, 1)})
    plain = nn.Sequential(nn.Linear(32, 32))
    sparsify(plain, 0.5)
    with pytest.raises(RuntimeError, match="weight"):
        plain.load_state_dict(nn.Sequential(ATTACH[style](nn.Linear(32, 32))).state_dict())


@styles
@dims
def test_largest_blocks_are_those_of_the_weight_computed_with(style: str, dim: int | None) -> None:
    model = nn.Sequential(ATTACH[style](nn.Linear(32, 64), dim=dim))
    with torch.no_grad():
        g, v = part(model, style, "0", 0), part(model, style, "0", 1)
        v[:32] *= 100  # whose rows come out small
        if dim == 0:
            g[:32] = 0.1
            g[32:] = 1.0
        v[0] = 0.0  # where torch's weight is NaN
        norms = v.norm(dim=1, keepdim=True).clamp(min=1e-30) if dim == 0 else v.norm()
        weight = v * g / norms
    sparsify(model, 0.5, block=8, distribution="uniform", mask="magnitude")
    want = torch.zeros(32, dtype=torch.bool)
    want[block_norms(weight, (8, 8)).flatten().topk(16).indices] = True
    assert torch.equal(model[0].block_mask.flatten(), want)
    assert bool(want.view(8, 4)[:4].any()) == (dim is None)


def test_both_dtypes_of_16_bits_and_memory_formats() -> None:
    layer = hooked_weight_norm(nn.Conv2d(32, 32, 3)).to(torch.bfloat16)
    layer.weight_v.data = layer.weight_v.data.contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(layer)
    sparsify(model, 0.5)
    assert model[0].weight_norm.g.dtype == torch.bfloat16
    assert model[0].channels_last
    dense = densify(copy.deepcopy(model))
    assert dense[0].weight_v.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(1, 32, 6, 6, dtype=torch.bfloat16)
    torch.testing.assert_close(dense(x), model(x), rtol=3e-2, atol=3e-2)


@styles
def test_densify_warns_of_nothing(style: str) -> None:
    model = sparse_net(style)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        densify(model)
