"""What sparse layers have in common: changes of the mask, copies, moves, state dicts, optimizers."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddst
from ddst.nn import SparseLayer, sparse_layers
from ddst.slot_change import SlotChange
from helpers.dense import active_entries, block_norms, inside, mask_of, pack_blocks, topology_of, unpack_blocks
from helpers.kinds import dense_of, input_of, make_sparse
from helpers.layers import block_map, weight_of
from helpers.tolerances import assert_close

Make = Callable[[], tuple[SparseLayer, Tensor]]


def make_conv() -> tuple[SparseLayer, Tensor]:
    """A ragged convolution (neither channel count a multiple of its block side), and an input."""
    return ddst.SparseConv2d(11, 21, (3, 2), padding=1, density=0.4, block=(8, 4)), torch.randn(2, 11, 5, 6)


def make_linear() -> tuple[SparseLayer, Tensor]:
    """A ragged linear layer, and an input."""
    return ddst.SparseLinear(19, 37, density=0.4, block=(16, 8)), torch.randn(4, 19)


def of_kind(*which: Any) -> Make:
    """A layer of another kind of convolution, and an input."""

    def make() -> tuple[SparseLayer, Tensor]:
        layer = make_sparse(which, density=0.4)
        return layer, input_of(layer)

    make.__name__ = "-".join(map(str, which))
    return make


RAGGED = [make_conv, make_linear, of_kind("ConvTranspose2d", 1, 1), of_kind("Conv1d", 1, 1)]
RAGGED += [of_kind("ConvTranspose1d", 1, 1)]
GROUPED = [of_kind("Conv2d", 0, 2), of_kind("ConvTranspose2d", 1, 3)]
both = pytest.mark.parametrize("make", [*RAGGED, *GROUPED], ids=lambda make: make.__name__)
ragged = pytest.mark.parametrize("make", RAGGED, ids=lambda make: make.__name__)


def expected_output(layer: SparseLayer, x: Tensor) -> Tensor:
    """The dense layer of the same weight in float64."""
    if isinstance(layer, ddst.SparseLinear):
        weight = unpack_blocks(layer.values.double(), layer.slot_blocks, layer.weight_shape)
        return nn.functional.linear(x.double(), weight, layer.bias.double())
    return dense_of(layer).double()(x.double())


def whole_topology(layer: SparseLayer) -> Tensor:
    """The index of the block-diagonal weight that a grouped layer's stands for, by the definition."""
    rows, cols, *space = layer.mask_shape
    sizes = (rows, layer.groups, cols, *space)
    ranks = torch.arange(math.prod(sizes)).view(sizes)
    own = torch.stack([ranks[row, row * layer.groups // rows] for row in range(rows)]).flatten()
    slots = torch.tensor([-1 if rank < 0 else int(own[rank]) for rank in layer.slot_blocks.tolist()])
    return topology_of(slots.to(torch.int32), (rows, layer.groups * cols, *space))


def other_mask(layer: SparseLayer, seed: int = 1) -> Tensor:
    """A mask that keeps some blocks, drops some and grows some."""
    new = layer.block_mask ^ (torch.rand(layer.block_mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.4)
    assert (new & layer.block_mask).any()
    assert (new & ~layer.block_mask).any()
    assert (~new & layer.block_mask).any()
    return new


@both
def test_set_block_mask_keeps_kept_values_and_zeroes_new_ones(make: Make) -> None:
    layer, x = make()
    old_weight, old_mask, old_slots = layer.dense_weight().detach(), layer.block_mask, layer.slot_blocks.clone()
    parameter, new, old_map = layer.values, other_mask(layer), block_map(layer)
    assert layer.mask_version == layer.storage_version == 0
    change = layer.set_block_mask(new)
    assert isinstance(change, SlotChange)
    assert torch.equal(change.before, old_slots)
    assert torch.equal(change.slot_blocks, layer.slot_blocks)
    assert (change.grown, change.dropped) == (int((new & ~old_mask).sum()), int((old_mask & ~new).sum()))
    assert layer.values is parameter
    assert dict(layer.named_parameters())["values"] is parameter
    assert torch.equal(layer.block_mask, new)
    assert torch.equal(mask_of(layer.slot_blocks, layer.mask_shape), new)
    assert torch.equal(layer.topology, whole_topology(layer))
    assert layer.values.shape == (layer.slots, *layer.block)
    assert layer.values.requires_grad
    assert layer.values.is_leaf
    assert layer.nnz == int(new.sum())
    assert layer.mask_version == 1
    assert layer.storage_version == int(layer.slots != old_slots.numel())
    if layer.slots >= old_slots.numel():
        assert all(old_map[block] == slot for block, slot in block_map(layer).items() if block in old_map)
    kept = old_weight * active_entries(new, layer.weight_shape, layer.block)
    assert torch.equal(layer.dense_weight(), kept)
    assert torch.equal(weight_of(layer), kept)
    assert torch.equal(layer.values, pack_blocks(kept, layer.slot_blocks, layer.block))
    assert torch.equal(layer.values, change.apply(pack_blocks(old_weight, old_slots, layer.block)))
    grown = {int(rank) for rank in (new & ~old_mask).flatten().nonzero()}
    assert {layer.slot_blocks[slot].item() for slot in change.entered} == grown
    assert not layer.values[change.entered].any()
    y = layer(x)
    assert_close(y, expected_output(layer, x), "after the change")
    y.sum().backward()
    assert layer.values.grad.shape == layer.values.shape
    assert layer.values.grad[change.entered].any()


@both
def test_set_block_mask_remaps_the_gradient(make: Make) -> None:
    layer, x = make()
    layer(x).square().sum().backward()
    before = layer.values.grad.clone()
    change = layer.set_block_mask(other_mask(layer))
    assert torch.equal(layer.values.grad, change.apply(before))
    assert before.any()
    layer.zero_grad(set_to_none=True)
    layer.set_block_mask(other_mask(layer, seed=2))
    assert layer.values.grad is None


@both
def test_set_block_mask_works_while_an_older_graph_is_alive(make: Make) -> None:
    layer, x = make()
    kept_loss = layer(x).square().sum()
    layer.set_block_mask(other_mask(layer))
    layer(x).square().sum().backward()
    assert layer.values.grad.shape == layer.values.shape
    assert kept_loss.requires_grad


@both
def test_set_block_mask_copies_the_mask_and_takes_empty_and_full_ones(make: Make) -> None:
    layer, x = make()
    mask = other_mask(layer)
    layer.set_block_mask(mask)
    snapshot = mask.clone()
    mask.fill_(True)
    assert torch.equal(layer.block_mask, snapshot)
    layer.set_block_mask(torch.zeros_like(mask))
    assert (layer.nnz, layer.density, layer.mask_version) == (0, 0.0, 2)
    y = layer(x)
    assert torch.equal(y, layer.bias.view(1, -1, *[1] * (y.dim() - 2)).expand_as(y))
    layer.set_block_mask(torch.ones_like(mask))
    assert layer.density == 1.0
    assert torch.equal(layer(x), y)
    unchanged = layer.set_block_mask(layer.block_mask)
    assert (unchanged.grown, unchanged.dropped, unchanged.changed.numel()) == (0, 0, 0)


@both
def test_set_block_mask_refuses_wrong_masks_and_changes_nothing(make: Make) -> None:
    layer, _ = make()
    before = (layer.values.clone(), layer.slot_blocks.clone(), layer.topology.clone())
    good = layer.block_mask
    for bad, error in (
        (good.float(), TypeError),
        (good[:1], ValueError),
        (good.tolist(), TypeError),
        (None, TypeError),
    ):
        with pytest.raises(error, match="mask"):
            layer.set_block_mask(bad)
    after = (layer.values, layer.slot_blocks, layer.topology)
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))
    assert layer.mask_version == 0


@both
def test_density_counts_weights_and_not_blocks(make: Make) -> None:
    layer, _ = make()
    for mask in (layer.block_mask, torch.zeros_like(layer.block_mask)):
        mask = mask.clone()
        mask.view(-1)[-1] = True  # the smallest block: ragged on both sides
        layer.set_block_mask(mask)
        counted = active_entries(mask, layer.weight_shape, layer.block)
        assert layer.density == pytest.approx(counted.float().mean().item())
        assert layer.num_blocks == mask.numel()


@ragged
def test_outside_entries_stay_zero_through_training_and_growth(make: Make) -> None:
    layer, x = make()
    optimizers = [
        torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, weight_decay=0.1),
        torch.optim.AdamW(layer.parameters(), 0.01),
        torch.optim.Adam(layer.parameters(), 0.01, eps=1e-12, amsgrad=True),
    ]
    for round_ in range(2):
        outside = ~inside(layer.slot_blocks, layer.weight_shape, layer.block)
        assert outside.any()
        for optimizer in optimizers:
            start = layer.values.detach().clone()
            for _ in range(3):
                optimizer.zero_grad()
                layer(x).square().sum().backward()
                assert not layer.values.grad[outside].any()
                optimizer.step()
            assert not layer.values.detach()[outside].any()
            assert not torch.equal(start, layer.values)
        if round_ == 0:
            layer.set_block_mask(other_mask(layer))
            optimizers = [torch.optim.Adam(layer.parameters(), 0.01)]


@ragged
def test_new_layer_is_zero_outside_and_reset_keeps_it_so(make: Make) -> None:
    layer, _ = make()
    outside = ~inside(layer.slot_blocks, layer.weight_shape, layer.block)
    first = layer.values.detach().clone()
    assert not first[outside].any()
    layer.reset_parameters()
    assert not layer.values.detach()[outside].any()
    assert not torch.equal(first, layer.values)


@both
def test_dense_weight_is_differentiable_and_block_norms_are_not(make: Make) -> None:
    layer, _ = make()
    weight = layer.dense_weight()
    assert weight.shape == layer.weight_shape
    assert torch.equal(weight, weight_of(layer))
    upstream = torch.randn_like(weight)
    (grad,) = torch.autograd.grad(weight, layer.values, upstream)
    assert torch.equal(grad, pack_blocks(upstream, layer.slot_blocks, layer.block))
    norms = layer.block_norms()
    assert not norms.requires_grad
    assert norms.shape == layer.mask_shape == tuple(layer.block_mask.shape)
    assert_close(norms, block_norms(weight.detach().double(), layer.block), "block norms")
    assert torch.equal(norms != 0, layer.block_mask)
    assert layer.effective_values() is layer.values


@both
def test_deepcopy_is_independent(make: Make) -> None:
    layer, x = make()
    layer.set_block_mask(other_mask(layer))
    layer.request_scores()
    expected, mask = layer(x).detach(), layer.block_mask.clone()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    assert twin.values is not layer.values
    assert (twin.mask_version, twin.block, twin.weight_shape) == (1, layer.block, layer.weight_shape)
    twin.set_block_mask(~mask)
    with torch.no_grad():
        twin.values.fill_(1)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.block_mask, mask)
    # The request of the original is still its own, and the copy's backward does not feed it.
    twin(x).sum().backward()
    layer(x).sum().backward()
    scores = layer.take_scores()
    layer.zero_grad()
    layer(x).sum().backward()
    assert torch.equal(layer.take_scores(), scores)


