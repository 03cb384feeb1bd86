"""Forward and input gradient in CUDA C++: ddst's lists and calls, with the kernel on the emulator, against float64."""

from __future__ import annotations

import inspect
import itertools
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ddst import _extension
from ddst import topology as tp
from ddst.ops.cuda import compiled, gather, hopper
from helpers import emulation
from helpers.emulated_gather import EmulatedOps, slow_records
from helpers.gather_problems import BLOCKS, SM90, WINDOWS, Problem, close
from helpers.slots import scatter

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="needs g++ (or CXX)")
ONE_SM = SM90._replace(multiprocessors=1)  # one large tile is enough of them


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> EmulatedOps:
    folder = Path(request.config.cache.mkdir("cuda"))
    return EmulatedOps(emulation.compile_program(emulation.TESTS / "gather_library.cpp", folder, "-shared", "-fPIC"))


@pytest.fixture
def ops(library: EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> EmulatedOps:
    """``torch.ops.ddst_cuda`` on the CPU, on what says to be an H100."""
    library.calls = []
    monkeypatch.setattr(torch.ops, "ddst_cuda", library)
    monkeypatch.setattr(gather, "facts", lambda device: SM90)
    monkeypatch.setattr(gather, "library", lambda: library.library)
    monkeypatch.setattr(hopper, "library", lambda: library.library)  # which has no kernels for sm_90a
    return library


@pytest.mark.parametrize(
    "dtype, block, window",
    [(gather.DTYPES[(i + j) % 3], block, window) for i, window in enumerate(WINDOWS) for j, block in enumerate(BLOCKS)],
    ids=str,
)
def test_matches_float64(ops: EmulatedOps, dtype, block, window) -> None:
    Problem(dtype, 2, (9, 7), (104, 40), block, window).check()
    assert ops.calls == [False, False]


@pytest.mark.parametrize("block, window", [*zip(BLOCKS, [*WINDOWS[:3], *WINDOWS[4:]], strict=True)], ids=str)
def test_large_tile(ops: EmulatedOps, monkeypatch: pytest.MonkeyPatch, block, window) -> None:
    monkeypatch.setattr(gather, "facts", lambda device: ONE_SM)
    Problem(torch.bfloat16, 3, (19, 18), (144, 96), block, window, density=0.3).check()
    assert ops.calls == [True, True]


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_and_all_blocks(ops: EmulatedOps, density: float) -> None:
    Problem(torch.bfloat16, 1, (5, 6), (48, 80), (16, 16), WINDOWS[1], density).check()


def test_random_problems(ops: EmulatedOps) -> None:
    rng = random.Random(3)
    for i in range(20):
        ops.seed = i
        dtype, block = rng.choice(gather.DTYPES), rng.choice(BLOCKS)
        kernel = rng.choice([(1, 1), (3, 3), (4, 4), (1, 3), (2, 2)])
        window = (kernel, (rng.randint(1, 2), rng.randint(1, 2)), (rng.randint(0, 3), rng.randint(0, 3)))
        size = (rng.randint(kernel[0], 11), rng.randint(kernel[1], 11))
        channels = (8 * rng.randint(1, 14), 8 * rng.randint(1, 14))
        Problem(dtype, rng.randint(1, 4), size, channels, block, window, rng.random(), seed=i).check()
    ops.seed = 0


@pytest.mark.parametrize("dtype", gather.DTYPES, ids=str)
def test_linear(ops: EmulatedOps, dtype) -> None:
    p = Problem(dtype, 37, (1, 1), (72, 56), (16, 16), WINDOWS[0])
    shape, topology = p.shape[:2], p.topology
    x, gy, weight = p.x[:, :, 0, 0], p.gy[:, :, 0, 0], p.weight[:, :, 0, 0]
    y = compiled.linear(x, p.values, p.bias, topology, shape, relu=True)
    want = F.linear(x.double(), weight, p.bias.double())
    close(y, want.relu(), F.linear(x.double().abs(), weight.abs()) + 1)
    gx = compiled.linear_input_grad(gy, p.values, topology, shape)
    close(gx, gy.double() @ weight, gy.double().abs() @ weight.abs())


def test_layouts_residual_and_relu(ops: EmulatedOps) -> None:
    p = Problem(torch.float16, 2, (6, 5), (32, 24), (16, 16), WINDOWS[1])
    residual = torch.randn_like(p.gy)
    want = (p.y() + p.bias.double()[:, None, None] + residual.double()).relu()
    misaligned = torch.empty(p.values.numel() + 1, dtype=p.dtype)[1:].view_as(p.values).copy_(p.values)
    layouts = (torch.contiguous_format, torch.channels_last)
    for layout, channels_last in itertools.product(layouts, (True, False)):
        y = compiled.conv2d(
            p.x.contiguous(memory_format=layout), misaligned, p.bias, p.topology, p.shape, p.stride, p.padding, (1, 1),
            channels_last, relu=True, residual=residual.contiguous(memory_format=layout),
        )  # fmt: skip
        close(y, want, p.y(p.x.double().abs(), p.weight.abs()) + 8)
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_nan_reaches_its_pixels_only(ops: EmulatedOps) -> None:
    p = Problem(torch.bfloat16, 2, (8, 8), (16, 32), (16, 16), WINDOWS[1], density=1.0)
    p.x[1, 3, 4, 4] = float("nan")
    y = compiled.conv2d(p.x, p.values, None, p.topology, p.shape, p.stride, p.padding, (1, 1), True)
    assert torch.equal(y.isnan(), p.y().isnan())


def test_empty_batch(ops: EmulatedOps) -> None:
    p = Problem(torch.bfloat16, 0, (8, 8), (16, 32), (16, 16), WINDOWS[1])
    y = compiled.conv2d(p.x, p.values, None, p.topology, p.shape, p.stride, p.padding, (1, 1), True)
    assert y.shape == (0, 16, 8, 8) and ops.calls == []


def test_changed_topology_makes_new_records(ops: EmulatedOps) -> None:
    p = Problem(torch.bfloat16, 1, (4, 4), (48, 48), (16, 16), WINDOWS[1], density=0.3)
    p.check()
    p.mask = p.mask.view(-1)[torch.randperm(p.mask.numel())].view_as(p.mask)
    packed = p.values[p.slots.of_block]
    p.slots = scatter(p.mask, free=4, seed=5)
    p.topology.copy_(p.slots.topology)
    p.values = p.slots.spread(packed)
    p.check()


def test_records_are_those_of_the_definition() -> None:
    rng = random.Random(1)
    for i in range(60):
        block, gradient = rng.choice(BLOCKS), bool(rng.getrandbits(1))
        shape = (rng.randint(1, 200), rng.randint(1, 200), rng.randint(1, 4), rng.randint(1, 4))
        stride, channels = (rng.randint(1, 2), rng.randint(1, 2)), rng.choice([64, 128])
        generator = torch.Generator().manual_seed(i)
        mask = torch.rand(tp.mask_shape(shape, block), generator=generator) < rng.choice([0.0, 0.2, 0.7, 1.0])
        rows, cols, _ = tp.grid(shape, block)
        count = int(mask.sum()) + 3
        slot_blocks = torch.full((count,), -1, dtype=torch.int32)
        slot_blocks[torch.randperm(count, generator=generator)[:-3]] = tp.row_major_slots(mask)
        index = tp.split_topology(tp.topology_of_slots(slot_blocks, mask.shape), rows, cols)
        options = {"input_gradient": gradient, "tile_channels": channels}
        got = gather.gather_records(index, shape, block, stride, **options)
        assert got.dtype == torch.int32 and got.tolist() == slow_records(slot_blocks, shape, block, stride, **options)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"op": "conv2d_block_scores"}, "conv2d_block_scores is not written in CUDA C++"),
        ({"dtype": torch.float64}, "dtype must be bfloat16, float16 or float32, got torch.float64"),
        ({"weight_shape": (64, 60, 3, 3)}, "channels must be multiples of 8, got 60 in, 64 out"),
        ({"weight_shape": (64, 64, 5, 5)}, "the kernel must have at most 16 taps, got 5 x 5"),
        ({"block": (8, 16)}, "block must have sides of 16, 32 or 64, got 8 x 16"),
        ({"stride": (3, 1)}, "stride must be 1 or 2, got 3 x 1"),
        ({"dilation": (1, 2)}, r"dilation must be 1, got \(1, 2\)"),
        ({"op": "conv2d_weight_grad", "block": (16, 8)}, "block must have sides of 16, 32 or 64, got 16 x 8"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_refusals(ops: EmulatedOps, monkeypatch: pytest.MonkeyPatch, change: dict, reason: str) -> None:
    monkeypatch.setattr(_extension, "cuda_kernels_loaded", lambda: True)
    good = {
        "op": "conv2d", "device": torch.device("cuda:0"), "dtype": torch.bfloat16, "weight_shape": (64, 64, 3, 3),
        "block": (16, 16), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1),
    }  # fmt: skip
    assert compiled.supports(**good) == (True, "")
    ok, why = compiled.supports(**(good | change))
    assert not ok and re.search(reason, why), why


