"""Blocks keep their slots: what an exchange writes, what it leaves alone, and when storage grows and shrinks."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ddst
from ddst.nn import SparseLayer
from ddst.nn.spectral_norm import spectral_norm
from helpers.dense import inside, mask_of, pack_blocks, topology_of
from helpers.layers import block_map, weight_of

Make = Callable[..., SparseLayer]


def conv(**options: object) -> SparseLayer:
    """A ragged convolution: neither channel count is a multiple of its block side."""
    return ddst.SparseConv2d(11, 21, (3, 2), padding=1, **{"density": 0.4, "block": (8, 4), **options})


def linear(**options: object) -> SparseLayer:
    """A ragged linear layer."""
    return ddst.SparseLinear(75, 61, **{"density": 0.4, "block": (16, 8), **options})


both = pytest.mark.parametrize("make", [conv, linear])


def images(layer: SparseLayer) -> Tensor:
    """An input in the layer's dtype."""
    shape = (2, 11, 5, 6) if isinstance(layer, ddst.SparseConv2d) else (4, 75)
    return torch.randn(shape, dtype=layer.values.dtype, requires_grad=True)


def exchanged(layer: SparseLayer, share: float = 0.3, grow: int = 0) -> Tensor:
    """A random mask of as many blocks, or of so many more, that keeps about ``1 - share`` of them."""
    flat = layer.block_mask.flatten()
    on, off = flat.nonzero()[:, 0], (~flat).nonzero()[:, 0]
    count = min(max(int(share * on.numel()), 1, -grow), off.numel() - max(grow, 0))
    flat[on[torch.randperm(on.numel())[:count]]] = False
    flat[off[torch.randperm(off.numel())[: count + grow]]] = True
    return flat.view(layer.mask_shape)


def check(layer: SparseLayer) -> None:
    """Every invariant of the format."""
    assert torch.equal(layer.topology, topology_of(layer.slot_blocks, layer.mask_shape))
    assert torch.equal(layer.block_mask, mask_of(layer.slot_blocks, layer.mask_shape))
    assert layer.values.shape == (layer.slots, *layer.block)
    outside = ~inside(layer.slot_blocks, layer.weight_shape, layer.block)
    assert not layer.values.detach()[outside].any()


def near(got: Tensor, want: Tensor) -> None:
    """Equal to rounding, of a result of either precision."""
    loose = 2e-5 if got.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got, want, rtol=loose, atol=loose * float(want.detach().abs().max()))


def twin_of(layer: SparseLayer) -> nn.Module:
    """The dense layer of the same weight."""
    if isinstance(layer, ddst.SparseConv2d):
        dense: nn.Module = nn.Conv2d(11, 21, (3, 2), padding=1)
    else:
        dense = nn.Linear(75, 61)
    dense.to(layer.values.dtype)
    with torch.no_grad():
        dense.weight.copy_(weight_of(layer))
        dense.bias.copy_(layer.bias)
    return dense


@both
def test_an_exchange_leaves_every_address_and_reference(make: Make) -> None:
    layer = make()
    layer(images(layer)).square().sum().backward()
    parameter, grad, slot_blocks, topology = layer.values, layer.values.grad, layer.slot_blocks, layer.topology
    state, node = layer.state_dict(), layer.values.expand_as(layer.values).grad_fn.next_functions[0][0]
    addresses = [t.data_ptr() for t in (parameter, grad, slot_blocks, topology)]
    for count in range(1, 6):
        layer.set_block_mask(exchanged(layer))
        assert layer.values is parameter
        assert layer.values.grad is grad
        assert layer.slot_blocks is slot_blocks
        assert layer.topology is topology
        assert [t.data_ptr() for t in (layer.values, layer.values.grad, slot_blocks, topology)] == addresses
        assert layer.values.expand_as(layer.values).grad_fn.next_functions[0][0] is node
        assert torch.equal(state["values"], layer.values)
        assert torch.equal(state["slot_blocks"], layer.slot_blocks)
        assert (layer.mask_version, layer.storage_version) == (count, 0)
        check(layer)


@both
def test_only_slots_that_changed_hands_are_written(make: Make) -> None:
    layer = make()
    layer(images(layer)).square().sum().backward()
    with torch.no_grad():  # NaNs would not survive arithmetic of any kind with their bits as they are
        layer.values.view(torch.int32).fill_(0x7FC12345)
        layer.values.grad.view(torch.int32).fill_(0x7FC54321)
    before = layer.slot_blocks.clone()
    change = layer.set_block_mask(exchanged(layer))
    moved = before != layer.slot_blocks
    assert moved.any()
    assert sorted(change.changed.tolist()) == moved.nonzero()[:, 0].tolist()
    for stored, poison in ((layer.values.detach(), 0x7FC12345), (layer.values.grad, 0x7FC54321)):
        assert (stored[~moved].view(torch.int32) == poison).all()
        assert (stored[moved].view(torch.int32) == 0).all()