@both
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickle_round_trip(make: Make, how: str) -> None:
    layer, x = make()
    layer.set_block_mask(other_mask(layer))
    layer.request_scores()
    layer(x).sum().backward()
    if how == "pickle":
        back = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        back = torch.load(buffer, weights_only=False)
    assert torch.equal(back(x), layer(x))
    assert torch.equal(back.topology, layer.topology)
    assert back.mask_version == 1
    back.set_block_mask(other_mask(back))
    assert_close(back(x), expected_output(back, x), "after a change of mask")


@both
def test_moves_take_the_buffers_along_and_leave_their_dtypes(make: Make) -> None:
    layer, x = make()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        moved = copy.deepcopy(layer).to(dtype)
        assert moved.values.dtype == moved.bias.dtype == dtype
        assert (moved.block_mask.dtype, moved.slot_blocks.dtype) == (torch.bool, torch.int32)
        assert moved.topology.dtype == torch.int32
        y = moved(x.to(dtype))
        assert y.dtype == dtype
        assert_close(y, expected_output(moved, x.to(dtype)), f"{dtype}")
    on_meta = copy.deepcopy(layer).to("meta")
    assert {t.device.type for t in (*on_meta.parameters(), on_meta.topology)} == {"meta"}
    assert torch.equal(on_meta.slot_blocks, layer.slot_blocks)
    assert not list(layer.buffers())


