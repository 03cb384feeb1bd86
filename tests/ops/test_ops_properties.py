"""Laws that hold for every problem: linearity, adjoints, and what block scores sum to."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.dense import block_norms, topology_of
from helpers.problems import Case, ConvProblem, LinearProblem
from helpers.sparse import Problem, apply, call, forward_and_grads, op_arguments
from helpers.tolerances import assert_close

modest = settings(max_examples=25, deadline=None)
blocks = st.tuples(st.integers(1, 20), st.integers(1, 20))


@st.composite
def conv_problems(draw: st.DrawFn) -> ConvProblem:
    """Any convolution whose kernel fits its padded input."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    assume(all(size[i] + 2 * padding[i] > dilation[i] * (kernel[i] - 1) for i in (0, 1)))
    return ConvProblem(
        batch=draw(st.integers(1, 3)),
        channels=(draw(st.integers(1, 30)), draw(st.integers(1, 30))),
        kernel=kernel,
        size=size,
        block=draw(blocks),
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        mask=draw(st.sampled_from(["0.2", "0.5", "full", "empty_lines"])),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "strided"])),
        bias=False,
    )


@st.composite
def linear_problems(draw: st.DrawFn) -> LinearProblem:
    """Any linear map."""
    return LinearProblem(
        batch=(draw(st.integers(1, 40)),),
        features=(draw(st.integers(1, 50)), draw(st.integers(1, 50))),
        block=draw(blocks),
        mask=draw(st.sampled_from(["0.2", "0.5", "full", "empty_lines"])),
        bias=False,
    )


@st.composite
def wide_problems(draw: st.DrawFn) -> ConvProblem:
    """Blocks and image widths around the sizes of vectors and tiles, where loops have their remainders."""
    side = st.sampled_from([1, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64])
    block = (draw(side), draw(side))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 2), (1, 3)]))
    stride = draw(st.sampled_from([1, 1, 2]))
    return ConvProblem(
        batch=draw(st.integers(1, 2)),
        channels=(draw(st.integers(1, block[1] + 9)), draw(st.integers(1, block[0] + 9))),
        kernel=kernel,
        size=(draw(st.integers(2, 4)), draw(st.integers(2, 27))),
        block=block,
        stride=stride,
        padding=(kernel[0] // 2, kernel[1] // 2),
        mask=draw(st.sampled_from(["one", "0.2", "0.6", "full"])),
        layout=draw(st.sampled_from(["contiguous", "channels_last"])),
        bias=draw(st.booleans()),
    )


def _arguments(problem: Problem, case: Case) -> dict[str, Tensor]:
    """The four ops by suffix, called."""
    arguments = op_arguments(problem, case)
    assert arguments is not None
    return {name.partition("_")[2]: call(name, args) for name, args in arguments.items()}


def _inner(a: Tensor, b: Tensor) -> float:
    return (a.double() * b.double()).sum().item()


@modest
@given(problem=st.one_of(conv_problems(), linear_problems()), seed=st.integers(0, 1000))
def test_adjoint_identities(problem: Problem, seed: int) -> None:
    case = problem.build(torch.float64, seed=seed)
    result = _arguments(problem, case)
    forward = _inner(result[""], case.grad)
    scale = result[""].norm().item() * case.grad.norm().item() + 1e-300
    assert abs(forward - _inner(case.x, result["input_grad"])) <= 1e-12 * scale
    values, weight_grad = case.values[case.active], result["weight_grad"][case.active]
    assert abs(forward - _inner(values, weight_grad)) <= 1e-12 * scale


@modest
@given(problem=st.one_of(conv_problems(), linear_problems()), a=st.integers(-4, 4), b=st.integers(-4, 4))
def test_linear_in_values_and_in_input(problem: Problem, a: int, b: int) -> None:
    # Whole numbers: both sides are exact.
    one, two = problem.build(torch.float32, "whole", seed=1), problem.build(torch.float32, "whole", seed=1)
    g = torch.Generator().manual_seed(2)
    other = torch.randint(-2, 3, one.values.shape, generator=g).float() * (one.values != 0)
    combined = apply(one, values=a * one.values + b * other)
    assert torch.equal(combined, a * apply(one) + b * apply(one, values=other))
    shifted = torch.randint(-2, 3, two.x.shape, generator=g).float()
    assert torch.equal(apply(two, x=a * two.x + b * shifted), a * apply(two) + b * apply(two, x=shifted))


@modest
@given(problem=st.one_of(conv_problems(), linear_problems()), seed=st.integers(0, 1000))
def test_block_scores_are_the_norms_of_the_dense_gradient(problem: Problem, seed: int) -> None:
    case = problem.build(torch.float64, seed=seed)
    result = _arguments(problem, case)
    dense = case.dense_weight_grad()
    assert_close(result["block_scores"], block_norms(dense, case.block), "scores")
    assert_close(result["block_scores"].square().sum(), dense.square().sum(), "sum of squares")
    norms, active = result["weight_grad"].flatten(1).norm(dim=1), case.active
    scores = result["block_scores"].flatten()[case.slots[active].long()]
    assert_close(norms[active], scores, "active blocks")
    assert (norms[~active] == 0).all()


@settings(max_examples=80, deadline=None)
@given(problem=st.one_of(wide_problems(), linear_problems()), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_whole_numbers_are_exact_at_the_remainders_of_tiles(problem: Problem, dtype: torch.dtype) -> None:
    case = problem.build(dtype, "whole", seed=4)
    got = forward_and_grads(case, "cpu")
    bias = None if case.bias is None else case.bias.double()
    for result, want in zip(
        got, (case.dense(case.x.double(), case.values.double(), bias), *case.dense_grads()), strict=True
    ):
        assert result is None or torch.equal(result.double(), want)


@modest
@given(problem=st.one_of(conv_problems(), linear_problems()), data=st.data())
def test_sum_over_two_halves_of_a_mask(problem: Problem, data: st.DataObject) -> None:
    # Freeing the slots of one half of the active blocks, then of the other, and adding the outputs changes nothing.
    case = problem.build(torch.float32, "whole")
    count = case.slots.numel()
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    total = torch.zeros_like(apply(case))
    for half in (chosen, ~chosen):
        slots = case.slots.where(half, -1)
        total = total + apply(replace(case, slots=slots, topology=topology_of(slots, case.mask.shape)))
    assert torch.equal(total, apply(case))
