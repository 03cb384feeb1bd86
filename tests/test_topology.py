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
from helpers.dense import active_blocks, active_entries, blocks_of, mask_dims, pack_blocks, topology_of, unpack_blocks

modest = settings(max_examples=60, deadline=None)
pairs = st.tuples(st.integers(1, 9), st.integers(1, 9))


@st.composite
def weights(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, int]]:
    """(weight shape, block) of a linear or a convolution weight."""
    shape = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    taps = draw(st.one_of(st.just(()), st.tuples(st.integers(1, 3), st.integers(1, 3))))
    return (*shape, *taps), draw(pairs)


@st.composite
def masked(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, int], Tensor]:
    """(weight shape, block, mask), the mask anything from empty to full."""
    shape, block = draw(weights())
    share = draw(st.sampled_from([0.0, 0.05, 0.3, 0.8, 1.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return shape, block, torch.rand(mask_dims(shape, block), generator=g) < share


def numbered(shape: tuple[int, ...]) -> Tensor:
    """A dense weight whose entries are all different and none zero."""
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


@modest
@given(masked())
def test_topology_is_the_documented_vector(problem: tuple[tuple[int, ...], tuple[int, int], Tensor]) -> None:
    _, _, mask = problem
    vector = topology.build_topology(mask)
    assert vector.dtype == torch.int32
    assert vector.dim() == 1
    assert vector.is_contiguous()
    assert torch.equal(vector, topology_of(mask))
    rows, cols, count = mask.shape[0], mask.shape[1], len(active_blocks(mask))
    assert (vector.numel() - rows - cols - 2) / 4 == count
    index = topology.split_topology(vector, rows, cols)
    assert index.row_ptr[-1] == index.col_ptr[-1] == count
    assert torch.equal(index.row_ptr.diff(), mask.reshape(rows, -1).sum(1))
    assert torch.equal(index.col_ptr.diff(), mask.transpose(0, 1).reshape(cols, -1).sum(1))
    order = index.col_order.long()
    assert sorted(order.tolist()) == list(range(count))
    keys = list(
        zip(*(part[order].tolist() for part in (index.block_col, index.block_row, index.block_tap)), strict=True)
    )
    assert keys == sorted(keys)


@modest
@given(masked())
def test_host_builders_give_the_same_vector(problem: tuple[tuple[int, ...], tuple[int, int], Tensor]) -> None:
    _, _, mask = problem
    vector = topology.build_topology(mask).numpy()
    for build in (_host.build_topology, _host.build_topology_python):
        built = build(mask.numpy())
        assert built.dtype == vector.dtype
        assert (built == vector).all()


def test_the_compiled_host_module_is_the_one_tested_where_it_was_built() -> None:
    try:
        compiled = importlib.import_module("ddst._lib._host")
    except ModuleNotFoundError:
        assert _host.IMPLEMENTATION == "python"
        pytest.skip("no compiled host module for this Python")
    assert _host.IMPLEMENTATION == "pybind11"
    mask = torch.rand(5, 4, 3, 3) < 0.4
    assert (compiled.build_topology(mask.numpy()) == topology_of(mask).numpy()).all()
    transposed = mask.numpy().transpose(1, 0, 3, 2)  # not contiguous
    assert (compiled.build_topology(transposed) == topology_of(mask.permute(1, 0, 3, 2)).numpy()).all()


@modest
@given(masked())
def test_pack_and_unpack_are_the_definition_and_invert_each_other(
    problem: tuple[tuple[int, ...], tuple[int, int], Tensor],
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
    problem: tuple[tuple[int, ...], tuple[int, int], Tensor],
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
@given(masked(), st.integers(0, 1000))
def test_mask_change_carries_kept_blocks_over(
    problem: tuple[tuple[int, ...], tuple[int, int], Tensor], seed: int
) -> None:
    shape, block, old = problem
    new = torch.rand(old.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    change = topology.MaskChange.between(old, new)
    weight = numbered(shape)
    carried = change.apply(topology.pack(weight, old, block))
    both = old & new
    expected = torch.zeros(int(new.sum()), *block, dtype=torch.float64)
    expected[both[new]] = pack_blocks(weight, both, block)
    assert torch.equal(carried, expected)
    assert torch.equal(change.grown, ~old[new])
    assert change.source.dtype == torch.int64
    assert torch.equal(change.source[change.grown], torch.full((int((new & ~old).sum()),), -1))
    # Anything stored per block: ids come out in order, and any trailing shape is carried.
    ids = torch.arange(int(old.sum()))
    assert torch.equal(change.apply(ids)[~change.grown], change.source[~change.grown])
    assert torch.equal(change.source[~change.grown], ids[new[old]])


def test_mask_change_refuses_a_tensor_of_another_mask_and_keeps_copies_of_the_masks() -> None:
    old, new = torch.tensor([[True, True, False]]), torch.tensor([[False, True, True]])
    change = topology.MaskChange.between(old, new)
    with pytest.raises(ValueError, match="stored"):
        change.apply(torch.zeros(3, 2, 2))
    assert change.apply(torch.tensor([1.0, 2.0])).tolist() == [2.0, 0.0]
    old.fill_(False)
    new.fill_(False)
    assert change.old_mask.tolist() == [[True, True, False]]
    assert change.new_mask.tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    "call, error, named",
    [
        (lambda: topology.build_topology(torch.ones(2, 2)), TypeError, "bool"),
        (lambda: topology.build_topology(torch.ones(2, 2, 2, dtype=torch.bool)), ValueError, "mask"),
        (lambda: topology.build_topology(torch.ones(4, dtype=torch.bool)), ValueError, "mask"),
        (lambda: topology.build_topology(torch.ones(2, 2, dtype=torch.bool, device="meta")), ValueError, "meta"),
        (lambda: topology.pack(torch.ones(4, 4), torch.ones(2, 1, dtype=torch.bool), (2, 2)), ValueError, "mask"),
        (lambda: topology.unpack(torch.ones(1, 2, 2), torch.ones(1, 1, dtype=torch.bool), (4, 4)), ValueError, "mask"),
        (lambda: topology.random_mask((4, 4), (2, 2), 5), ValueError, "nnz"),
        (lambda: topology.random_mask((4, 4), (2, 2), -1), ValueError, "nnz"),
        (lambda: topology.unpack(torch.ones(3, 2, 2), torch.eye(2, dtype=torch.bool), (4, 4)), ValueError, "values"),
        (lambda: _host.build_topology(torch.ones(2, 2).numpy()), TypeError, "mask"),
        (lambda: _host.build_topology(torch.ones(2, dtype=torch.bool).numpy()), ValueError, "mask"),
        (lambda: _host.build_topology_python(torch.ones(2, 2).numpy()), TypeError, "mask"),
        (lambda: _host.build_topology_python(torch.ones(2, dtype=torch.bool).numpy()), ValueError, "mask"),
    ],
)
def test_wrong_argument_is_named(call: object, error: type[Exception], named: str) -> None:
    assert callable(call)
    with pytest.raises(error, match=named):
        call()