@pytest.mark.parametrize(
    "make", [lambda **k: ddst.SparseConv2d(8, 8, 3, **k), lambda **k: ddst.SparseLinear(8, 8, **k)]
)
def test_a_layer_can_be_made_on_the_meta_device(make: Callable[..., SparseLayer]) -> None:
    layer = make(device="meta", dtype=torch.float64)
    assert {t.device.type for t in (*layer.parameters(), layer.topology)} == {"meta"}
    assert layer.slot_blocks.device.type == "cpu"
    assert layer.values.dtype == torch.float64


@both
def test_state_dict_is_packed_and_loads_across_masks(make: Make) -> None:
    layer, x = make()
    state = layer.state_dict()
    assert set(state) == {"values", "bias", "slot_blocks"}
    other, _ = make()
    other.set_block_mask(torch.ones_like(layer.block_mask))
    assert other.values.shape != layer.values.shape
    parameter = other.values
    assert not any(other.load_state_dict(state, strict=True))
    assert other.values is parameter
    assert torch.equal(other.block_mask, layer.block_mask)
    assert torch.equal(other.topology, layer.topology)
    assert torch.equal(other(x), layer(x))
    other(x).sum().backward()
    assert other.values.grad.shape == other.values.shape


@both
def test_dense_state_dict_loads_at_the_active_blocks(make: Make) -> None:
    layer, x = make()
    dense = layer.to_dense()
    with torch.no_grad():
        dense.weight.normal_()
    mask = layer.block_mask.clone()
    state = {key: t.clone() for key, t in dense.state_dict().items()}
    layer.load_state_dict(state, strict=True)
    assert set(state) == {"weight", "bias"}  # the caller's dict is not changed
    assert torch.equal(layer.block_mask, mask)
    assert torch.equal(layer.values, pack_blocks(dense.weight, layer.slot_blocks, layer.block))
    assert torch.equal(layer.bias, dense.bias)
    assert_close(layer(x), expected_output(layer, x), "after loading")


