"""The plan and the lists of the CUDA weight gradient, which need no GPU; the kernels are tested in tests/cuda."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddst import topology as tp
from ddst.ops.cuda import weight_grad as cwg
from helpers.slots import Slots, scatter

BLOCKS = [(rows, cols) for rows in (16, 32, 64) for cols in (16, 32, 64)]
H200 = cwg.Device(multiprocessors=132, shared_bytes=227 * 1024)
A100 = cwg.Device(multiprocessors=108, shared_bytes=163 * 1024)


def lists(
    mask: torch.Tensor, block: tuple[int, int], band: tuple[int, int], slots: Slots | None = None
) -> torch.Tensor:
    rows, cols = mask.shape[:2]
    grid = (rows, cols, mask.shape[2:].numel())
    topology = tp.build_topology(mask) if slots is None else slots.topology
    return cwg.list_units(tp.split_topology(topology, rows, cols), grid, block, band)


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
    block=st.sampled_from(BLOCKS), band=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]), free=st.sampled_from([0, 1, 40]), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_unit_stands_once_in_a_group_of_its_band(
    shape: tuple[int, int, int, int],
    block: tuple[int, int],
    band: tuple[int, int],
    density: float,
    free: int,
    seed: int,
) -> None:
    """Whatever slots the blocks lie in; free slots form the last groups that are not empty."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    slots = scatter(mask, free, seed)
    units = lists(mask, block, band, slots)
    parts, per_warp = cwg.parts_of(block)
    bands = -(-shape[0] // band[0]) * -(-shape[1] // band[1])
    assert units.shape == (cwg.most_groups(slots.count, bands, block), cwg.WARPS, per_warp)
    assert units[units >= 0].sort()[0].tolist() == list(range(slots.count * parts))
    block_of = torch.full((slots.count,), -1)
    block_of[slots.of_block] = torch.arange(len(slots.of_block))
    row, col = mask.nonzero()[:, 0], mask.nonzero()[:, 1]
    seen = "blocks"
    for group in units:
        present = group[group >= 0].long() // parts
        if not len(present):
            seen = "nothing"
            continue
        assert seen != "nothing"
        assert group[0, 0] >= 0
        counts = (group >= 0).sum(1)
        assert counts.max() - counts.min() <= 1
        assert bool((group.sort(dim=1, descending=True, stable=True)[0] >= 0).eq(group >= 0).all())
        blocks = block_of[present]
        if blocks[0] < 0:
            seen = "free slots"
            assert bool((blocks < 0).all())
            continue
        assert seen == "blocks"
        assert len(set(zip((row[blocks] // band[0]).tolist(), (col[blocks] // band[1]).tolist(), strict=True))) == 1
        assert blocks.tolist() == sorted(blocks.tolist()), "neighbours share output rows"


def test_groups_of_a_band_are_even() -> None:
    """70 units of a band are two groups of 35, not one of 64 and one of 6."""
    mask = torch.zeros(8, 10, 1, 1, dtype=torch.bool)
    mask[:7] = True
    assert (lists(mask, (16, 16), (8, 10)) >= 0).sum((1, 2)).tolist()[:2] == [35, 35]


LAYERS = [  # images, size, weight, stride, padding
    (64, 32, (256, 256, 3, 3), 1, 1),
    (128, 32, (128, 128, 3, 3), 1, 1),
    (64, 4, (512, 512, 3, 3), 1, 1),
    (64, 16, (256, 128, 4, 4), 2, 1),
    (64, 8, (1024, 1024, 1, 1), 1, 0),
]


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_plans_of_layers_that_people_train(layer, block: tuple[int, int], density: float) -> None:
    images, size, weight, stride, padding = layer
    out = (size + 2 * padding - weight[2]) // stride + 1
    geometry = cwg.Geometry(images, (size,) * 2, (out,) * 2, weight, block, (stride,) * 2, (padding,) * 2, (1, 1))
    geometry, _ = cwg.flattened(geometry)
    nnz = max(1, int(math.prod(tp.grid(weight, block)) * density))
    for itemsize, allow_tf32, ctas in ((2, True, 2), (4, True, 2), (4, False, 1)):
        for device in (H200, A100):
            plan = cwg.plan(geometry, nnz, itemsize, device, allow_tf32=allow_tf32)
            assert ctas * cwg.shared_bytes(geometry, plan.band, plan.tile, itemsize) <= device.shared_bytes
            sizes = (geometry.images, *geometry.output_size)
            tiles = math.prod(-(-n // t) for n, t in zip(sizes, plan.tile, strict=True))
            multiplied = tiles * -(-math.prod(plan.tile) // 16) * 16
            assert multiplied <= 1.2 * math.prod(sizes)
            assert plan.shares == 1 or plan.shares <= min(tiles, ctas * device.multiprocessors)


def test_a_slowly_changing_density_keeps_the_plan() -> None:
    geometry = cwg.Geometry(64, (32, 32), (32, 32), (256, 256, 3, 3), (16, 16), (1, 1), (1, 1), (1, 1))
    plans = [cwg.plan(geometry, nnz, 2, H200) for nnz in (231, 232)]
    assert plans[0].band == plans[1].band and plans[0].tile == plans[1].tile
    bands = 16 // plans[0].band[0] * -(-16 // plans[0].band[1])
    assert [p.groups for p in plans] == [cwg.most_groups(nnz, bands, (16, 16)) for nnz in (231, 232)]


def test_a_kernel_that_cannot_fit_is_refused() -> None:
    geometry = cwg.Geometry(1, (999, 999), (9, 9), (16, 16, 3, 3), (16, 16), (1, 1), (0, 0), (495, 495))
    with pytest.raises(ValueError, match=r"kernel of \[3, 3\] with dilation \[495, 495\] needs more .*'triton'"):
        cwg.plan(geometry, 9, 2, H200)
    assert cwg.refusal(geometry._replace(dilation=(1, 1)), 2, H200.shared_bytes) == ""


def test_nothing_to_sum_is_zero() -> None:
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    x, geometry = torch.ones(2, 16, 5, 5), ((16, 16, 3, 3), (16, 16), (1, 1), (1, 1), (1, 1))
    assert cwg.conv2d_weight_grad(x, x, tp.build_topology(mask), *geometry).shape == (0, 16, 16)
    full = cwg.conv2d_weight_grad(x[:0], x[:0], tp.build_topology(~mask), *geometry)
    assert full.shape == (9, 16, 16) and bool((full == 0).all())
    linear = cwg.linear_weight_grad(
        x[:0, :, 0, 0], x[:0, :, 0, 0], tp.build_topology(~mask[..., 0, 0]), (16, 16), (16, 16)
    )
    assert linear.shape == (1, 16, 16)


def test_pointwise_layers_are_one_row_of_pixels() -> None:
    geometry = cwg.Geometry(2, (3, 5), (3, 5), (16, 32, 1, 1), (16, 16), (1, 1), (0, 0), (1, 1))
    x = torch.randn(2, 32, 3, 5).to(memory_format=torch.channels_last)
    flat, (view,) = cwg.flattened(geometry, x)
    assert flat.output_size == flat.input_size == (1, 30) and flat.images == 1
    assert view.shape == (1, 32, 1, 30) and view.data_ptr() == x.data_ptr()
    assert torch.equal(view[0, :, 0, 17], x[1, :, 0, 2])
    strided = geometry._replace(stride=(2, 2))
    assert cwg.flattened(strided, x) == (strided, [x])
