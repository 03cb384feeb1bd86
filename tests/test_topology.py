"""ddst.topology against the definition of the packed format, written out with loops in helpers/dense.py."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddst import _host, topology
from ddst.ops.reference import dense_weight
from ddst.slot_change import SlotChange
from helpers.dense import (
    active_entries,
    blocks_of,
    inside,
    mask_dims,
    mask_of,
    pack_blocks,
    row_major,
    topology_of,
    unpack_blocks,
)

modest = settings(max_examples=60, deadline=None)
pairs = st.tuples(st.integers(1, 9), st.integers(1, 9))
Slotted = tuple[tuple[int, ...], tuple[int, int], Tensor]  # with masks, or with slot_blocks


@st.composite
def weights(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, int]]:
    """(weight shape, block) of a linear or a convolution weight."""
    shape = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    taps = draw(st.one_of(st.just(()), st.tuples(st.integers(1, 3), st.integers(1, 3))))
    return (*shape, *taps), draw(pairs)


@st.composite
def masked(draw: st.DrawFn) -> Slotted:
    """(weight shape, block, mask), the mask anything from empty to full."""
    shape, block = draw(weights())
    share = draw(st.sampled_from([0.0, 0.05, 0.3, 0.8, 1.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return shape, block, torch.rand(mask_dims(shape, block), generator=g) < share


def numbered(shape: tuple[int, ...]) -> Tensor:
    """A dense weight whose entries are all different and none zero."""
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


@st.composite
def slotted(draw: st.DrawFn) -> Slotted:
    """(weight shape, block, slot_blocks): the blocks of a random mask in random slots, some free."""
    shape, block, mask = draw(masked())
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    ranks = torch.cat([mask.flatten().nonzero()[:, 0], torch.full((draw(st.integers(0, 5)),), -1)])
    return shape, block, ranks[torch.randperm(ranks.numel(), generator=g)].to(torch.int32)


@modest
@given(masked())
def test_topology_of_a_mask_has_row_major_slots(problem: Slotted) -> None:
    _, _, mask = problem
    vector = topology.build_topology(mask)
    assert vector.dtype == torch.int32
    assert vector.dim() == 1
    assert vector.is_contiguous()
    assert torch.equal(vector, topology_of(mask))
    index = topology.split_topology(vector, mask.shape[0], mask.shape[1])
    assert index.row_order.tolist() == list(range(int(mask.sum())))


@modest
@given(slotted())
def test_topology_of_slots_is_the_documented_vector(problem: Slotted) -> None:
    shape, block, slots = problem
    mask = mask_of(slots, mask_dims(shape, block))
    rows, cols, taps = mask.shape[0], mask.shape[1], math.prod(mask.shape[2:])
    vector = topology.topology_of_slots(slots, mask.shape)
    assert vector.dtype == torch.int32 and vector.is_contiguous()
    assert torch.equal(vector, topology_of(slots, mask.shape))
    assert torch.equal(topology._topology_by_operators(slots, rows, cols, taps), vector)
    assert vector.numel() == rows + cols + 2 + 5 * slots.numel()
    assert topology.slot_count(vector, rows, cols) == slots.numel()
    index = topology.split_topology(vector, rows, cols)
    count = int(mask.sum())
    assert index.row_ptr[-1] == index.col_ptr[-1] == count
    assert torch.equal(index.row_ptr.diff(), mask.reshape(rows, -1).sum(1))
    assert torch.equal(index.col_ptr.diff(), mask.transpose(0, 1).reshape(cols, -1).sum(1))
    free = (slots < 0).nonzero()[:, 0].tolist()
    for order, parts in (
        (index.row_order, (index.block_row, index.block_col, index.block_tap)),
        (index.col_order, (index.block_col, index.block_row, index.block_tap)),
    ):
        assert sorted(order.tolist()) == list(range(slots.numel()))
        keys = list(zip(*(part[order.long()].tolist() for part in parts), strict=True))
        assert keys == sorted(keys)
        assert order[count:].tolist() == free
    assert all(index.block_row[free] == rows) and all(index.block_col[free] == cols) and all(index.block_tap[free] == 0)


@modest
@given(slotted())
def test_slots_and_masks_are_made_of_each_other(problem: Slotted) -> None:
    shape, block, slots = problem
    mask = mask_of(slots, mask_dims(shape, block))
    assert torch.equal(topology.mask_of_slots(slots, mask.shape), mask)
    ranks = topology.row_major_slots(mask)
    assert ranks.dtype == torch.int32
    assert torch.equal(ranks, row_major(mask))
    assert torch.equal(ranks, slots[slots >= 0].sort().values)
    assert torch.equal(topology.mask_of_slots(ranks, mask.shape), mask)
    none = torch.full_like(slots, -1)
    assert not topology.mask_of_slots(none, mask.shape).any()


@modest
@given(slotted(), st.integers(0, 10**6))
def test_permuting_slots_renames_them_in_both_orders(problem: Slotted, seed: int) -> None:
    shape, block, slots = problem
    mask = mask_of(slots, mask_dims(shape, block))
    moved = torch.randperm(slots.numel(), generator=torch.Generator().manual_seed(seed))  # new slot -> old
    rows, cols = mask.shape[:2]
    old = topology.split_topology(topology.topology_of_slots(slots, mask.shape), rows, cols)
    new = topology.split_topology(topology.topology_of_slots(slots[moved], mask.shape), rows, cols)
    count = int(old.row_ptr[-1])
    assert torch.equal(new.row_ptr, old.row_ptr) and torch.equal(new.col_ptr, old.col_ptr)
    for name in ("block_row", "block_col", "block_tap"):
        assert torch.equal(getattr(new, name), getattr(old, name)[moved])
    for name in ("row_order", "col_order"):
        assert torch.equal(moved[getattr(new, name)[:count].long()], getattr(old, name)[:count].long())


@modest
@given(masked(), st.integers(0, 10**6))
def test_permuting_slots_permutes_values_and_leaves_the_weight(problem: Slotted, seed: int) -> None:
    shape, block, mask = problem
    values = topology.pack(numbered(shape), mask, block)
    moved = torch.randperm(values.shape[0], generator=torch.Generator().manual_seed(seed))
    vector = topology.topology_of_slots(topology.row_major_slots(mask)[moved], mask.shape)
    dense = dense_weight(values[moved], vector, shape)
    assert torch.equal(dense, topology.unpack(values, mask, shape))


def test_a_vector_on_another_device_is_made_without_waiting() -> None:
    # Every size follows from arguments: a meta tensor has no entries to wait for.
    slots = torch.zeros(9, dtype=torch.int32, device="meta")
    vector = topology.topology_of_slots(slots, (4, 5, 3, 3))
    assert vector.is_meta and vector.dtype == torch.int32
    assert vector.shape == (4 + 5 + 2 + 5 * 9,)


def test_the_compiled_host_module_is_the_one_used_where_it_was_built() -> None:
    try:
        compiled = importlib.import_module("ddst._lib._host")
    except ModuleNotFoundError:
        assert _host.IMPLEMENTATION == "python"
        pytest.skip("no compiled host module for this Python")
    assert _host.IMPLEMENTATION == "pybind11"
    slots = torch.tensor([8, -1, 3], dtype=torch.int32)
    assert compiled.topology_of_slots(slots.numpy(), 3, 3, 1).tolist() == topology_of(slots, (3, 3)).tolist()


@modest
@given(masked())
def test_pack_and_unpack_are_the_definition_and_invert_each_other(
    problem: Slotted,
) -> None:
    shape, block, mask = problem
    weight = numbered(shape)
    values = topology.pack(weight, mask, block)
    assert torch.equal(values, pack_blocks(weight, mask, block))
    dense = topology.unpack(values, mask, shape)
    assert torch.equal(dense, unpack_blocks(values, mask, shape))
    assert torch.equal(dense, weight * active_entries(mask, shape, block))
    assert torch.equal(topology.pack(dense, mask, block), values)


@modest
@given(masked())
def test_gradient_of_pack_is_unpack_and_the_other_way_round(
    problem: Slotted,
) -> None:
    shape, block, mask = problem
    weight = numbered(shape).requires_grad_()
    values = topology.pack(weight, mask, block)
    upstream = torch.arange(1, 1 + values.numel(), dtype=torch.float64).reshape(values.shape)
    (dense_grad,) = torch.autograd.grad(values, weight, upstream)
    assert torch.equal(dense_grad, unpack_blocks(upstream, mask, shape))
    leaf = values.detach().requires_grad_()
    (values_grad,) = torch.autograd.grad(topology.unpack(leaf, mask, shape), leaf, weight.detach())
    assert torch.equal(values_grad, pack_blocks(weight.detach(), mask, block))


@modest
@given(weights())
def test_mask_shape_and_block_sizes(problem: tuple[tuple[int, ...], tuple[int, int]]) -> None:
    shape, block = problem
    assert topology.mask_shape(shape, block) == mask_dims(shape, block)
    counted = blocks_of(torch.ones(shape), block)[:, :, 0].sum((-2, -1)).long()
    assert torch.equal(topology.block_sizes(shape, block), counted)
    assert topology.block_sizes(shape, block).sum() == shape[0] * shape[1]
    sizes = topology.mask_sizes(shape, block)
    assert sizes.shape == mask_dims(shape, block)
    assert torch.equal(sizes.flatten(2).sum(2) if sizes.dim() == 4 else sizes, counted * math.prod(shape[2:]))


@modest
@given(weights(), st.floats(0, 1), st.integers(0, 1000))
def test_random_mask_has_the_count_and_covers_rows_and_columns(
    problem: tuple[tuple[int, ...], tuple[int, int]], share: float, seed: int
) -> None:
    shape, block = problem
    dims = torch.Size(mask_dims(shape, block))
    nnz = round(share * dims.numel())
    mask = topology.random_mask(shape, block, nnz, torch.Generator().manual_seed(seed))
    assert mask.dtype == torch.bool
    assert mask.shape == dims
    assert mask.sum() == nnz
    rows, cols = (mask.reshape(dims[0], -1).any(1).sum(), mask.transpose(0, 1).reshape(dims[1], -1).any(1).sum())
    # No row (column) is left empty while another block could have covered it.
    assert rows == min(nnz, dims[0])
    assert cols == min(nnz, dims[1])
    again = topology.random_mask(shape, block, nnz, torch.Generator().manual_seed(seed))
    assert torch.equal(mask, again)


def test_random_mask_uses_every_block_and_the_global_generator() -> None:
    shape, block = (24, 16, 2, 2), (8, 8)
    total = torch.zeros(mask_dims(shape, block))
    for seed in range(300):
        total += topology.random_mask(shape, block, 8, torch.Generator().manual_seed(seed))
    # 8 of 24 blocks each time: 100 expected for every block, standard deviation about 8.
    assert total.min() > 60
    assert total.max() < 140
    torch.manual_seed(5)
    first = topology.random_mask(shape, block, 8)
    assert not torch.equal(first, topology.random_mask(shape, block, 8))
    torch.manual_seed(5)
    assert torch.equal(first, topology.random_mask(shape, block, 8))


@modest
@given(slotted())
def test_packing_by_slots_is_the_definition(problem: Slotted) -> None:
    shape, block, slots = problem
    assert torch.equal(topology.inside_slots(slots, shape, block), inside(slots, shape, block))
    weight = numbered(shape).requires_grad_()
    values = topology.pack_slots(weight, slots, block)
    assert torch.equal(values, pack_blocks(weight.detach(), slots, block))
    poisoned = torch.where((slots < 0)[:, None, None], math.nan, values.detach()).requires_grad_()
    dense = topology.unpack_slots(poisoned, slots, shape)
    assert torch.equal(dense, unpack_blocks(values.detach(), slots, shape))
    (of_values,) = torch.autograd.grad(dense, poisoned, weight.detach())
    assert torch.equal(of_values, values)
    (of_weight,) = torch.autograd.grad(values, weight, values.detach())
    assert torch.equal(of_weight, dense)


def check_change(change: SlotChange, slots: Tensor, new: Tensor, dims: tuple[int, ...]) -> None:
    """Everything that a change says of itself, against the two masks."""
    old = mask_of(slots, dims)
    assert torch.equal(mask_of(change.slot_blocks, dims), new)
    assert torch.equal(change.before, slots)
    assert change.grown == int((new & ~old).sum())
    assert change.dropped == int((old & ~new).sum())
    entered = change.slot_blocks[change.entered].long()
    assert sorted(entered.tolist()) == (new & ~old).flatten().nonzero()[:, 0].tolist()
    # Anything stored per slot: what belongs to kept blocks is carried, everything else begins at zero.
    stored = slots.double() + 1  # says whose it is; 0 in free slots
    carried = change.apply(stored.clone())
    kept = (change.slot_blocks >= 0) & old.flatten()[change.slot_blocks.long().clamp(min=0)]
    assert torch.equal(carried, torch.where(kept, change.slot_blocks.double() + 1, 0))
    assert set(change.fresh.tolist()) >= set(change.entered.tolist())
    with pytest.raises(ValueError, match="stored"):
        change.apply(torch.zeros(slots.numel() + 1, 2))


@modest
@given(slotted(), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 1000), st.integers(0, 40))
def test_a_change_to_a_mask_keeps_blocks_in_their_slots(
    problem: Slotted, share: float, seed: int, reserve: int
) -> None:
    shape, block, slots = problem
    dims = mask_dims(shape, block)
    new = torch.rand(dims, generator=torch.Generator().manual_seed(seed)) < share
    change = SlotChange.to_mask(slots, new, reserve)
    check_change(change, slots, new, dims)
    before, after, count = slots.numel(), change.slot_blocks.numel(), int(new.sum())
    if count > before:
        assert after == max(count, reserve)  # just enough
    elif before > max(count, reserve) and before - count > 0.1 * before:
        assert after == max(count, reserve)
    else:
        assert after == before
    held = [(slot, rank) for slot, rank in enumerate(slots.tolist()) if rank >= 0 and new.flatten()[rank]]
    assert all(change.slot_blocks[slot] == rank for slot, rank in held if slot < after)
    if before == after:
        assert change.source is None
        touched = (slots != change.slot_blocks).nonzero()[:, 0].tolist()
        assert sorted(change.changed.tolist()) == touched
        # The first free slots are taken, by rising rank.
        free = [slot for slot in range(before) if slot not in dict(held)]
        assert change.entered.tolist() == free[: change.grown]
        assert change.slot_blocks[change.entered].tolist() == sorted(change.slot_blocks[change.entered].tolist())
        stored = torch.zeros(before, 2)
        assert change.apply(stored) is stored


@modest
@given(slotted(), st.integers(0, 1000), st.integers(-3, 3))
def test_a_change_between_any_two_maps(problem: Slotted, seed: int, more: int) -> None:
    shape, block, slots = problem
    dims = mask_dims(shape, block)
    g = torch.Generator().manual_seed(seed)
    new = torch.rand(dims, generator=g) < 0.5
    ranks = torch.cat([new.flatten().nonzero()[:, 0], torch.full((max(more, 0),), -1)])
    after = ranks[torch.randperm(ranks.numel(), generator=g)].to(torch.int32)
    change = SlotChange.between(slots, after)
    assert torch.equal(change.slot_blocks, after)
    check_change(change, slots, new, dims)


@pytest.mark.parametrize(
    "call, error, named",
    [
        (lambda: topology.build_topology(torch.ones(2, 2)), TypeError, "bool"),
        (lambda: topology.build_topology(torch.ones(2, 2, 2, 2, 2, dtype=torch.bool)), ValueError, "mask"),
        (lambda: topology.build_topology(torch.ones(4, dtype=torch.bool)), ValueError, "mask"),
        (lambda: topology.build_topology(torch.ones(2, 2, dtype=torch.bool, device="meta")), ValueError, "meta"),
        (lambda: topology.pack(torch.ones(4, 4), torch.ones(2, 1, dtype=torch.bool), (2, 2)), ValueError, "mask"),
        (lambda: topology.unpack(torch.ones(1, 2, 2), torch.ones(1, 1, dtype=torch.bool), (4, 4)), ValueError, "mask"),
        (lambda: topology.random_mask((4, 4), (2, 2), 5), ValueError, "nnz"),
        (lambda: topology.random_mask((4, 4), (2, 2), -1), ValueError, "nnz"),
        (lambda: topology.random_mask((4, 4), (2, 2), 1, groups=3), ValueError, "groups must divide the 2 block rows"),
        (lambda: topology.unpack(torch.ones(3, 2, 2), torch.eye(2, dtype=torch.bool), (4, 4)), ValueError, "values"),
        (lambda: topology.topology_of_slots(torch.tensor([1, 1]).int(), (2, 2)), ValueError, "slot_blocks .* once"),
        (lambda: topology.topology_of_slots(torch.tensor([0, 4]).int(), (2, 2)), ValueError, "slot_blocks .* below 4"),
        (lambda: topology.topology_of_slots(torch.tensor([0, 4]), (2, 2)), TypeError, "slot_blocks .* int32"),
        (lambda: topology.row_major_slots(torch.ones(2, 2)), TypeError, "bool"),
    ],
)
def test_wrong_argument_is_named(call: object, error: type[Exception], named: str) -> None:
    assert callable(call)
    with pytest.raises(error, match=named):
        call()