@both
def test_state_dict_of_other_sizes_is_refused(make: Make) -> None:
    layer, _ = make()
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    state = layer.state_dict()
    for wrong in (
        {**state, "values": state["values"][:-1]},
        {**state, "slot_blocks": state["slot_blocks"][:1]},
        {key: t for key, t in state.items() if key != "values"},
        {**state, "extra": torch.zeros(1)},
    ):
        with pytest.raises(RuntimeError, match=r"slot_blocks|extra"):
            layer.load_state_dict(wrong)
    assert all(torch.equal(before[key], t) for key, t in layer.state_dict().items())


@both
def test_functional_call_and_data_parallel_replicas(make: Make) -> None:
    layer, x = make()
    doubled = torch.func.functional_call(layer, {"values": layer.values * 2, "bias": layer.bias * 2}, x)
    assert_close(doubled, 2 * expected_output(layer, x), "functional_call")
    replica = layer._replicate_for_data_parallel()
    # nn.DataParallel puts plain tensors where the parameters were, and copies of the buffers.
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter * 1)
    for name, buffer in layer.named_buffers():
        setattr(replica, name, buffer.clone())
    y = replica(x)
    assert torch.equal(y, layer(x))
    y.sum().backward()
    assert layer.values.grad is not None


@both
def test_frozen_values_get_no_gradient(make: Make) -> None:
    layer, x = make()
    layer.values.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert layer.values.grad is None
    assert layer.bias.grad is not None
    assert x.grad is not None
    layer.set_block_mask(other_mask(layer))
    assert not layer.values.requires_grad


@both
def test_hooks_and_autocast_work_as_on_dense_layers(make: Make) -> None:
    layer, x = make()
    seen: list[torch.Size] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer.values.register_hook(lambda grad: seen.append(grad.shape))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.values.grad.dtype == torch.float32
    assert seen == [y.shape, layer.values.shape]


def test_sparse_layers_lists_a_model_in_order_and_shared_layers_once() -> None:
    shared = ddst.SparseLinear(8, 8, density=1.0)
    model = nn.Sequential(
        ddst.SparseConv2d(4, 8, 1), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), shared), shared, ddst.SparseLinear(8, 2)
    )
    assert list(sparse_layers(model)) == ["0", "2.1", "4"]
    assert sparse_layers(model)["2.1"] is shared
    assert sparse_layers(nn.Linear(2, 2)) == {}


@both
def test_conversions_share_nothing(make: Make) -> None:
    layer, x = make()
    dense = layer.to_dense()
    again = type(layer).from_dense(dense, block_mask=layer.block_mask, block=layer.block)
    want = layer(x)
    with torch.no_grad():
        for parameter in dense.double().parameters():
            parameter.zero_()
    assert torch.equal(layer(x), want)
    assert again.bias is not None
    assert again.bias.abs().sum() > 0