@both
def test_kept_blocks_keep_their_slots_over_200_exchanges(make: Make) -> None:
    layer = make()
    layer.requires_grad_(False)
    stays = block_map(layer)
    layer.values.copy_(pack_blocks(weight_of(layer), layer.slot_blocks, layer.block))
    weight = weight_of(layer)
    slots, moved = layer.slots, 0
    for _ in range(200):
        old = block_map(layer)
        layer.set_block_mask(exchanged(layer, 0.2))
        new = block_map(layer)
        assert all(old[block] == slot for block, slot in new.items() if block in old)
        moved += len(new.keys() - old.keys())
        stays = {block: slot for block, slot in stays.items() if block in new}
        assert layer.slots == layer.nnz == slots
    assert moved > 500
    assert sorted(block_map(layer).items()) != [(r, i) for i, r in enumerate(sorted(block_map(layer)))]  # scattered
    check(layer)
    assert layer.storage_version == 0
    # Blocks that were there all the time still hold what they held.
    kept = torch.full_like(layer.slot_blocks, -1)
    for block, slot in stays.items():
        kept[slot] = block
    assert torch.equal(layer.values, pack_blocks(weight, kept, layer.block))


def one_row(active: int, reserve: float | None = None) -> SparseLayer:
    """A layer of 40 blocks of which the first ``active`` are."""
    mask = torch.arange(40)[None] < active
    return ddst.SparseLinear.from_dense(nn.Linear(40, 1), block_mask=mask, block=1, reserve=reserve)


def test_growth_takes_free_slots_first_and_then_just_enough(caplog: pytest.LogCaptureFixture) -> None:
    layer = one_row(20)
    layer(torch.randn(3, 40)).sum().backward()
    parameter, address = layer.values, layer.values.data_ptr()
    mask = layer.block_mask
    mask[0, [3, 7]] = False  # a tenth of 20
    layer.set_block_mask(mask)
    assert (layer.slots, layer.nnz, layer.storage_version) == (20, 18, 0)
    assert layer.slot_blocks[[3, 7]].tolist() == [-1, -1]
    mask[0, [30, 35]] = True
    change = layer.set_block_mask(mask)
    assert change.entered.tolist() == [3, 7]
    assert layer.slot_blocks[[3, 7]].tolist() == [30, 35]
    assert (layer.slots, layer.storage_version, layer.values.data_ptr()) == (20, 0, address)
    mask[0, [36, 37, 38]] = True
    with caplog.at_level("INFO", logger="ddst"):
        layer.set_block_mask(mask)
    assert "23 slots, had 20" in caplog.text
    assert (layer.slots, layer.storage_version) == (23, 1)
    assert layer.values is parameter
    assert layer.slot_blocks[20:].tolist() == [36, 37, 38]
    assert layer.values.grad.shape == layer.values.shape
    check(layer)
    layer(torch.randn(3, 40)).sum().backward()
    assert layer.values.grad[20:].all()


def test_storage_shrinks_when_more_than_a_tenth_is_idle() -> None:
    layer = one_row(20)
    with torch.no_grad():
        layer.values.copy_(torch.arange(1.0, 21).view(-1, 1, 1))
    mask = layer.block_mask
    mask[0, [0, 5]] = False
    layer.set_block_mask(mask)
    assert (layer.slots, layer.storage_version) == (20, 0)
    mask[0, 9] = False
    layer.set_block_mask(mask)
    assert (layer.slots, layer.nnz, layer.storage_version) == (17, 17, 1)
    # Those of the slots that went lie in the first free ones, the others where they were.
    expected = [17, 1, 2, 3, 4, 18, 6, 7, 8, 19, *range(10, 17)]
    assert layer.slot_blocks.tolist() == expected
    assert layer.values.flatten().tolist() == [block + 1.0 for block in expected]
    check(layer)


def test_reserved_slots_are_never_given_back_and_spare_every_reallocation() -> None:
    layer = one_row(10, reserve=0.5)
    assert (layer.slots, layer.nnz, layer.reserve) == (20, 10, 20)
    address = layer.values.data_ptr()
    for active in (20, 4, 0, 13, 20, 1):
        layer.set_block_mask(torch.arange(40)[None] < active)
        assert (layer.slots, layer.nnz, layer.storage_version, layer.values.data_ptr()) == (20, active, 0, address)
        check(layer)
    layer.set_block_mask(torch.arange(40)[None] < 30)
    assert (layer.slots, layer.storage_version) == (30, 1)
    layer.set_block_mask(torch.arange(40)[None] < 2)
    assert (layer.slots, layer.storage_version) == (20, 2)


