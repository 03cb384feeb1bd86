"""Weight gradient of the Triton kernels, in the interpreter, against dense torch in float64.

Sums of small whole numbers are exact in float32 whatever their order, so that results are compared bit by bit there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddst import kernels
from ddst.kernels import weight_grad
from ddst.kernels.configs import DTYPES, SIDES, WeightGradConfig, weight_grad_candidates
from ddst.kernels.index import weight_grad_groups
from ddst.kernels.tile import divide, divisor
from helpers.dense import active_blocks, inside, pack_blocks
from helpers.problems import Case, ConvProblem, LinearProblem, between_guards
from helpers.slots import scatter
from helpers.tolerances import assert_close

BLOCKS = [(out, into) for out in SIDES for into in SIDES]


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets a part of the pixels be a single step, so that small problems have many parts."""
    monkeypatch.setattr(weight_grad, "STEPS_PER_PART", 1)
    weight_grad.plan.cache_clear()
    yield
    weight_grad.plan.cache_clear()


def run(problem: ConvProblem | LinearProblem, case: Case, config: WeightGradConfig | None = None) -> Tensor:
    """The kernel's result from operands between NaN, of blocks scattered over slots; free slots are checked here."""
    slots = scatter(case.mask)
    operands = [t if 0 in t.stride() else between_guards(t) for t in (case.grad, case.x, slots.topology)]
    settings: dict[str, Any] = {"config": config}
    if isinstance(problem, LinearProblem):
        result = kernels.linear_weight_grad(*operands, case.weight_shape, case.block, **settings)
    else:
        explicit = problem.explicit()
        assert explicit is not None
        result = kernels.conv2d_weight_grad(*operands, case.weight_shape, case.block, *explicit, **settings)
    slots.check_free(result)
    return result[slots.of_block]


def expected(case: Case) -> Tensor:
    """The same in float64."""
    return pack_blocks(case.dense_weight_grad(), case.mask, case.block)


def interpreted(block: tuple[int, int]) -> list[WeightGradConfig]:
    """All candidates that are different computations: warps and stages are the compiler's business."""
    listed = [replace(c, warps=4, stages=3) for dtype in DTYPES for c in weight_grad_candidates(dtype, block)]
    if block != (16, 16):  # waves say how many parts there are, which is the same question for every block
        listed = [replace(c, waves=4) for c in listed]
    return list(dict.fromkeys(listed))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.usefixtures("poison_outputs")
def test_every_configuration_is_exact_and_repeatable(block: tuple[int, int]) -> None:
    """Ragged channels, groups that are not full, parts of pixels of which the last is not full."""
    problem = ConvProblem(
        batch=2, size=(8, 7), kernel=(3, 2), padding=(1, 2), stride=(1, 2), dilation=(2, 1), mask="0.3",
        channels=(block[1] + 8, block[0] + 5), block=block, layout="channels_last", grad_layout="channels_last",
    )  # fmt: skip
    for dtype in DTYPES:
        case = problem.build(dtype, "whole")
        reference = expected(case)
        assert reference.abs().max() <= 256, "bfloat16 holds the results exactly"
        for config in interpreted(block) if dtype == torch.float32 else [None]:
            result = run(problem, case, config)
            assert result.dtype == dtype
            assert torch.equal(result.double(), reference), (dtype, config)
            assert not result[~inside(case.mask, case.weight_shape, block)].any()
    normal = problem.build(torch.float32)
    for config in interpreted(block)[:1]:
        assert torch.equal(run(problem, normal, config), run(problem, normal, config)), config


GEOMETRIES = [
    ConvProblem(stride=(2, 3), padding=(4, 5), size=(5, 6)),  # padding wider than the kernel
    ConvProblem(kernel=(4, 4), stride=2, size=(6, 7)),
    ConvProblem(kernel=(1, 1), padding=0, stride=2, size=(7, 8)),
    ConvProblem(kernel=(1, 1), padding=1),
    ConvProblem(kernel=(2, 3), stride=(4, 1), dilation=(1, 2), padding=(0, 2), size=(9, 5)),
    ConvProblem(dilation=(3, 2), padding=(3, 0), size=(8, 9), stride=(1, 2), layout="transposed"),
    ConvProblem(kernel=(7, 7), padding=3, size=(3, 2), mask="0.1"),  # kernel larger than the image
    ConvProblem(kernel=(1, 40), padding=(0, 20), size=(2, 9), mask="0.1", layout="strided", grad_layout="strided"),
    ConvProblem(size=(1, 1), batch=3, stride=2),
    ConvProblem(mask="one", grad_layout="expanded"),
    ConvProblem(mask="full", size=(4, 4)),
    ConvProblem(mask="empty_lines", channels=(40, 48), batch=1),
    ConvProblem(channels=(3, 1), stride=2, kernel=(4, 4), size=(8, 8)),
    LinearProblem(features=(37, 45), block=(16, 16), batch=(67,)),
    LinearProblem(features=(40, 70), block=(64, 16), batch=(1,), layout="transposed", grad_layout="strided"),
]