def test_refusals_of_the_machine(ops: EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("conv2d", torch.device("cuda:0"), torch.bfloat16, (64, 64, 3, 3), (16, 16))
    monkeypatch.setattr(_extension, "cuda_kernels_loaded", lambda: False)
    assert "libddst_cuda.so is not loaded" in compiled.supports(*args)[1]
    monkeypatch.setattr(_extension, "cuda_kernels_loaded", lambda: True)
    monkeypatch.setattr(gather, "facts", lambda device: SM90._replace(capability=(7, 5)))
    assert compiled.supports(*args) == (False, "needs compute capability 8.0, cuda:0 has 7.5")
    monkeypatch.setattr(gather, "facts", lambda device: SM90._replace(shared_bytes=40 * 1024))
    assert compiled.supports(*args) == (False, "the tile needs more shared memory than 40960 bytes")


def test_the_emulated_operators_take_what_the_compiled_ones_do() -> None:
    glue = (emulation.KERNELS / "glue_gather.cpp").read_text()
    schemas = [
        re.fullmatch(r"(\w+)\((.*)\) -> \w+", "".join(re.findall(r'"([^"]*)"', text))).groups()
        for text in re.findall(r"m\.def\((.*?)\);", glue, re.DOTALL)
    ]
    assert {name for name, _ in schemas} == {"conv2d_gather"}
    for name, parameters in schemas:
        mine = [p for p in inspect.signature(getattr(EmulatedOps, name)).parameters if p != "self"]
        assert [p.split()[-1] for p in parameters.split(",")] == mine
