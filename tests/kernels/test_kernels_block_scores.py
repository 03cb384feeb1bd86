"""Block scores of the Triton kernels, in the interpreter, against dense torch in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddst import kernels
from ddst.kernels import block_scores, weight_grad
from ddst.kernels.configs import DTYPES, SIDES
from helpers.dense import block_norms
from helpers.problems import Case, ConvProblem, LinearProblem, between_guards
from helpers.tolerances import assert_close

BLOCKS = [(out, into) for out in SIDES for into in SIDES]


@pytest.fixture(params=[1, 40], ids=["direct", "parts"], autouse=True)
def _processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device that few programs fill, and one that needs the pixels split."""
    monkeypatch.setattr(weight_grad, "STEPS_PER_PART", 1)
    monkeypatch.setattr(block_scores, "multiprocessors", lambda device: request.param)
    block_scores.plan.cache_clear()
    yield
    block_scores.plan.cache_clear()


def run(problem: ConvProblem | LinearProblem, case: Case) -> Tensor:
    """The kernel's result from operands between NaN."""
    operands = [t if 0 in t.stride() else between_guards(t) for t in (case.grad, case.x)]
    if isinstance(problem, LinearProblem):
        return kernels.linear_block_scores(*operands, case.weight_shape, case.block)
    explicit = problem.explicit()
    assert explicit is not None
    return kernels.conv2d_block_scores(*operands, case.weight_shape, case.block, *explicit)


@pytest.mark.usefixtures("poison_outputs")
def test_every_block_and_dtype() -> None:
    """Channels of more than one tile, ragged; every tap."""
    problem = ConvProblem(batch=2, size=(8, 7), kernel=(1, 2), channels=(72, 84), layout="channels_last")
    cases = [problem.build(dtype) for dtype in DTYPES]
    gradients = [case.dense_weight_grad() for case in cases]
    for i, block in enumerate(BLOCKS):
        case, gradient = cases[i % 3], gradients[i % 3]
        result = run(problem, replace(case, block=block))
        assert result.dtype == case.x.dtype
        assert_close(result, block_norms(gradient, block), str((result.dtype, block)))


@pytest.mark.parametrize(
    "problem",
    [
        ConvProblem(stride=(2, 3), padding=(4, 5), size=(5, 6)),
        ConvProblem(kernel=(2, 3), stride=(4, 1), dilation=(1, 2), padding=(0, 2), size=(9, 5), layout="strided"),
        ConvProblem(kernel=(1, 1), padding=1, grad_layout="expanded"),
        ConvProblem(kernel=(3, 1), channels=(3, 1), padding=(1, 0), batch=4),
        LinearProblem(features=(37, 70), batch=(67,)),
        LinearProblem(features=(20, 16), batch=(1,), layout="transposed"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poison_outputs")
def test_geometries(problem: ConvProblem | LinearProblem) -> None:
    problem = replace(problem, block=(32, 16))
    case = problem.build(torch.float32)
    result = run(problem, case)
    assert_close(result, block_norms(case.dense_weight_grad(), case.block))
    assert torch.equal(result, run(problem, case)), "the same bits again"


@pytest.mark.parametrize("problem", [ConvProblem(batch=0), LinearProblem(batch=(0,))], ids=str)
def test_empty_batch(problem: ConvProblem | LinearProblem) -> None:
    case = replace(problem, block=(16, 16)).build(torch.float32)
    result = run(problem, case)
    assert result.shape == case.mask.shape
    assert not result.any()


def test_more_pixels_than_a_launch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_grad, "PIXEL_LIMIT", 90)
    problem = ConvProblem(batch=5, size=(6, 7), channels=(20, 28), block=(16, 16), layout="channels_last")
    case = problem.build(torch.float32)
    assert_close(run(problem, case), block_norms(case.dense_weight_grad(), case.block))


def test_scratch_memory_is_bounded() -> None:
    """Whatever the layer: at most FULL tiles per multiprocessor where pixels are split at all."""
    for side in (64, 256, 1024, 4096):
        shape = (side, side, 3, 3)
        problem = kernels.Problem(
            "block_scores", False, torch.float32, (16, 16), shape, (1, 1), (1, 1), (1, 1), 64, (32, 32), (32, 32), 0
        )
        parts, _, final = block_scores.plan(problem, "ieee", -1)
        tiles = (side // block_scores.TILE) ** 2 * 9
        splits = sum(p.splits for p in parts)
        limit = block_scores.FULL * block_scores.multiprocessors(-1)
        assert splits == 1 if final is None else splits * tiles <= limit
