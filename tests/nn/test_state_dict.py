"""State dicts between sparse and dense models in both directions, and copies of sparse layers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hooked_spectral_norm

from ddst.convert import dense_state_dict, densify, sparsify
from ddst.nn import SparseConv2d, SparseLayer, SparseLinear, sparse_layers
from helpers.dense import inside, pack_blocks
from helpers.layers import weight_of

STYLES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda m: m,
    "hook": hooked_spectral_norm,
    "parametrization": parametrizations.spectral_norm,
}


class Net(nn.Module):
    """Convolutions, a shared layer, batch norm and linear layers; some too small to be sparse."""

    def __init__(self, style: str = "none") -> None:
        super().__init__()
        attach = STYLES[style]
        self.first = attach(nn.Conv2d(3, 32, 3, padding=1))
        shared = attach(nn.Conv2d(32, 32, 3, padding=1, bias=False))
        self.body = nn.Sequential(shared, nn.BatchNorm2d(32), nn.ReLU(), shared)
        self.last = attach(nn.Linear(32, 40))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)).mean((2, 3)))


def sparse_net(style: str = "none", seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net(style)
    sparsify(net, 0.5, block=(8, 8), distribution="uniform")
    assert list(sparse_layers(net)) == ["body.0", "last"]
    return net


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize("change", ["slots of another layer", "slots alone", "slots of another dtype", "fewer values"])
@pytest.mark.parametrize("strict", [True, False])
def test_slots_that_do_not_fit_their_values_are_refused_and_the_layer_stays(change: str, strict: bool) -> None:
    layer = SparseConv2d(32, 32, 3, density=0.25)
    x = torch.randn(1, 32, 6, 6)
    before, state = layer(x), layer.state_dict()
    state = {"0." + name: value.clone() for name, value in state.items()}
    if change == "slots of another layer":
        state["0.slot_blocks"] = SparseConv2d(32, 32, 3, density=0.5).slot_blocks
    elif change == "slots alone":
        state["0.slot_blocks"] = state["0.slot_blocks"].flip(0)
        del state["0.values"]
    elif change == "slots of another dtype":  # an average of everything in a state dict
        state["0.slot_blocks"] = state["0.slot_blocks"].float()
    else:
        state["0.values"] = state["0.values"][1:]
    with pytest.raises(RuntimeError, match=r"0\.slot_blocks.*0\.values|0\.values.*0\.slot_blocks"):
        nn.Sequential(layer).load_state_dict(state, strict=strict)
    assert torch.equal(layer(x), before)
    assert layer.dense_weight().isfinite().all()


@torch.no_grad()  # torch cannot copy a layer that holds a weight with a history, as its hook leaves one
@pytest.mark.parametrize("style", STYLES)
def test_dense_state_dict_loads_strictly_into_the_dense_model(style: str) -> None:
    sparse = sparse_net(style)
    x = images()
    sparse(x)
    sparse.eval()
    dense = Net(style).eval()
    state = dense_state_dict(sparse)
    assert list(state) == list(dense.state_dict())
    dense.load_state_dict(state, strict=True)
    torch.testing.assert_close(dense(x), sparse(x))
    torch.testing.assert_close(densify(copy.deepcopy(sparse)).state_dict(), state, rtol=0, atol=0)
    # Through a file too, without classes of ddst.
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    Net(style).load_state_dict(torch.load(file, weights_only=True), strict=True)


@pytest.mark.parametrize("style", STYLES)
def test_dense_checkpoint_loads_strictly_and_keeps_active_blocks(style: str) -> None:
    torch.manual_seed(1)
    dense = Net(style)
    x = images()
    dense(x)
    sparse = sparse_net(style, seed=2)
    kept = dict(sparse.named_parameters())
    masks = {name: layer.block_mask.clone() for name, layer in sparse_layers(sparse).items()}
    sparse.load_state_dict(dense.state_dict(), strict=True)
    weights = dense.state_dict()
    suffix = {"none": "weight", "hook": "weight_orig", "parametrization": "parametrizations.weight.original"}[style]
    for name, layer in sparse_layers(sparse).items():
        assert torch.equal(layer.block_mask, masks[name])
        assert torch.equal(layer.values, pack_blocks(weights[f"{name}.{suffix}"], layer.slot_blocks, layer.block))
        assert layer.values is kept[f"{name}.values"]
        if layer.spectral_norm is not None:
            # The vectors of the whole weight do not fit what is kept of it: they are settled on that.
            exact = torch.linalg.matrix_norm(layer.dense_weight().flatten(1), 2)
            assert exact / layer.spectral_norm.sigma(layer) < 1.2
    assert torch.equal(sparse.first.bias, dense.first.bias)
    assert torch.equal(sparse.body[1].running_mean, dense.body[1].running_mean)


@pytest.mark.parametrize("style", STYLES)
def test_round_trip_through_the_dense_form_is_exact(style: str) -> None:
    """A weight whose inactive blocks are zero comes back with vectors and all, whatever the kind of spectral norm."""
    sparse = sparse_net(style)
    sparse(images())
    other = sparse_net(style, seed=3)
    for name, layer in sparse_layers(other).items():
        layer.set_block_mask(sparse_layers(sparse)[name].block_mask)
    other.load_state_dict(dense_state_dict(sparse), strict=True)
    for name, layer in sparse_layers(other).items():
        assert torch.equal(layer.block_mask, sparse_layers(sparse)[name].block_mask)
    torch.testing.assert_close(dense_state_dict(other), dense_state_dict(sparse), rtol=0, atol=0)
    # The slots differ, as another history leaves them; everything else in the state is equal as it stands.
    packed = ("values", "slot_blocks")
    rest = [{k: v for k, v in net.state_dict().items() if not k.endswith(packed)} for net in (other, sparse)]
    torch.testing.assert_close(*rest, rtol=0, atol=0)


def test_a_checkpoint_of_the_other_kind_of_spectral_norm_loads() -> None:
    torch.manual_seed(0)
    sparse, dense = sparse_net("hook"), Net("parametrization")
    for name in ("body.0", "last"):
        state = {k.removeprefix(name + "."): v for k, v in dense.state_dict().items() if k.startswith(name + ".")}
        sparse.get_submodule(name).load_state_dict(state, strict=True)


def test_wrong_dense_checkpoints_are_refused() -> None:
    sparse = sparse_net()
    state = Net().state_dict()
    state["last.weight"] = torch.zeros(40, 33)
    with pytest.raises(RuntimeError, match=r"last\.weight"):
        sparse.load_state_dict(state)
    with pytest.raises(RuntimeError, match="weight_orig"):
        sparse_net().load_state_dict(Net("hook").state_dict())
    with pytest.raises(RuntimeError, match=r"spectral_norm\.u"):
        sparse_net("hook").load_state_dict(Net().state_dict())


@pytest.mark.parametrize("style", STYLES)
def test_packed_state_of_another_mask_loads_and_brings_its_mask(style: str) -> None:
    source, target = sparse_net(style, seed=0), sparse_net(style, seed=5)
    for layer in sparse_layers(source).values():
        flat = layer.block_mask.flatten().clone()
        flat[flat.nonzero()[0, 0]] = False
        layer.set_block_mask(flat.view(layer.block_mask.shape))
    assert not torch.equal(source.last.block_mask, target.last.block_mask)
    parameters = list(target.parameters())
    state = source.state_dict()
    assert "last.values" in state
    assert "last.slot_blocks" in state
    assert not any("topology" in key for key in state)
    target.load_state_dict(state, strict=True)
    assert all(a is b for a, b in zip(target.parameters(), parameters, strict=True))
    torch.testing.assert_close(target.state_dict(), state, rtol=0, atol=0)
    x = images()
    source.eval()
    target.eval()
    assert torch.equal(target(x), source(x))
    # Training goes on with the new shapes, power iteration on the new mask included.
    target.train()(x).sum().backward()
    assert target.last.values.grad.shape == target.last.values.shape


def test_dense_state_dict_of_a_single_layer_and_of_a_model_without_sparse_layers() -> None:
    layer = SparseConv2d(19, 21, 3, density=0.4, block=(8, 4))
    state = dense_state_dict(layer)
    assert list(state) == ["weight", "bias"]
    assert torch.equal(state["weight"], weight_of(layer))
    nn.Conv2d(19, 21, 3).load_state_dict(state)
    net = Net()
    assert list(dense_state_dict(net)) == list(net.state_dict())


def odd_layers() -> list[SparseLayer]:
    return [
        SparseConv2d(19, 21, (3, 2), stride=2, padding=1, density=0.4, block=(8, 4)),
        SparseLinear(37, 29, density=0.4, block=(16, 8), bias=False),
    ]


def output(layer: SparseLayer, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(7)
    shape = (2, 37) if isinstance(layer, SparseLinear) else (2, 19, 7, 6)
    return layer(torch.randn(shape).to(dtype))


@pytest.mark.parametrize("index", [0, 1])
def test_copies_are_independent_and_equal(index: int) -> None:
    layer = odd_layers()[index]
    layer.request_scores()
    expected = output(layer).detach()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not twin.scores_requested
        assert torch.equal(output(twin), expected)
        twin.set_block_mask(~twin.block_mask)
        assert twin.values.count_nonzero() == 0
        assert torch.equal(output(layer), expected)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_another_dtype_keeps_mask_and_topology(index: int, dtype: torch.dtype) -> None:
    layer = odd_layers()[index]
    expected = output(layer)
    before = layer.block_mask.clone(), layer.topology.clone()
    layer.to(dtype)
    assert layer.values.dtype == dtype
    assert (layer.block_mask.dtype, layer.topology.dtype) == (torch.bool, torch.int32)
    assert torch.equal(layer.block_mask, before[0])
    assert torch.equal(layer.topology, before[1])
    y = output(layer, dtype)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("index", [0, 1])
def test_requires_grad_is_kept_across_changes_of_the_mask(index: int) -> None:
    layer = odd_layers()[index].requires_grad_(False)
    layer.set_block_mask(~layer.block_mask)
    assert not layer.values.requires_grad
    assert not output(layer).requires_grad
    layer.requires_grad_(True)
    layer.set_block_mask(~layer.block_mask)
    assert output(layer).requires_grad


def test_buffers_may_be_copied_one_by_one() -> None:
    """As nn.DataParallel and averaging wrappers do: into a replica of equal mask, buffer by buffer."""
    layer = odd_layers()[0]
    replica = layer._replicate_for_data_parallel()
    replica.values, replica.bias = layer.values * 1, layer.bias * 1
    for name, buffer in layer.named_buffers():
        setattr(replica, name, buffer.clone())
    assert torch.equal(output(replica), output(layer))
    output(replica).sum().backward()
    assert layer.values.grad is not None


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_parameter_stays_in_its_optimizer_across_a_change_of_the_mask(optimizer: type[torch.optim.Optimizer]) -> None:
    layer = odd_layers()[0]
    steps = optimizer(layer.parameters(), lr=0.1)
    layer.set_block_mask(torch.ones_like(layer.block_mask))
    before = layer.values.detach().clone()
    output(layer).square().sum().backward()
    steps.step()
    assert layer.values.shape[0] == layer.num_blocks
    assert not torch.equal(before, layer.values)
    # What lies outside the weight stays zero.
    outside = ~inside(layer.slot_blocks, layer.weight_shape, layer.block)
    assert outside.any()
    assert not layer.values.detach()[outside].any()
    assert torch.equal(pack_blocks(layer.dense_weight().detach(), layer.slot_blocks, layer.block), layer.values)
