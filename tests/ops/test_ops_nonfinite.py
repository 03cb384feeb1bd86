"""NaN and infinity travel through active blocks, and nowhere that the dense operation would not carry them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.dense import active_entries, inside, pack_blocks, unpack_blocks
from helpers.problems import Case, ConvProblem, LinearProblem, between_guards, few, sample_problems
from helpers.sparse import BACKENDS, Problem, call, forward_and_grads, op_arguments

# Ragged channels: the lanes beyond the last channel of one pixel are the first channels of the next.
CONVS = [
    ConvProblem(channels=(11, 21), block=(8, 8), mask="0.5", layout="channels_last"),
    ConvProblem(channels=(11, 21), block=(16, 4), mask="0.5"),
    ConvProblem(channels=(5, 19), block=(16, 16), mask="0.5", stride=2),
    ConvProblem(channels=(19, 9), block=(3, 5), mask="0.5", dilation=2, padding=2),
]
LINEARS = [LinearProblem(features=(19, 21)), LinearProblem(features=(35, 19), block=(16, 16), mask="0.5")]
PROBLEMS: list[Problem] = [*CONVS, *LINEARS]


def _bounds(case: Case, which: str, at: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(must be NaN, may be NaN) of `which` result when one entry, `at`, of the tensor it reads is NaN.

    Dense arithmetic multiplies the NaN by every weight, zero or not: the upper bound. The lower bound multiplies
    by active weights only. Counted with ones, in float64.
    """
    mark = torch.zeros_like(case.x if which != "input_grad" else case.grad, dtype=torch.float64)
    mark[at] = 1
    ones = torch.ones(case.weight_shape, dtype=torch.float64)
    active = active_entries(case.mask, case.weight_shape, case.block).double()
    bounds = []
    for weight in (active, ones):
        x = (mark if which != "input_grad" else torch.zeros_like(case.x, dtype=torch.float64)).requires_grad_()
        w = weight.clone().requires_grad_()
        y = F.conv2d(x, w, **case.kwargs) if w.dim() == 4 else F.linear(x, w)
        if which == "output":
            bounds.append(y > 0)
        elif which == "input_grad":
            bounds.append(torch.autograd.grad(y, x, mark)[0] > 0)
        else:
            bounds.append(torch.autograd.grad(y, w, torch.ones_like(y))[0] > 0)
    return bounds[0], bounds[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("channel", ["first", "last"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_poisoned_input_entry(problem: Problem, channel: str, poison: float, backend: str) -> None:
    case = problem.build(torch.float32, seed=9)
    index = 0 if channel == "first" else -1
    at = (1, index, 2, 3) if case.x.dim() == 4 else (1, index)
    case.x[at] = poison
    y, dx, dvalues, _ = forward_and_grads(case, backend)
    must, may = _bounds(case, "output", at)
    bad = ~y.isfinite()
    assert (bad | ~must).all(), "swallowed in the output"
    assert not (bad & ~may).any(), "leaked in the output"
    assert dx.isfinite().all()
    _, may = _bounds(case, "weight_grad", at)
    allowed = pack_blocks(may, case.slots, case.block)
    bad = ~dvalues.isfinite()
    assert torch.equal(bad, allowed), "gradient of values"
    outside = ~inside(case.slots, case.weight_shape, case.block)
    assert (dvalues[outside] == 0).all(), "entries outside the channel counts"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channel", ["first", "last"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_poisoned_output_gradient_entry(problem: Problem, channel: str, backend: str) -> None:
    case = problem.build(torch.float32, seed=9)
    index = 0 if channel == "first" else -1
    at = (1, index, 1, 2) if case.x.dim() == 4 else (1, index)
    case.grad[at] = float("nan")
    y, dx, dvalues, dbias = forward_and_grads(case, backend)
    assert y.isfinite().all()
    must, may = _bounds(case, "input_grad", at)
    bad = ~dx.isfinite()
    assert (bad | ~must).all(), "swallowed in the gradient of input"
    assert not (bad & ~may).any(), "leaked in the gradient of input"
    rows = torch.zeros(case.weight_shape, dtype=torch.bool)
    rows[index] = True  # an output channel's gradient reaches its own weights only
    assert not (~dvalues.isfinite() & ~pack_blocks(rows, case.slots, case.block)).any(), "leaked in values"
    assert dbias is not None
    assert dbias.isnan().nonzero().flatten().tolist() == [index % case.weight_shape[0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", [CONVS[0], LINEARS[0]], ids=str)
def test_a_poisoned_weight_reaches_its_own_output_channel_only(problem: Problem, backend: str) -> None:
    case = problem.build(torch.float32)
    case.values[case.active.nonzero()[0, 0], 0, 0] = float("nan")
    y, dx, dvalues, _ = forward_and_grads(case, backend)
    weight = unpack_blocks(case.values, case.slots, case.weight_shape)
    out, channel = weight.isnan().nonzero()[0, :2].tolist()
    hit = torch.zeros_like(y, dtype=torch.bool)
    hit.select(1, out).fill_(True)
    assert y.isnan().any()
    assert not (y.isnan() & ~hit).any()
    hit = torch.zeros_like(dx, dtype=torch.bool)
    hit.select(1, channel).fill_(True)
    assert dx.isnan().any()
    assert not (dx.isnan() & ~hit).any()
    assert dvalues.isfinite().all()


def test_outside_of_edge_blocks_is_zero_even_next_to_nan() -> None:
    problem = ConvProblem(channels=(21, 20), size=(5, 5), block=(16, 16), mask="full")
    case = problem.build(torch.float32)
    case.x.fill_(float("nan"))
    case.grad.fill_(float("inf"))
    arguments = op_arguments(problem, case)
    assert arguments is not None
    grad = call("conv2d_weight_grad", arguments["conv2d_weight_grad"])
    within = inside(case.slots, case.weight_shape, case.block)
    assert not within.all() and (grad[~within] == 0).all()
    assert grad[within].isnan().all()


@pytest.mark.usefixtures("poison_outputs")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("problem", few(sample_problems(), 40), ids=str)
def test_memory_around_the_arguments_has_no_influence(problem: Problem, layout: str) -> None:
    problem = replace(problem, layout=layout, grad_layout=layout)
    case = problem.build(torch.float32)
    guarded = {n: between_guards(getattr(case, n)) for n in ("x", "values", "topology", "grad")}
    guarded["bias"] = None if case.bias is None else between_guards(case.bias)
    plain, fenced = forward_and_grads(case, "cpu"), forward_and_grads(replace(case, **guarded), "cpu")
    for one, two in zip(plain, fenced, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


def test_cpu_backend_does_not_read_an_input_block_without_active_blocks() -> None:
    # Stronger than dense: a column without blocks is not read at all, so its NaN never shows.
    problem = replace(CONVS[0], channels=(24, 16), mask="none")
    case = problem.build(torch.float32)
    assert problem.channels[0] == 24
    case.x.fill_(float("nan"))
    y, dx, dvalues, _ = forward_and_grads(case, "cpu")
    assert y.isfinite().all()
    assert (dx == 0).all()
    assert torch.equal(dvalues, torch.zeros_like(case.values))
