"""Lists of the CUDA C++ kernels by one launch, in the interpreter, beside those by operations of torch.

What the latter hold is tested entry by entry against definitions in tests/cuda and tests/ops/cuda.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddst import topology as tp
from ddst.index_cache import refresh
from ddst.kernels.launch import Launch
from ddst.ops.cuda import gather, kept_lists
from ddst.ops.cuda.gather import Records
from ddst.ops.cuda.hopper_lists import RecordsAndOrder
from ddst.ops.cuda.weight_grad_units import Units
from helpers.slots import scatter

POISON = -77777


def tensors(lists: Any) -> tuple[Tensor, ...]:
    return lists if isinstance(lists, tuple) else (lists,)


def launched(listing: Any, topology: Tensor) -> tuple[Tensor, ...]:
    """What the launch writes over poison."""
    lists = listing.empty(topology)
    for tensor in tensors(lists):
        tensor.fill_(POISON)
    listing.rewrite(topology, lists)
    return tensors(lists)


def listing_of(kind: str, shape: tuple[int, ...], block: tuple[int, int], rng: random.Random) -> Any:
    gradient = rng.random() < 0.5
    phases = (rng.randint(1, 2), rng.randint(1, 2)) if gradient else (1, 1)
    if kind == "records":
        return Records(shape, block, phases, gradient, rng.choice([64, 128]))
    if kind == "hopper":
        return RecordsAndOrder(shape, block, phases, gradient, rng.choice([1, 4]))
    return Units(tp.grid(shape, block), block, (rng.randint(1, 5), rng.randint(1, 5)), rng.choice([8, 16]))


@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("block", [(16, 16), (16, 64), (32, 16), (64, 64)], ids=str)
@pytest.mark.parametrize("kind", ["records", "hopper", "units"])
def test_a_launch_writes_what_the_operators_make(kind: str, block: tuple[int, int], density: float) -> None:
    """Whatever the shape, the stride, the slots, and what lay in the memory before."""
    rng = random.Random(f"{kind} {block} {density}")
    for seed in range(4):
        shape = (rng.randint(1, 400), rng.randint(1, 300), rng.randint(1, 4), rng.randint(1, 4))
        mask = torch.rand(tp.mask_shape(shape, block), generator=torch.Generator().manual_seed(seed)) < density
        topology = scatter(mask, free=rng.choice([0, 1, 30]) + (not mask.any()), seed=seed).topology
        listing = listing_of(kind, shape, block, rng)
        for made, wanted in zip(launched(listing, topology), tensors(listing.by_operators(topology)), strict=True):
            assert made.dtype == wanted.dtype == torch.int32 and made.is_contiguous()
            assert made.shape == wanted.shape and torch.equal(made, wanted), f"{listing} of {shape}"


@pytest.mark.parametrize("kind", ["records", "hopper", "units"])
def test_lists_longer_than_a_tile(kind: str) -> None:
    """More groups, bands and slots than the program takes at a time."""
    shape, block = (1200, 1100, 1, 1), (16, 16)
    mask = torch.rand(tp.mask_shape(shape, block), generator=torch.Generator().manual_seed(0)) < 0.4
    topology = scatter(mask, free=9).topology
    listing = {
        "records": Records(shape, block, (2, 2), True, 64),
        "hopper": RecordsAndOrder(shape, block, (3, 3), True, 4),
        "units": Units(tp.grid(shape, block), block, (5, 4), 8),
    }[kind]
    assert all(map(torch.equal, launched(listing, topology), tensors(listing.by_operators(topology))))


def test_groups_without_blocks_keep_their_order() -> None:
    """Of equal groups the first comes first."""
    mask = torch.zeros(40, 2, 1, 1, dtype=torch.bool)
    mask[17, 1] = mask[33, 0] = True
    _, order = launched(RecordsAndOrder((640, 32, 1, 1), (16, 16), (1, 1), False, 1), tp.build_topology(mask))
    assert order.tolist() == [2, 4, 0, 1, 3]


SHAPE, BLOCK = (96, 80, 3, 3), (16, 16)


def every_list(topology: Tensor) -> list[Tensor]:
    listings = (
        Records(SHAPE, BLOCK, (1, 1), False, 64), Records(SHAPE, BLOCK, (2, 2), True, 128),
        RecordsAndOrder(SHAPE, BLOCK, (1, 1), False, 1), RecordsAndOrder(SHAPE, BLOCK, (1, 2), True, 4),
        Units(tp.grid(SHAPE, BLOCK), BLOCK, (4, 3), 8),
    )  # fmt: skip
    return [tensor for listing in listings for tensor in tensors(kept_lists.kept(topology, listing))]


def test_an_exchange_rewrites_a_list_at_its_address_by_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else happens but that workspace is taken: no operation of torch, no wait for the device."""
    monkeypatch.setattr(kept_lists, "is_launched", lambda topology: True)
    masks = [torch.rand(6, 5, 3, 3, generator=torch.Generator().manual_seed(seed)) < 0.4 for seed in (0, 1, 2)]
    arranged = [scatter(mask, free=140 - int(mask.sum()), seed=seed) for seed, mask in enumerate(masks)]
    topology = arranged[0].topology.clone()
    kept = every_list(topology)
    addresses = [tensor.data_ptr() for tensor in kept]
    launches: list[str] = []
    called: set[str] = set()
    run = Launch.__call__

    def launch(self: Launch, *tensors: Tensor) -> None:
        launches.append(self.kernel.__name__)
        with torch.utils._python_dispatch._disable_current_modes():
            run(self, *tensors)

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(Launch, "__call__", launch)
    for slots in arranged[1:]:
        launches.clear()
        topology.copy_(slots.topology)
        with Record():
            refresh(topology)
        assert sorted(launches) == [
            "gather_records_kernel", "gather_records_kernel", "hopper_records_kernel", "hopper_records_kernel",
            "units_kernel",
        ]  # fmt: skip
        assert all(map(torch.equal, kept, every_list(slots.topology.clone())))
        assert [tensor.data_ptr() for tensor in every_list(topology)] == addresses
    assert called == {"new_empty"}


def test_operators_make_lists_where_nothing_can_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on a CUDA device, or without Triton."""
    topology = tp.build_topology(torch.ones(6, 5, 3, 3, dtype=torch.bool))
    on_a_device: Any = SimpleNamespace(is_cuda=True)
    assert not kept_lists.is_launched(topology) and kept_lists.is_launched(on_a_device)
    monkeypatch.setattr(kept_lists, "has_triton", lambda: False)
    assert not kept_lists.is_launched(on_a_device)
    monkeypatch.setattr(Launch, "__call__", lambda *_: pytest.fail("launched"))
    records = kept_lists.kept(topology, Records(SHAPE, BLOCK, (1, 1), False, 64))
    index = tp.split_topology(topology, 6, 5)
    wanted = gather.gather_records(index, SHAPE, BLOCK, (1, 1), input_gradient=False, tile_channels=64)
    assert torch.equal(records, wanted)


def test_rows_that_int32_cannot_number_are_refused_before_memory_is_taken() -> None:
    many = torch.zeros(1, dtype=torch.int32).expand(16 + 16 + 2 + 5 * 2**27)
    with pytest.raises(ValueError, match="fewer than 2\\^31 rows, got 2147483648"):
        RecordsAndOrder((256, 256, 3, 3), BLOCK, (1, 1), False, 1).empty(many)
