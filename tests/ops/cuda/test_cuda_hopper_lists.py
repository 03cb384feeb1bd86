"""What the gather kernel for sm_90a walks, beside its definition written out; needs no GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddst import topology as tp
from ddst.ops.cuda import hopper_lists
from helpers.slots import Slots, scatter

SIDES = (16, 32, 64)


def by_definition(
    slots: Slots, mask: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int], stride: tuple[int, int],
    *, input_gradient: bool, granules: int,
) -> tuple[list[list[int]], list[int]]:  # fmt: skip
    """The lists, entry by entry."""
    ids = torch.full(mask.shape, -1)
    ids[mask] = slots.of_block.clone().detach()
    ids = ids.transpose(0, 1).flatten(2) if input_gradient else ids.flatten(2)
    side = block[1] if input_gradient else block[0]
    phases = [(y, x) for y in range(stride[0]) for x in range(stride[1])] if input_gradient else [(0, 0)]
    outs, ins, taps = ids.shape
    per_group, together = 128 // side, max(1, granules * 16 // side)
    records, work = [], []
    for phase in phases:
        for first in range(0, outs, per_group):
            work.append(0)
            for inner in range(ins):
                entries, listed = [], []
                for tap in range(taps):
                    y, x = divmod(tap, shape[3])
                    if input_gradient and (y % stride[0], x % stride[1]) != phase:
                        continue
                    here = [int(i) for i in ids[first : first + per_group, inner, tap]]
                    here += [-1] * (per_group - len(here))
                    bits = 0
                    for place in range(0, per_group, together):
                        unit = here[place : place + together]
                        if max(unit) >= 0:
                            listed += [(i if i >= 0 else slots.count) * block[0] for i in unit]
                            bits |= ((1 << together * side // 16) - 1) << place * side // 16
                    if bits:
                        entries.append(tap + (bits << 16))
                work[-1] += len(listed)
                head = [len(listed), 0, 0, 0]
                room, padded = -(-taps * per_group // 4) * 4, -(-(taps + 1) // 4) * 4
                entries += [0] * (padded - len(entries))
                records.append(head + entries + listed + [0] * (room - len(listed)))
    return records, sorted(range(len(work)), key=lambda i: -work[i])


@given(
    out=st.integers(1, 200), into=st.integers(1, 100), kernel=st.sampled_from([(1, 1), (3, 3), (2, 3), (4, 4)]),
    block=st.tuples(st.sampled_from(SIDES), st.sampled_from(SIDES)), stride=st.sampled_from([(1, 1), (2, 2), (1, 2)]),
    input_gradient=st.booleans(), granules=st.sampled_from([1, 4]), density=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    free=st.sampled_from([0, 3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_lists_are_those_of_the_definition(
    out: int, into: int, kernel: tuple[int, int], block: tuple[int, int], stride: tuple[int, int],
    input_gradient: bool, granules: int, density: float, free: int, seed: int,
) -> None:  # fmt: skip
    shape = (out, into, *kernel)
    mask = torch.rand(tp.mask_shape(shape, block), generator=torch.Generator().manual_seed(seed)) < density
    slots = scatter(mask, free, seed)
    index = tp.split_topology(slots.topology, *mask.shape[:2])
    options = {"input_gradient": input_gradient, "granules": granules}
    records, order = hopper_lists.records_and_order(index, shape, block, stride, **options)
    expected, expected_order = by_definition(slots, mask, shape, block, stride, **options)
    assert records.tolist() == expected
    assert order.tolist() == expected_order
    assert records.dtype == order.dtype == torch.int32
    assert records.shape[1] == hopper_lists.record_ints(kernel[0] * kernel[1], 128 // block[input_gradient])[0]


def test_more_rows_than_int32_can_number_are_refused() -> None:
    many = tp.Index(*(torch.zeros(1, dtype=torch.int32).expand(2**27) for _ in tp.Index._fields))
    with pytest.raises(ValueError, match="fewer than 2\\^31 rows, got 2147483648"):
        hopper_lists.records_and_order(many, (256, 256, 3, 3), (16, 16), (1, 1), input_gradient=False, granules=1)


@pytest.mark.parametrize("granules", [1, 4])
def test_sizes_follow_from_the_shape_alone(granules: int) -> None:
    """So that lists can be rewritten in place under a captured graph."""
    shapes = set()
    for density in (0.0, 0.3, 1.0):
        mask = torch.rand(16, 16, 3, 3, generator=torch.Generator().manual_seed(1)) < density
        index = tp.split_topology(tp.build_topology(mask), 16, 16)
        lists = hopper_lists.records_and_order(
            index, (256, 256, 3, 3), (16, 16), (1, 1), input_gradient=False, granules=granules
        )
        shapes.add(tuple(tuple(t.shape) for t in lists))
    assert shapes == {((32, 88), (2,))}
