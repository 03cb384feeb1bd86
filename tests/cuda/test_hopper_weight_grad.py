"""The weight gradient's kernel for sm_90a on the emulator, with ddst's lists, against float64."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddst import topology as tp
from ddst.ops.cuda import weight_grad as cwg
from helpers import emulated_hopper_weight_grad, emulation, recorded, scale
from helpers.emulated_hopper_weight_grad import Library, Norm, Options, Plan, tiles
from helpers.emulated_weight_grad import BLOCKS, Caught, Problem

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="needs g++ (or CXX)")
SOURCE = emulation.TESTS / "hopper_weight_grad_library.cpp"
DTYPES = (torch.bfloat16, torch.float16)
WINDOWS = [  # weight's kernel, stride, padding, dilation
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((4, 4), (2, 2), (1, 1), (1, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
    ((3, 3), (1, 1), (2, 2), (2, 2)),
    ((2, 3), (2, 3), (4, 5), (1, 2)),
]


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> Library:
    folder = Path(request.config.cache.mkdir("cuda"))
    return Library(emulation.compile_program(SOURCE, folder, "-shared", "-fPIC", optimize="-O1"))


def bands(problem: Problem) -> tuple[int, int]:
    """The largest band: all blocks, or as many as 256 channels hold."""
    g = problem.geometry
    rows, cols, _ = tp.grid(g.weight_shape, g.block)
    return min(rows, 256 // g.block[0]), min(cols, 256 // g.block[1])


def fits(library: Library, problem: Problem, plan: Plan, fused: bool = False) -> bool:
    flat = problem.geometry if fused else cwg.flattened(problem.geometry)[0]
    return not library.refusal(flat, plan, fused=fused)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_matches_float64(library: Library, window) -> None:
    """Each block in turn, with tiles that reach beyond the images or hold several of them."""
    kernel, *rest = window
    at = WINDOWS.index(window)
    for i, block in enumerate(BLOCKS[at % 3 :: 3]):
        tile = [(1, 8, 8), (2, 4, 8), (4, 4, 4)][i] if kernel != (1, 1) or rest[0] != (1, 1) else (1, 1, 64)
        problem = Problem.random(DTYPES[i % 2], 2, (9, 7), (72, 40, *kernel), block, *rest, density=0.4)
        plan = Plan((max(1, 64 // block[0]), max(1, 32 // block[1])), tile, 1 + i % 2)
        got, _ = library.run(problem, plan)
        assert problem.error(got) <= 1, (block, plan)


@pytest.mark.parametrize("density", [0.0, 0.03, 1.0])
def test_empty_rows_and_full_masks(library: Library, density: float) -> None:
    for block in ((16, 16), (64, 32)):
        problem = Problem.random(torch.bfloat16, 1, (6, 6), (136, 40, 3, 3), block, density=density, seed=3)
        got, _ = library.run(problem, Plan(bands(problem), (1, 8, 8), 1))
        assert problem.error(got) <= 1


def random_problem(rng: random.Random, library: Library) -> tuple[Problem, Plan]:
    """Any plan that the kernel does not refuse is right."""
    while True:
        kernel, stride, padding, dilation = rng.choice(WINDOWS)
        reach = [dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i] for i in (0, 1)]
        size = [max(1, reach[i], rng.randint(1, 12)) for i in (0, 1)]
        channels = [8 * rng.randint(1, 10) for _ in range(2)]
        problem = Problem.random(
            rng.choice(DTYPES), rng.randint(1, 4), size, (*channels, *kernel), rng.choice(BLOCKS), stride, padding,
            dilation, density=rng.choice([0.05, 0.2, 0.6]), seed=rng.randrange(2**31),
        )  # fmt: skip
        band = [rng.randint(1, 128 // b) for b in problem.geometry.block]
        plan = Plan((band[0], band[1]), rng.choice(list(tiles())), rng.randint(1, 4))
        if fits(library, problem, plan):
            return problem, plan


def test_random_problems(library: Library) -> None:
    rng = random.Random(0)
    for _ in range(scale.problems(6, 60)):
        problem, plan = random_problem(rng, library)
        options = Options(seed=rng.randrange(1000), delay=rng.random() < 0.7)
        got, _ = library.run(problem, plan, options)
        assert problem.error(got) <= 1, (problem.geometry, plan, options)


def fused_case(
    dims: int, images: int = 3, size: tuple[int, int] = (9, 7), stride: tuple[int, int] = (1, 1)
) -> tuple[Problem, Norm, Problem]:
    """Problem, its prologue, and the problem whose x went through it; ``dims`` of scale and shift, 0: activation only.

    A shift of 1 makes pixels outside of the images tell from zeros that went through the prologue.
    """
    problem = Problem.random(torch.bfloat16, images, size, (40, 72, 3, 3), (16, 16), stride, density=0.4, seed=dims)
    generator = torch.Generator().manual_seed(dims)
    shape = (images, 72) if dims == 2 else (72,)
    mean, scale = torch.rand(72, generator=generator), torch.rand(shape, generator=generator) + 0.5
    norm = Norm((mean, scale, torch.ones(shape)) if dims else None, 0.2)
    x = problem.x.float()
    if dims:
        x = (x - mean[None, :, None, None]) * scale.view(-1, 72, 1, 1) + 1
    x = torch.where(x > 0, x, x * norm.slope).to(torch.bfloat16, memory_format=torch.channels_last)
    return problem, norm, replace(problem, x=x)


@pytest.mark.parametrize("dims", [0, 1, 2], ids=["activation", "norm of channels", "norm of samples"])
def test_fused(library: Library, dims: int) -> None:
    problem, norm, changed = fused_case(dims)
    got, _ = library.run(problem, Plan((3, 4), (2, 4, 8), 1), Options(seed=dims), norm)
    assert changed.error(got) <= 1
    strided, norm, changed = fused_case(dims, stride=(2, 3))
    got, _ = library.run(strided, Plan((1, 5), (1, 4, 16), 2), norm=norm)
    assert changed.error(got) <= 1


def test_fused_with_nothing_to_do(library: Library) -> None:
    problem, _, _ = fused_case(0)
    got, _ = library.run(problem, Plan((3, 4), (1, 8, 8), 1), norm=Norm(None, 1.0))
    assert problem.error(got) <= 1


def test_every_pixel_is_counted_once(library: Library) -> None:
    """Exact in fp32: ones, so that each sum is a count of pixels."""
    problem = Problem.random(torch.float16, 2, (9, 16), (32, 16, 3, 3), (16, 16), density=1.0)
    problem.x.fill_(1)
    problem.gy.fill_(1)
    for tile, shares in (((1, 8, 8), 1), ((1, 8, 8), 5), ((2, 2, 16), 2)):
        got, _ = library.run(problem, Plan((2, 1), tile, shares))
        assert torch.equal(got[problem.slots.of_block].double(), problem.reference()[0])


def test_the_same_call_gives_the_same_bits_in_any_order(library: Library) -> None:
    problem = Problem.random(torch.bfloat16, 2, (8, 8), (48, 48, 3, 3), (16, 16), density=0.3)
    plan = Plan((3, 3), (1, 8, 8), 2)
    first, _ = library.run(problem, plan)
    for options in (Options(seed=1), Options(seed=2, delay=False)):
        assert torch.equal(library.run(problem, plan, options)[0], first)


def test_no_bank_conflicts(library: Library) -> None:
    """With slices of 64, 32 and 16 channels, patches whose columns are a multiple of 4 and others, and with strides."""
    for band, tile, stride in (
        ((4, 4), (1, 8, 8), (1, 1)), ((2, 2), (1, 4, 16), (1, 1)), ((3, 1), (2, 4, 8), (1, 1)),
        ((4, 4), (1, 8, 8), (2, 2)),
    ):  # fmt: skip
        size = (8 * stride[0], 16 * stride[1])
        problem = Problem.random(torch.bfloat16, 2, size, (64, 64, 3, 3), (16, 16), stride, density=0.2)
        assert library.run(problem, Plan(band, tile, 1))[1].bank_conflicts == 0


def test_bytes_and_products(library: Library) -> None:
    """Gy once, patches with their halo once a tile, both without what is zero; 8 `mma` for a block and tile."""
    problem = Problem.random(torch.bfloat16, 2, (16, 16), (64, 64, 3, 3), (16, 16), density=0.3)
    plan = Plan((4, 4), (1, 8, 8), 1)
    sizes, (_, stats) = library.sizes(problem.geometry, plan), library.run(problem, plan)
    assert sizes.patch_columns == 10 and sizes.copied_bytes == (64 + 100) * 64 * 2
    assert stats.copies == 8 * 2
    assert stats.bytes_read == 2 * (16 * 16 + 4 * 9 * 9) * 64 * 2
    units = int(problem.mask.sum())
    assert stats.mma == 8 * units * 8
    assert 8 * 4 * units < stats.ldmatrix < 8 * 4 * units * 2


def test_each_wait_and_fence_is_needed(library: Library) -> None:
    """More tiles than stages; without one of them the emulator finds a race, or a barrier that nobody initialised."""
    plain = Problem.random(torch.bfloat16, 6, (8, 8), (16, 16, 3, 3), (16, 16), density=0.5)
    problem, norm, _ = fused_case(1, 6, (8, 8))
    plan = Plan((3, 4), (1, 8, 8), 1)
    assert library.sizes(problem.geometry, plan, True).stages < 6
    places = library.run(problem, plan, norm=norm)[1].waits
    assert len(places) == 10 and len(library.run(plain, plan)[1].waits) == 6

    def found(place: str) -> bool:
        for case, prologue in ((plain, None), (problem, norm)):
            for options in (Options(drop_at=place), Options(seed=1, drop_at=place)):
                try:
                    library.run(case, plan, options, prologue)
                except Caught:
                    return True
        return False

    assert [place for place in sorted(places) if not found(place)] == []


def test_what_is_refused_is_named(library: Library) -> None:
    geometry = Problem.random(torch.bfloat16, 1, (8, 8), (64, 64, 3, 3), (32, 32)).geometry
    plan = Plan((2, 2), (1, 8, 8), 1)
    wide = geometry._replace(weight_shape=(64, 64, 3, 400), padding=(1, 200))
    strided = geometry._replace(stride=(2, 9))
    for g, p, message in [
        (geometry, plan, ""),
        (geometry, plan._replace(tile=(1, 8, 7)), "tile[2] is 7, expected a power of two"),
        (geometry, plan._replace(tile=(1, 8, 16)), "pixels of a tile is 128, expected 64"),
        (geometry, plan._replace(band=(9, 1)), "band[0] is 9, expected at most 256 channels"),
        (geometry._replace(weight_shape=(64, 60, 3, 3)), plan, "in_channels is 60, expected a multiple of 8"),
        (geometry._replace(weight_shape=(60, 64, 3, 3)), plan, "out_channels is 60, expected a multiple of 8"),
        (geometry._replace(images=0), plan, "images is 0, expected at least 1"),
        (wide, plan, "columns of a tile's patch is 408, expected at most 256"),
        (strided, plan, "the stride is 9, expected at most 8"),
        (geometry, plan._replace(tile=(64, 1, 1), band=(4, 8)), "two stages of a tile do not fit 232448 bytes"),
    ]:
        assert library.refusal(g, p).startswith(message) and bool(library.refusal(g, p)) == bool(message)
    assert library.refusal(geometry, plan, itemsize=4).startswith("bytes of an element is 4, expected 2")


def zero_outside_of_the_weight(library: Library) -> bool:
    """Even where a NaN times the zeros that stand for missing channels is a NaN."""
    problem = Problem.random(torch.bfloat16, 1, (4, 4), (24, 24, 1, 1), (16, 16), padding=(0, 0), density=1.0)
    problem.x[0, 0, 1, 2] = problem.gy[0, 1, 3, 3] = float("nan")
    got = library.run(problem, Plan((2, 2), (1, 1, 64), 1))[0][problem.slots.of_block]
    inside = tp.inside(problem.mask, problem.geometry.weight_shape, problem.geometry.block)
    return bool((got[~inside] == 0).all()) and bool(got[inside].isnan().any())


def test_zero_outside_of_the_weight(library: Library) -> None:
    assert zero_outside_of_the_weight(library)


# Small slips: each must be caught. (name, file, what stands there, what is put there)
KERNEL, STAGE, SHAPE = "hopper_weight_grad.cuh", "hopper_weight_grad_stage.cuh", "hopper_weight_grad_shape.hpp"
MUTATIONS = [
    ("channels of a", KERNEL, "pitch + lane / 8 % 2 * 16, pitch", "pitch + lane / 16 * 16, pitch"),
    ("pixels of a", KERNEL, "(lane / 16 * 8 + lane % 8) * pitch", "(lane / 8 % 2 * 8 + lane % 8) * pitch"),
    ("chunk of b", KERNEL, "+ lane / 16 * 16;", "+ lane / 8 % 2 * 16;"),
    ("part of a block", KERNEL, "part / parts_across * U::kRows;", "part % parts_across * U::kRows;"),
    ("tap's row", KERNEL, "tap_y = tap / s.kernel_w", "tap_y = tap / s.kernel_h"),
    ("plane of a tap", KERNEL, "tap_y % z.planes_h", "tap_x % z.planes_h"),
    ("shift of a tap", KERNEL, "tap_x * s.dilation_w / s.stride_w", "tap_x / s.stride_w"),
    ("column of the band", KERNEL, "% s.band_cols * s.block_in", "% s.band_rows * s.block_in"),
    ("image of a lane", KERNEL, "((image * z.patch_h + y)", "((image * z.patch_w + y)"),
    ("stale rows of gy", KERNEL, "(gy != last ? 0x10001u", "(u == 0 ? 0x10001u"),
    ("rows of a second part", KERNEL, "(place ^ m * 32)", "place"),
    ("no flip", KERNEL, "k % 2 ? units.x[u] ^ z.flip : units.x[u]", "units.x[u]"),
    ("released too early", KERNEL, "      dev::sync_warp();  // all lanes have read\n", ""),
    ("arrivals", KERNEL, "barrier_init(shared.empty + i, kHopperWarps)", "barrier_init(shared.empty + i, 1)"),
    ("share's partials", KERNEL, "(std::int64_t(share) * s.groups + group)", "(std::int64_t(share) + group)"),
    ("swizzle", STAGE, "bytes >> 3 & (pitch - 16)", "bytes >> 3 & (pitch / 2 - 16)"),
    ("padding", STAGE, "x * s.stride_w - s.pad_w", "x * s.stride_w - s.pad_h"),
    ("parity", STAGE, "ring.parity ^ 1);", "ring.parity);"),
    ("plane's rows", STAGE, "at.input_y(s) + z.plane_rows[row]", "at.input_y(s)"),
    ("prologue of a plane", STAGE, "z.plane_columns[plane % z.planes_w] + pixel", "pixel"),
    ("slice's channels", STAGE, "work.out_channel + i * z.grad_channels", "work.out_channel"),
    ("prologue outside of images", STAGE, "image >= s.images || unsigned(y)", "unsigned(y)"),
    ("prologue at the right edge", STAGE, " || unsigned(x) >= unsigned(s.in_w)", ""),
    ("factors of another image", STAGE, "f.norm == 2 && image != known", "f.norm == 2 && known < 0"),
    ("steps", SHAPE, "step_pixels(s, z.patch_h, z.patch_w, k)) * input_pitch", "k * 2 * z.patch_w) * input_pitch"),
    ("columns of a patch", SHAPE, "(s.kernel_w - 1) * s.dilation_w / s", "(s.kernel_w - 2) * s.dilation_w / s"),
]


def finds(library: Library) -> str:
    """What is wrong with a kernel; empty if nothing is found."""
    cases: list[tuple[Problem, Plan, Norm | None, Problem]] = []
    for block, tile, window in [
        ((16, 16), (2, 4, 8), ((3, 2), (1, 2), (1, 2), (1, 2))),
        ((64, 64), (8, 2, 4), ((2, 3), (2, 1), (0, 1), (1, 1))),
    ]:
        kernel, *rest = window
        problem = Problem.random(torch.bfloat16, 5, (9, 7), (136, 72, *kernel), block, *rest, density=0.6)
        cases.append((problem, Plan((64 // block[0], 64 // block[1] + block[1] // 64), tile, 2), None, problem))
    for dims, stride in ((1, (1, 1)), (2, (1, 3))):
        problem, norm, changed = fused_case(dims, stride=stride)
        cases.append((problem, Plan((3, 4), (1, 8, 8) if dims == 1 else (2, 4, 8), 2), norm, changed))
    try:
        for problem, plan, norm, changed in cases:
            if not changed.error(library.run(problem, plan, Options(seed=1), norm)[0]) <= 1:
                return "wrong result"
    except Caught as caught:
        return str(caught)
    return ""


def test_mutations_are_caught(tmp_path: Path, library: Library) -> None:
    key = recorded.digest(
        emulation.key(SOURCE, optimize="-O0"), Path(__file__), Path(str(cwg.__file__)),
        Path(str(emulated_hopper_weight_grad.__file__)),
    )  # fmt: skip
    with recorded.outcome("emulator: mutations of the weight gradient for sm_90a", key):
        mutate(tmp_path, library)


def mutate(folder: Path, library: Library) -> None:
    assert finds(library) == ""

    def mutant(number: int) -> tuple[str, str]:
        name, file, old, new = MUTATIONS[number]
        copy = folder / str(number)
        shutil.copytree(emulation.KERNELS, copy)
        original = (copy / file).read_text()
        assert original.count(old) >= 1, name
        (copy / file).write_text(original.replace(old, new, 1))
        how = {"kernels": copy, "optimize": "-O0"}
        flags = ("-shared", "-fPIC", "-w", "-g0", "-DDDST_BFLOAT16_ONLY")
        compiled = emulation.compile_program(SOURCE, copy, *flags, **how)  # type: ignore[arg-type]
        return name, finds(Library(compiled))

    with ThreadPoolExecutor(2) as pool:
        found = dict(pool.map(mutant, range(len(MUTATIONS))))
    assert [name for name, what in found.items() if not what] == []