@pytest.mark.parametrize("by", ["row", "col"])
@pytest.mark.parametrize("problem", GEOMETRIES, ids=str)
@pytest.mark.usefixtures("poison_outputs")
def test_geometries(problem: ConvProblem | LinearProblem, by: Any) -> None:
    if isinstance(problem, ConvProblem):
        ragged = (20, 28) if problem.channels == ConvProblem().channels else problem.channels
        problem = replace(problem, channels=ragged, block=(16, 16))
    case = problem.build(torch.float32, "whole")
    config = WeightGradConfig(by, 4, pixels=32)
    assert torch.equal(run(problem, case, config).double(), expected(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rounding(dtype: torch.dtype) -> None:
    """Normal numbers: float32 sums, rounded once. The interpreter cuts bfloat16 off where devices round it."""
    problem = ConvProblem(batch=4, size=(9, 8), channels=(40, 36), block=(16, 32), mask="0.3")
    case = problem.build(dtype)
    assert_close(run(problem, case), expected(case))


@pytest.mark.parametrize(
    "problem",
    [
        ConvProblem(block=(16, 16), mask="none"),
        ConvProblem(block=(16, 16), batch=0),
        LinearProblem(block=(16, 16), batch=(0,)),
        LinearProblem(block=(16, 16), mask="none"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poison_outputs")
def test_empty(problem: ConvProblem | LinearProblem) -> None:
    case = problem.build(torch.float32, "whole")
    result = run(problem, case)
    assert result.shape == (len(active_blocks(case.mask)), 16, 16)
    assert not result.any()


@pytest.mark.usefixtures("poison_outputs")
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_infinities_stay_inside_the_weight() -> None:
    """The part of an edge block outside the weight is zero even where zero times infinity would be NaN."""
    problem = ConvProblem(channels=(20, 20), block=(16, 16), mask="full", kernel=(1, 1), padding=0)
    case = problem.build(torch.float32, "whole")
    case.x.fill_(float("inf"))
    case.grad.fill_(1.0)
    for config in (WeightGradConfig("row"), WeightGradConfig("col")):
        result = run(problem, case, config)
        within = inside(case.mask, case.weight_shape, (16, 16))
        assert result[within].isinf().all()
        assert not result[~within].any()


@pytest.mark.usefixtures("poison_outputs")
def test_more_pixels_than_a_launch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of 42 pixels per launch; the parts of all launches are added."""
    monkeypatch.setattr(weight_grad, "PIXEL_LIMIT", 90)
    problem = ConvProblem(batch=5, size=(6, 7), channels=(20, 28), block=(16, 16), layout="channels_last")
    case = problem.build(torch.float32, "whole")
    assert torch.equal(run(problem, case, WeightGradConfig("row", 4, pixels=32)).double(), expected(case))
    with pytest.raises(ValueError, match="less than 90 pixels per image, got 99"):
        weight_grad.split_pixels(images=1, size=99, programs=1, step=32, processors=1, waves=1)


def test_blocks_that_move_between_slots_are_followed() -> None:
    """In place, also where another number of slots is free."""
    problem = ConvProblem(channels=(40, 40), block=(16, 16), mask="0.3", layout="channels_last")
    case = problem.build(torch.float32, "whole")
    explicit = problem.explicit()
    assert explicit is not None
    slots = scatter(case.mask, free=2)
    topology = slots.topology.clone()
    for mask in (case.mask.flip(0, 1, 2, 3), case.mask.flip(0), None):
        for config in (WeightGradConfig("row"), WeightGradConfig("col")):
            result = kernels.conv2d_weight_grad(
                case.grad, case.x, topology, case.weight_shape, case.block, *explicit, config=config
            )
            slots.check_free(result)
            assert torch.equal(result[slots.of_block].double(), expected(case))
        if mask is not None:
            mask.view(-1)[mask.view(-1).nonzero()[0]] = False
            slots = scatter(mask, free=slots.count - int(mask.sum()), seed=1)
            topology.copy_(slots.topology)
            case = replace(case, mask=mask)


@pytest.mark.parametrize("by", ["row", "col"])
@pytest.mark.usefixtures("poison_outputs")
def test_free_slots_only(by: Any) -> None:
    """As after all blocks have left; with one part of the pixels, and with several that are added."""
    for images, waves in ((1, 1), (5, 8)):
        problem = ConvProblem(batch=images, channels=(20, 24), block=(16, 16), mask="none", size=(9, 9))
        case = problem.build(torch.float32, "whole")
        case.x.fill_(float("inf"))
        assert run(problem, case, WeightGradConfig(by, 4, pixels=32, waves=waves)).shape == (0, 16, 16)


@given(
    images=st.integers(1, 2**20),
    size=st.integers(1, 2**26),
    programs=st.integers(1, 10**5),
    step=st.sampled_from([32, 64, 128]),
    processors=st.integers(1, 200),
    waves=st.sampled_from([1, 2, 4, 8]),
)
def test_parts_cover_every_pixel_once(
    images: int, size: int, programs: int, step: int, processors: int, waves: int
) -> None:
    size = min(size, 2**38 // images)
    parts = weight_grad.split_pixels(images, size, programs, step, processors, waves)
    assert [p.first for p in parts] == [sum(p.count for p in parts[:i]) for i in range(len(parts))]
    assert sum(p.count for p in parts) == images
    for part in parts:
        pixels = part.count * size
        assert part.length % step == 0
        assert (part.splits - 1) * part.length < pixels <= part.splits * part.length
        assert part.splits * part.length < 2**31
        assert part.splits == 1 or part.splits * programs <= processors * waves


@pytest.mark.parametrize("by", ["row", "col"])
@pytest.mark.parametrize("mask", ["full", "one", "empty_lines", "0.1"])
def test_a_program_for_every_group(mask: str, by: Any) -> None:
    """The launch counts groups from sizes; the lists are as long as that, and hold every slot once."""
    problem = ConvProblem(channels=(100, 70), block=(16, 16), mask=mask)
    case = problem.build(torch.float32, "whole")
    slots = scatter(case.mask, free=6)
    described = kernels.Problem(
        "weight_grad", False, torch.float32, (16, 16), problem.weight_shape, (1, 1), (1, 1), (1, 1), 2, (6, 7), (6, 7),
        slots.count,
    )  # fmt: skip
    config = WeightGradConfig(by, 4, pixels=32)
    groups = weight_grad_groups(slots.topology, problem.weight_shape, (16, 16), by, 4)
    (launch,) = weight_grad.plan(described, config, "ieee", -1).launches
    assert launch.grid[0] == len(groups.bounds)
    held = [i for start, end in groups.bounds.tolist() for i in groups.ids[start:end].tolist()]
    assert sorted(held) == list(range(described.blocks))


@pytest.mark.parametrize("processors", [108, 132, 148])
def test_parts_fill_the_device(processors: int) -> None:
    """With up to as many programs as multiprocessors, at least three quarters of their time are used."""
    for programs in range(1, processors + 1):
        total = programs * weight_grad.number_of_parts(programs, processors, 4)
        assert total / (processors * -(-total // processors)) >= 0.75, programs


@triton.jit
def _divide_all(numbers, quotients, magic, bits, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, COUNT)
    tl.store(quotients + at, divide(tl.load(numbers + at), magic, bits))


@pytest.mark.parametrize(
    "divisor_of", [1, 2, 3, 5, 7, 31, 32, 224, 641, 6700417, 2**20 - 1, 2**30, 2**30 + 1, 2**31 - 1]
)
def test_division_by_multiplication_is_exact(divisor_of: int) -> None:
    """Around the multiples of the divisor, where a wrong quotient would show, up to the largest number."""
    largest = 2**31 - 1
    multiples = torch.linspace(0, largest // divisor_of, 256, dtype=torch.float64).long() * divisor_of
    numbers = torch.cat([multiples - 1, multiples, multiples + 1, torch.full((256,), largest)]).clamp(0, largest)
    quotients = torch.full((1024,), -1, dtype=torch.int32)
    magic, bits = divisor(divisor_of)
    _divide_all[(1,)](numbers.to(torch.int32), quotients, magic, bits, COUNT=1024)
    assert torch.equal(quotients.long(), numbers // divisor_of)
