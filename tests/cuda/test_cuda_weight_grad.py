"""The CUDA weight gradient's kernels on the emulator, with ddst's own plans and lists, against float64.

The emulator stops at races, accesses out of bounds or uninitialised, copies in flight, divergence and second writes.
"""

from __future__ import annotations

import inspect
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddst import topology as tp
from ddst.ops.cuda import weight_grad as cwg
from helpers import emulated_weight_grad, emulation, recorded
from helpers.emulated_weight_grad import BLOCKS, DEVICE, DTYPES, Caught, Library, Options, Problem, plan_for

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="needs g++ (or CXX)")
SOURCE = emulation.TESTS / "weight_grad_library.cpp"


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> Library:
    folder = Path(request.config.cache.mkdir("cuda"))
    return Library(emulation.compile_program(SOURCE, folder, "-shared", "-fPIC"))


def check(library: Library, problem: Problem, plan: cwg.Plan, options: Options = Options()) -> None:  # noqa: B008
    got, _ = library.run(problem, plan, options)
    error = problem.error(got)
    assert error <= 1, (error, problem.geometry, plan, options)


WINDOWS = [  # weight's kernel, stride, padding, dilation
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((4, 4), (2, 2), (1, 1), (1, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
    ((3, 3), (1, 1), (2, 2), (2, 2)),
    ((2, 3), (2, 3), (4, 5), (1, 2)),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(
    "dtype, block",
    [
        (dtype, block)
        for i, dtype in enumerate(DTYPES)
        for j, block in enumerate(BLOCKS)
        if block[0] == block[1] or (i + j) % 2
    ],
    ids=str,
)
def test_matches_float64(library: Library, dtype: torch.dtype, block: tuple[int, int], window) -> None:
    kernel, *rest = window
    problem = Problem.random(dtype, 2, (9, 7), (100, 40, *kernel), block, *rest, density=0.4)
    check(library, problem, plan_for(problem))


@pytest.fixture
def operator(library: Library, monkeypatch: pytest.MonkeyPatch) -> Library:
    """``torch.ops.ddst_cuda`` on the CPU, for ddst's own call of it."""
    library.options = Options()
    monkeypatch.setattr(torch.ops, "ddst_cuda", library)
    monkeypatch.setattr(cwg, "_device", lambda index: DEVICE)
    return library


@pytest.mark.parametrize("window", WINDOWS[:4], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "misaligned"])
def test_conv2d_weight_grad_of_any_memory(operator: Library, layout: str, window) -> None:
    kernel, *rest = window
    problem = Problem.random(torch.bfloat16, 2, (9, 7), (36, 20, *kernel), (16, 16), *rest, density=0.4)

    def laid_out(t: Tensor) -> Tensor:
        if layout == "misaligned":
            return (
                torch.cat([t.new_zeros(1), t.permute(0, 2, 3, 1).flatten()])[1:]
                .view_as(t.permute(0, 2, 3, 1))
                .permute(0, 3, 1, 2)
            )
        return t.contiguous() if layout == "contiguous" else t

    g, topology = problem.geometry, problem.slots.topology
    x, gy = laid_out(problem.x), laid_out(problem.gy)
    got = cwg.conv2d_weight_grad(gy, x, topology, g.weight_shape, g.block, g.stride, g.padding, g.dilation)
    assert problem.error(got) <= 1


def test_linear_weight_grad(operator: Library) -> None:
    problem = Problem.random(torch.float16, 70, (1, 1), (48, 40, 1, 1), (16, 16), padding=(0, 0), density=0.5)
    topology = problem.slots.topology
    x, gy = problem.x[..., 0, 0], problem.gy[..., 0, 0].t().contiguous().t()
    assert problem.error(cwg.linear_weight_grad(gy, x, topology, (48, 40), (16, 16))) <= 1


def test_the_emulated_operator_takes_what_the_compiled_one_does() -> None:
    glue = (emulation.KERNELS / "glue_weight_grad.hpp").read_text()
    (text,) = re.findall(r"#define DDST_WEIGHT_GRAD_ARGUMENTS(.*?)\n\n", glue, re.DOTALL)
    schema = re.fullmatch(r"\((.*)\) -> Tensor", "".join(re.findall(r'"([^"]*)"', text)))
    assert schema is not None
    mine = list(inspect.signature(Library.conv2d_weight_grad).parameters)
    assert ["self", *(p.split()[-1] for p in schema[1].split(","))] == mine


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_empty_rows_and_full_masks(library: Library, block: tuple[int, int], density: float) -> None:
    problem = Problem.random(torch.bfloat16, 1, (6, 6), (136, 72, 3, 3), block, density=density, seed=3)
    check(library, problem, plan_for(problem))


def random_problem(rng: random.Random) -> tuple[Problem, cwg.Plan, Options]:
    kernel, stride, padding, dilation = rng.choice(WINDOWS)
    reach = [dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i] for i in (0, 1)]
    size = [max(1, reach[i], rng.randint(1, 14)) for i in (0, 1)]
    channels = [rng.choice([rng.randint(1, 100), 8 * rng.randint(1, 12)]) for _ in range(2)]
    problem = Problem.random(
        rng.choice(DTYPES), rng.randint(1, 5), size, (*channels, *kernel), rng.choice(BLOCKS), stride, padding,
        dilation, density=rng.choice([0.05, 0.2, 0.5, 1.0]), seed=rng.randrange(2**31), allow_tf32=rng.random() < 0.5,
    )  # fmt: skip
    plan = plan_for(problem)
    if rng.random() < 0.5:  # any plan that fits is right, not only the chosen one
        flat, _ = cwg.flattened(problem.geometry)
        limit = [128 // b for b in flat.block]
        other = plan._replace(
            tile=(rng.randint(1, 3), *(rng.randint(1, min(n, 7)) for n in flat.output_size)),
            band=(rng.randint(1, limit[0]), rng.randint(1, limit[1])),
            shares=rng.randint(1, 5),
        )
        if cwg.shared_bytes(flat, other.band, other.tile, problem.x.element_size()) <= DEVICE.shared_bytes:
            plan = other
    return problem, plan, Options(seed=rng.randrange(1000), delay_copies=rng.random() < 0.5)


@pytest.mark.parametrize("part", range(4))
def test_random_problems(library: Library, part: int) -> None:
    rng = random.Random(part)
    for _ in range(50):
        check(library, *random_problem(rng))


def test_every_pixel_of_a_large_share_is_counted_once(library: Library) -> None:
    """Exact in fp32: ones, so that each sum is a count of pixels."""
    problem = Problem.random(torch.float16, 3, (16, 16), (32, 16, 3, 3), (16, 16), density=1.0)
    problem.x.fill_(1)
    problem.gy.fill_(1)
    plan = plan_for(problem)
    got, _ = library.run(problem, plan)
    assert torch.equal(got[problem.slots.of_block].double(), problem.reference()[0])
    for shares in (1, 3, 12):
        assert torch.equal(library.run(problem, plan._replace(shares=shares))[0], got)


def test_the_same_call_gives_the_same_bits_in_any_order(library: Library) -> None:
    problem = Problem.random(torch.bfloat16, 2, (8, 8), (48, 48, 3, 3), (16, 16), density=0.3)
    first, _ = library.run(problem, plan_for(problem))
    for seed in (1, 2):
        again, _ = library.run(problem, plan_for(problem), Options(seed=seed, delay_copies=False))
        assert torch.equal(again, first)


def test_no_bank_conflicts_on_even_tiles(library: Library) -> None:
    for block in BLOCKS:
        problem = Problem.random(torch.bfloat16, 1, (16, 16), (128, 128, 3, 3), block, density=0.2)
        plan = plan_for(problem)
        assert plan.tile[2] % 8 == 0
        _, stats = library.run(problem, plan)
        assert stats.bank_conflicts == 0


@pytest.mark.parametrize("number", range(4))
def test_each_barrier_and_wait_is_needed(library: Library, number: int) -> None:
    problem = Problem.random(torch.bfloat16, 1, (8, 24), (32, 32, 3, 3), (16, 16), density=0.5)
    plan = plan_for(problem)._replace(shares=1, tile=(1, 4, 8))
    _, stats = library.run(problem, plan)
    assert stats.barriers >= 7  # the tables', then one per tile
    with pytest.raises(Caught, match="race in shared memory"):
        library.run(problem, plan, Options(drop_barrier=number))
    with pytest.raises(Caught, match="copy in flight"):
        library.run(problem, plan, Options(drop_wait=number))


def test_too_much_shared_memory_is_refused(library: Library) -> None:
    problem = Problem.random(torch.float32, 1, (64, 64), (64, 64, 3, 3), (64, 64))
    with pytest.raises(Caught, match=r"a CTA's shared memory is .*, expected at most 232448 bytes"):
        library.run(problem, plan_for(problem)._replace(tile=(1, 32, 32)))


def test_shapes_that_do_not_fit_are_named(library: Library) -> None:
    problem = Problem.random(torch.bfloat16, 1, (8, 8), (64, 64, 3, 3), (32, 32))
    plan = plan_for(problem)
    for wrong, message in [
        (plan._replace(band=(9, 1)), r"band\[0\] is 9, expected at most 256 channels"),
        (plan._replace(shares=0), "shares is 0, expected at least 1"),
        (plan._replace(tile=(1, 64, 64)), "pixels of a tile is 4096, expected at most 1024"),
    ]:
        with pytest.raises(Caught, match=message):
            library.run(problem, wrong)
    geometry = problem.geometry._replace(block=(32, 8), weight_shape=(64, 16, 3, 3))
    narrow = torch.zeros(1, 8, 8, 16, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    with pytest.raises(Caught, match=r"block\[1\] is 8, expected 16, 32 or 64"):
        library.run(replace(problem, geometry=geometry, x=narrow), plan)


# Small slips: each must be caught. (name, what stands in weight_grad.cuh, what is put there)
MUTATIONS = [
    ("transposed channels of a", "m * 16 + lane / 8 % 2 * 8));", "m * 16 + lane / 16 * 8));"),
    ("pixels of a", "(lane / 16 * 8 + lane % 8) * pitch", "(lane / 8 % 2 * 8 + lane % 8) * pitch"),
    ("tf32 pixels", "(lane % 4 + i / 2 * 4) * pitch", "(lane % 4 + i % 2 * 4) * pitch"),
    ("tf32 not rounded", "r[i] = dev::to_tf32(value)", "r[i] = dev::float_bits(value)"),
    ("full float32 without low parts", "multiply_low(sum, a, b);", ""),
    ("next image", "image < s.images && ", ""),
    ("channels beyond the last", "present = channel < s.channels", "present = true"),
    ("right edge", "unsigned(x) < unsigned(s.width)", "unsigned(x) <= unsigned(s.width)"),
    ("ragged channels", "inside ? s.channels - channel : 0", "s.channels - channel"),
    ("tap's row", "tap / s.kernel_w * s.dilation_h", "tap / s.kernel_h * s.dilation_h"),
    ("column of the band", "% s.band_cols * s.block_in", "% s.band_rows * s.block_in"),
    ("part of a block", "part / parts_across * U::kRows;", "part % parts_across * U::kRows;"),
    ("padding", "x * s.stride_w - s.pad_w", "x * s.stride_w - s.pad_h"),
    ("stale rows of gy", "!places[u].same_gy(places[u - 1])", "false"),
    ("share's end", "int(z.tiles * (share + 1) / s.shares)", "int(z.tiles / s.shares * (share + 1))"),
    ("wait too weak", "cp_async_wait<kWeightGradStages - 2>", "cp_async_wait<kWeightGradStages - 1>"),
    ("no barrier", "dev::sync_threads();  // this", "// this"),
    ("copies too far ahead", "stage(tile + kWeightGradStages - 1);", "stage(tile + kWeightGradStages);"),
    ("image of a tile", "/ z.tiles_h * s.tile_images", "/ z.tiles_h"),
    ("share's partials", "(std::int64_t(share) * s.groups + group)", "(std::int64_t(share) + group)"),
    ("reduction's rows", "lane / 4;", "lane / 8;"),
    ("a share left out", "for (int share = 0; share < shares", "for (int share = 1; share < shares"),
    ("partials that nobody wrote", "out_channel < s.out_channels ? s.shares : 0", "s.shares"),
    ("outside of the weight", "out_channel + row < s.out_channels && ", ""),
]


def mutation_problems() -> list[tuple[Problem, cwg.Plan, Tensor, Tensor]]:
    cases = [
        Problem.random(torch.bfloat16, 3, (9, 7), (72, 40, 3, 2), (16, 16), (1, 2), (1, 2), (1, 2), density=0.6),
        Problem.random(torch.bfloat16, 3, (5, 6), (69, 35, 2, 3), (64, 64), (2, 1), density=0.8),
        Problem.random(torch.float32, 2, (5, 6), (72, 40, 2, 3), (32, 16), (2, 1), (0, 1), (2, 1), density=0.6),
        Problem.random(torch.float32, 1, (3, 4), (16, 16, 1, 1), (16, 16), density=1.0, allow_tf32=False),
    ]
    tiles = [(1, 3, 5), (2, 2, 5), (2, 2, 3), (1, 3, 4)]
    plans = [plan_for(c)._replace(tile=tile, shares=2) for c, tile in zip(cases, tiles, strict=True)]
    return [(case, plan, *case.reference()) for case, plan in zip(cases, plans, strict=True)]


def finds(library: Library, problems: list[tuple[Problem, cwg.Plan, Tensor, Tensor]]) -> str:
    """What is wrong with a kernel; empty if nothing is found."""
    try:
        for problem, plan, *reference in problems:
            if not problem.error(library.run(problem, plan)[0], *reference) <= 1:
                return "wrong result"
        if not zero_outside_of_the_weight(library):
            return "not zero outside of the weight"
    except Caught as caught:
        return str(caught)
    return ""


def zero_outside_of_the_weight(library: Library) -> bool:
    """Even where a NaN times the zeros that stand for missing channels is a NaN."""
    problem = Problem.random(torch.bfloat16, 1, (4, 4), (20, 20, 1, 1), (16, 16), padding=(0, 0), density=1.0)
    problem.x[0, 0, 1, 2] = problem.gy[0, 1, 3, 3] = float("nan")
    got = library.run(problem, plan_for(problem))[0][problem.slots.of_block]
    inside = tp.inside(problem.mask, problem.geometry.weight_shape, problem.geometry.block)
    return bool((got[~inside] == 0).all()) and bool(got[inside].isnan().any())


def test_zero_outside_of_the_weight(library: Library) -> None:
    assert zero_outside_of_the_weight(library)


def test_mutations_are_caught(tmp_path: Path, library: Library) -> None:
    files = [Path(str(module.__file__)) for module in (cwg, emulated_weight_grad)]
    key = recorded.digest(emulation.key(SOURCE, optimize="-O0"), Path(__file__), *files)
    with recorded.outcome("emulator: mutations of the weight gradient", key):
        mutate(tmp_path, library)


def mutate(folder: Path, library: Library) -> None:
    problems = mutation_problems()
    assert finds(library, problems) == ""
    original = (emulation.KERNELS / "weight_grad.cuh").read_text()

    def mutant(number: int) -> tuple[str, str]:
        name, old, new = MUTATIONS[number]
        assert original.count(old) >= 1, name
        copy = folder / str(number)
        shutil.copytree(emulation.KERNELS, copy)
        (copy / "weight_grad.cuh").write_text(original.replace(old, new, 1))
        how = {"kernels": copy, "optimize": "-O0"}
        compiled = emulation.compile_program(SOURCE, copy, "-shared", "-fPIC", "-w", "-g0", **how)  # type: ignore[arg-type]
        return name, finds(Library(compiled), problems)

    with ThreadPoolExecutor(2) as pool:
        found = dict(pool.map(mutant, range(len(MUTATIONS))))
    assert [name for name, what in found.items() if not what] == []


def test_shared_bytes_are_those_of_the_kernel(library: Library) -> None:
    rng = random.Random(1)
    for _ in range(50):
        problem, plan, _ = random_problem(rng)
        g, itemsize = cwg.flattened(problem.geometry)[0], problem.x.element_size()
        assert cwg.shared_bytes(g, plan.band, plan.tile, itemsize) == library.shared_bytes(g, plan, itemsize)
        assert library.group_units(g, plan) == cwg.WARPS * cwg.parts_of(g.block)[1]
        assert cwg.shared_bytes(g, plan.band, plan.tile, itemsize) <= DEVICE.shared_bytes