@both
@pytest.mark.parametrize("norm", [None, "hook", "parametrization"])
@pytest.mark.parametrize("reserve", [None, 0.7])
def test_free_slots_stay_zero_through_training(make: Make, norm: str | None, reserve: float | None) -> None:
    layer = make(reserve=reserve)
    if norm is not None:
        spectral_norm(layer, style=norm)
    mask = layer.block_mask
    mask.view(-1)[mask.flatten().nonzero()[0]] = False
    layer.set_block_mask(mask)
    free = layer.slot_blocks < 0
    assert free.any()
    optimizers = [
        torch.optim.Adam(layer.parameters(), 0.01, weight_decay=0.1),
        torch.optim.AdamW(layer.parameters(), 0.01),
        torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, weight_decay=0.1),
    ]
    for optimizer in optimizers:
        before = layer.values.detach().clone()
        for _ in range(3):
            optimizer.zero_grad()
            layer(images(layer)).square().mean().backward()
            assert not layer.values.grad[free].any()
            assert layer.values.grad[~free].any()
            optimizer.step()
        assert not torch.equal(before, layer.values)
        check(layer)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [None, "hook", "parametrization"])
@pytest.mark.parametrize("reserve", [None, 0.6])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_computes_what_the_dense_layer_does_after_many_changes(
    make: Make, dtype: torch.dtype, norm: str | None, reserve: float | None, backend: str
) -> None:
    layer = make(dtype=dtype, reserve=reserve)
    layer.backend = backend
    if norm is not None:
        spectral_norm(layer, style=norm, noise=0.0)
    for change in range(25):
        layer.set_block_mask(exchanged(layer, grow=[0, 1, -2, 3, 0, -3][change % 6]))
        with torch.no_grad():
            fresh = torch.randn(layer.weight_shape, dtype=dtype)
            layer.values.add_(pack_blocks(fresh, layer.slot_blocks, layer.block))
    check(layer)
    dense, x = twin_of(layer), images(layer)
    if norm is not None:
        layer.spectral_norm.attach_to_dense(dense)
    other = x.detach().clone().requires_grad_()
    got, want = layer(x), dense(other)
    near(got, want)
    upstream = torch.randn_like(got)
    got.backward(upstream)
    want.backward(upstream)
    near(x.grad, other.grad)
    raw = {
        None: lambda: dense.weight,
        "hook": lambda: dense.weight_orig,
        "parametrization": lambda: dense.parametrizations.weight.original,
    }[norm]()
    of_values = pack_blocks(raw.grad, layer.slot_blocks, layer.block)
    near(layer.values.grad, of_values)
    assert not layer.values.grad[layer.slot_blocks < 0].any()


def scattered(make: Make, more: int = 0, **options: object) -> SparseLayer:
    """A layer after some exchanges, with a free slot."""
    layer = make(**options)
    for _ in range(4):
        layer.set_block_mask(exchanged(layer))
    if more:
        layer.set_block_mask(exchanged(layer, grow=more))
    layer.set_block_mask(exchanged(layer, grow=-1))
    assert (layer.slot_blocks < 0).any()
    return layer


@both
@pytest.mark.parametrize("more", [0, 5])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_state_dict_loads_into_a_layer_of_another_mask(make: Make, more: int, assign: bool, meta: bool) -> None:
    if meta and not assign:
        pytest.skip("torch copies nothing into a layer on meta")
    source, x = scattered(make, more), images(make())
    target = make(device="meta" if meta else None)
    assert not torch.equal(source.slot_blocks, target.slot_blocks)
    parameter, grows = target.values, target.slots != source.slots
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert not any(target.load_state_dict(state, strict=True, assign=assign))
    assert (target.values is parameter) == (not assign)
    assert target.storage_version == int(grows)
    assert torch.equal(target.slot_blocks, source.slot_blocks)
    assert torch.equal(target(x), source(x))
    check(target)
    target.set_block_mask(exchanged(target))
    check(target)
    assert torch.equal(state["slot_blocks"], source.slot_blocks)  # the checkpoint is not the layer's own


@both
def test_meta_idioms(make: Make) -> None:
    source, x = scattered(make), images(make())
    empty = make(device="meta").to_empty(device="cpu")
    empty.load_state_dict(source.state_dict())
    assert torch.equal(empty(x), source(x))
    reset = make(device="meta").to_empty(device="cpu")
    reset.reset_parameters()
    check(reset)
    assert reset.values.detach().abs().sum() > 0
    cls = type(source)
    sizes = (11, 21, (3, 2)) if make is conv else (75, 61)
    skipped = nn.utils.skip_init(cls, *sizes, density=0.4, block=source.block)
    skipped.load_state_dict(source.state_dict())
    assert torch.equal(skipped.dense_weight(), source.dense_weight())
    on_meta = make(device="meta")
    on_meta.set_block_mask(exchanged(on_meta))
    assert on_meta.set_block_mask(torch.ones(on_meta.mask_shape, dtype=torch.bool)).grown > 0
    assert on_meta.values.shape[0] == on_meta.num_blocks


