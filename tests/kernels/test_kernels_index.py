"""Index lists of the Triton kernels against lists written out with loops, and when they are made anew."""

from __future__ import annotations

import doctest
import gc
import importlib
import itertools
import pkgutil
import weakref

import pytest
import torch

import ddst.kernels
from ddst.index_cache import refresh
from ddst.kernels import index
from ddst.kernels.launch import Launch
from helpers.dense import active_blocks, topology_of
from helpers.slots import scatter

SHAPES = [
    ((40, 60, 3, 3), (16, 16), (1, 1), (1, 1), (1, 1)),
    ((40, 60, 3, 2), (16, 32), (2, 3), (1, 4), (1, 2)),
    ((33, 20, 4, 4), (32, 16), (2, 2), (1, 1), (2, 1)),
    ((16, 70, 1, 1), (16, 16), (2, 1), (0, 0), (1, 1)),
    ((20, 20, 1, 40), (16, 16), (1, 2), (0, 3), (1, 1)),
]
MASKS = ["0.3", "none", "full", "empty_lines"]


def make(weight_shape: tuple[int, ...], block: tuple[int, int], kind: str) -> torch.Tensor:
    rows, cols = (-(-weight_shape[i] // block[i]) for i in (0, 1))
    mask = torch.full((rows, cols, *weight_shape[2:]), kind == "full")
    if kind == "0.3":
        mask = torch.rand(mask.shape) < 0.3
    if kind == "empty_lines":
        mask = torch.rand(mask.shape) < 0.8
        mask[0], mask[:, -1] = False, False
    return mask


def unpack(entry: int, bits: int) -> tuple[int, int, int]:
    return entry >> 2 * bits, (entry >> bits) % 2**bits, entry % 2**bits


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("weight_shape, block, stride, padding, dilation", SHAPES)
@pytest.mark.parametrize("free", [0, 5])
def test_row_lists(free, weight_shape, block, stride, padding, dilation, kind) -> None:  # type: ignore[no-untyped-def]
    mask = make(weight_shape, block, kind)
    slots, blocks = scatter(mask, free), active_blocks(mask)
    topology = slots.topology
    rows, cols, width = mask.shape[0], mask.shape[1], weight_shape[3]
    bits = index.tap_bits(weight_shape[2:])

    forward: list[list[tuple[int, ...]]] = [[] for _ in range(rows)]
    backward: list[list[tuple[int, ...]]] = [[] for _ in range(stride[0] * stride[1] * cols)]
    for number, (row, col, tap) in zip(slots.of_block.tolist(), blocks, strict=True):
        kh, kw = divmod(tap, width)
        forward[row].append((number, col, kh, kw))
        phase_h = next(p for p in range(stride[0]) if (p + padding[0] - kh * dilation[0]) % stride[0] == 0)
        phase_w = next(p for p in range(stride[1]) if (p + padding[1] - kw * dilation[1]) % stride[1] == 0)
        backward[(phase_h * stride[1] + phase_w) * cols + col].append((number, row, kh, kw))

    made = {
        "forward": (index.forward_lists(topology, weight_shape, block), forward),
        "input_grad": (index.input_grad_lists(topology, weight_shape, block, stride, padding, dilation), backward),
    }
    for op, (lists, wanted) in made.items():
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in lists), op
        ptr, entries, ids, order = (t.tolist() for t in lists)
        found = [[(ids[p], *unpack(entries[p], bits)) for p in range(*ptr[r : r + 2])] for r in range(len(wanted))]
        assert found == wanted, op
        assert len(entries) == len(ids) == slots.count + 1, "one to read ahead; the size does not tell of free slots"
        assert sorted(order) == list(range(len(wanted)))
        assert [len(wanted[r]) for r in order] == sorted((len(w) for w in wanted), reverse=True), "heavy rows first"


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("weight_shape, block, stride, padding, dilation", SHAPES)
@pytest.mark.parametrize("rows, free", [(2, 0), (4, 0), (2, 7)])
def test_rows_in_groups(rows, free, weight_shape, block, stride, padding, dilation, kind) -> None:  # type: ignore[no-untyped-def]
    """A group's entries are those of its rows, each once, in their order; phases are not mixed."""
    topology = scatter(make(weight_shape, block, kind), free).topology
    geometry = (stride, padding, dilation)
    across = {"forward": -(-weight_shape[0] // block[0]), "input_grad": -(-weight_shape[1] // block[1])}
    pairs = {
        "forward": [index.forward_lists(topology, weight_shape, block, n) for n in (1, rows)],
        "input_grad": [index.input_grad_lists(topology, weight_shape, block, *geometry, n) for n in (1, rows)],
    }
    for op, (alone, shared) in pairs.items():
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in shared), op
        ptr, entries, ids = alone.ptr.tolist(), alone.entries.tolist(), alone.ids.tolist()
        by_row = [dict(zip(entries[a:b], ids[a:b], strict=True)) for a, b in itertools.pairwise(ptr)]
        wanted = []
        for first in range(0, len(by_row), across[op]):
            phase = by_row[first : first + across[op]]
            for group in (phase[n : n + rows] for n in range(0, len(phase), rows)):
                group += [{}] * (rows - len(group))
                wanted.append([(e, *[row.get(e, -1) for row in group]) for e in sorted(set().union(*group))])
        ptr, entries, ids = shared.ptr.tolist(), shared.entries.tolist(), shared.ids.view(-1, rows).tolist()
        lines = [(e, *own) for e, own in zip(entries, ids, strict=True)]
        found = [lines[a:b] for a, b in itertools.pairwise(ptr)]
        assert found == wanted, op
        assert len(entries) == len(ids) == len(alone.entries), "one to read ahead"
        assert [len(wanted[g]) for g in shared.order.tolist()] == sorted((len(w) for w in wanted), reverse=True)
        assert sorted(shared.order.tolist()) == list(range(len(wanted)))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("by", ["row", "col"])
@pytest.mark.parametrize("free", [0, 1, 6])
def test_weight_grad_groups(free: int, by: str, size: int, kind: str) -> None:
    """Every slot is in one group; a group's blocks share what they must, or are all free slots; as few groups as their
    number allows.
    """
    weight_shape, block = (70, 60, 3, 2), (16, 16)
    mask = make(weight_shape, block, kind)
    slots, blocks = scatter(mask, free), active_blocks(mask)
    made = index.weight_grad_groups(slots.topology, weight_shape, block, by, size)
    runs = mask.shape[0] if by == "row" else mask.shape[1] * 6
    assert len(made.bounds) == index.most_groups(slots.count, runs, size)
    bounds, ids = made.bounds.tolist(), made.ids.tolist()
    held = list(zip(made.row.tolist(), made.col.tolist(), made.tap.tolist(), strict=True))
    assert [held[slot] for slot in slots.of_block.tolist()] == blocks
    nothing = (mask.shape[0], mask.shape[1], 0)
    groups = [[held[i] for i in ids[first:end]] for first, end in bounds]
    groups = [g for g in groups if g]
    assert sorted(b for g in groups for b in g) == [*blocks, *[nothing] * free]
    assert all(g == sorted(g) for g in groups), "neighbours read the same pixels"
    shared = [{b[0] if by == "row" else b[1:] for b in g} for g in groups]
    assert all(len(s) == 1 for s in shared) and all(len(g) <= size for g in groups)
    lines = {b[0] if by == "row" else b[1:] for b in blocks}
    wanted = sum(-(-sum((b[0] if by == "row" else b[1:]) == line for b in blocks) // size) for line in lines)
    assert len(groups) == wanted + -(-free // size)
    with pytest.raises(ValueError, match="by must be 'row' or 'col', got 'tap'"):
        index.weight_grad_groups(slots.topology, weight_shape, block, "tap", size)


ARGUMENTS = ((32, 32, 3, 3), (16, 16))


def some_topology(seed: int = 0) -> torch.Tensor:
    return topology_of(torch.rand(2, 2, 3, 3, generator=torch.Generator().manual_seed(seed)) < 0.5)


def test_lists_are_kept() -> None:
    topology = some_topology()
    lists = index.forward_lists(topology, *ARGUMENTS)
    assert index.forward_lists(topology, *ARGUMENTS) is lists
    assert index.forward_lists(topology.clone(), *ARGUMENTS) is not lists, "by identity"
    one = index.input_grad_lists(topology, *ARGUMENTS, (1, 1), (1, 1), (1, 1))
    two = index.input_grad_lists(topology, *ARGUMENTS, (2, 2), (1, 1), (1, 1))
    assert one.ptr.numel() == 3 and two.ptr.numel() == 9, "by geometry"
    assert index.input_grad_lists(topology, *ARGUMENTS, (1, 1), (1, 1), (1, 1)) is one


def every_list(topology: torch.Tensor) -> list[torch.Tensor]:
    made: list[tuple[torch.Tensor, ...]] = []
    for rows in (1, 2):
        made.append(index.forward_lists(topology, *ARGUMENTS, rows))
        made.append(index.input_grad_lists(topology, *ARGUMENTS, (2, 1), (1, 1), (1, 1), rows))
    made += [index.weight_grad_groups(topology, *ARGUMENTS, by, 2) for by in ("row", "col")]
    return [t for lists in made for t in lists]


def test_an_exchange_rewrites_every_list_at_its_address() -> None:
    """What a captured graph walks: between replays blocks move, and another number of slots becomes free."""
    masks = [torch.rand(2, 2, 3, 3, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in (0, 1, 2)]
    arranged = [scatter(mask, free=30 - int(mask.sum()), seed=seed) for seed, mask in enumerate(masks)]
    assert len({int(mask.sum()) for mask in masks}) > 1
    topology = arranged[0].topology.clone()
    kept = every_list(topology)
    addresses = [t.data_ptr() for t in kept]
    for slots in arranged[1:]:
        topology.copy_(slots.topology)
        refresh(topology)
        assert all(torch.equal(*pair) for pair in zip(kept, every_list(slots.topology), strict=True))
        again = every_list(topology)
        assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in again] == addresses
    topology.copy_(arranged[0].topology)  # as a call finds it that nobody told of the exchange
    assert all(torch.equal(*pair) for pair in zip(every_list(topology), every_list(arranged[0].topology), strict=True))
    assert [t.data_ptr() for t in every_list(topology)] == addresses


def test_lists_die_with_the_topology() -> None:
    """No list, and nothing that would make it anew, holds the topology."""
    topology = some_topology()
    kept = [weakref.ref(t) for t in every_list(topology)]
    gc.collect()
    assert all(ref() is not None for ref in kept)
    del topology
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_the_device_is_never_waited_for() -> None:
    """Operations whose result has a size, or a value, that the host must learn from the device."""
    waits = {"nonzero", "bincount", "item", "_local_scalar_dense", "unique_dim", "_unique2", "masked_select", "equal"}
    topology = some_topology()
    called: set[str] = set()

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Record():
        index.forward_lists(topology, *ARGUMENTS)
        index.input_grad_lists(topology, *ARGUMENTS, (2, 2), (1, 1), (1, 1))
        index.forward_lists(topology, *ARGUMENTS, 2)
        for by in ("row", "col"):
            index.weight_grad_groups(topology, *ARGUMENTS, by, 2)
    assert "empty" in "".join(called), "the record works"
    assert not called & waits


def test_a_list_is_rewritten_by_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And into its memory: nothing else is made but the kernel's table."""
    topology = some_topology()
    kept = every_list(topology)
    launched: list[str] = []
    run = Launch.__call__

    def launch(self: Launch, *tensors: torch.Tensor) -> None:
        launched.append(self.kernel.__name__)
        run(self, *tensors)

    monkeypatch.setattr(Launch, "__call__", launch)
    topology.add_(0)  # written to
    refresh(topology)
    assert sorted(launched) == ["groups_kernel"] * 2 + ["row_lists_kernel"] * 4
    assert all(a is b for a, b in zip(kept, every_list(topology), strict=True))
    assert len(launched) == 6, "they are up to date"


MODULES = ["ddst.kernels", *(f"ddst.kernels.{m.name}" for m in pkgutil.iter_modules(ddst.kernels.__path__))]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    """Of docstrings; tests/test_doctests.py must not import these modules outside the interpreter."""
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0