@both
@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_copies_keep_the_slots_and_live_on(make: Make, how: str) -> None:
    layer = scattered(make, reserve=0.5)
    x = images(layer)
    if how == "deepcopy":
        back = copy.deepcopy(layer)
    elif how == "pickle":
        back = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        back = torch.load(file, weights_only=False)
    assert torch.equal(back.slot_blocks, layer.slot_blocks)
    assert (back.reserve, back.mask_version) == (layer.reserve, layer.mask_version)
    assert torch.equal(back(x), layer(x))
    before = layer.slot_blocks.clone()
    for _ in range(3):
        back.set_block_mask(exchanged(back))
    check(back)
    assert torch.equal(layer.slot_blocks, before)
    check(layer)


@both
@pytest.mark.parametrize("assign", [False, True])
def test_a_map_that_fits_nothing_is_refused_by_name_and_changes_nothing(make: Make, assign: bool) -> None:
    layer = scattered(make)
    good = {key: t.clone() for key, t in layer.state_dict().items()}
    slots = good["slot_blocks"]
    twice, high, low = slots.clone(), slots.clone(), slots.clone()
    first, second = (slots >= 0).nonzero()[:2, 0]
    twice[first] = twice[second]
    high[first], low[first] = layer.num_blocks, -2
    without_map = {key: t for key, t in good.items() if key != "slot_blocks"}
    bad = {
        "two slots": {**good, "slot_blocks": twice},
        f"-1 to {layer.num_blocks - 1}": {**good, "slot_blocks": high},
        "got -2": {**good, "slot_blocks": low},
        f"each of {slots.numel()} slots": {**good, "slot_blocks": slots[1:]},
        "int32 tensor, got torch.float32": {**good, "slot_blocks": slots.float()},
        "int32 tensor, got list": {**good, "slot_blocks": slots.tolist()},
        "go together": without_map,
        "before 0.1.0": {**without_map, "block_mask": layer.block_mask},
        "only one of them": {key: t for key, t in good.items() if key != "values"},
    }
    topology, versions = layer.topology.clone(), (layer.mask_version, layer.storage_version)
    for words, state in bad.items():
        with pytest.raises(RuntimeError) as error:
            layer.load_state_dict({**state, "bias": torch.zeros_like(layer.bias)}, assign=assign)
        assert "slot_blocks" in str(error.value)
        assert words in str(error.value)
        assert all(torch.equal(good[key], t) for key, t in layer.state_dict().items()), words
        assert torch.equal(layer.topology, topology)
        assert (layer.mask_version, layer.storage_version) == versions
    wider = {**good, "slot_blocks": slots.long()}
    assert not any(layer.load_state_dict(wider))
    assert layer.slot_blocks.dtype == torch.int32


@both
def test_a_map_written_over_in_place_is_followed_or_refused(make: Make) -> None:
    layer, x = scattered(make), images(make())
    swapped = layer.slot_blocks.flip(0)
    layer.slot_blocks.copy_(swapped)
    with torch.no_grad():
        layer.values.copy_(pack_blocks(torch.randn(layer.weight_shape), swapped, layer.block))
    expected = twin_of(layer)(x)
    near(layer(x), expected)
    check(layer)
    assert layer.nnz == int(layer.block_mask.sum())
    good = layer.slot_blocks.clone()
    for bad in (layer.num_blocks, -2, int(good[good >= 0][1])):
        layer.slot_blocks[int((good >= 0).nonzero()[0])] = bad
        for _ in range(2):  # and again: an error once seen is not forgotten
            with pytest.raises(RuntimeError, match="slot_blocks was overwritten"):
                layer(x)
        layer.slot_blocks.copy_(good)
    assert torch.equal(layer(x), layer(x))


@both
@pytest.mark.parametrize("meta", [False, True])
def test_a_dense_checkpoint_loads_into_scattered_slots(make: Make, meta: bool) -> None:
    layer = scattered(make)
    dense = twin_of(layer)
    nn.init.normal_(dense.weight)
    slots = layer.slot_blocks.clone()
    if meta:
        layer.to("meta")
    layer.load_state_dict(dense.state_dict(), assign=meta)
    assert torch.equal(layer.slot_blocks, slots)
    assert torch.equal(layer.values, pack_blocks(dense.weight.detach(), slots, layer.block))
    state = ddst.dense_state_dict(layer)
    assert list(state) == ["weight", "bias"]
    assert torch.equal(state["weight"], weight_of(layer))
    x = images(layer)
    near(layer(x), twin_of(layer)(x))
