"""The eight registered ops called directly: values, layouts, argument checks in C++, and torch.library.opcheck."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.dense import block_norms, pack_blocks
from helpers.problems import (
    ConvProblem,
    LinearProblem,
    few,
    sample_conv_problems,
    sample_linear_problems,
    sample_problems,
)
from helpers.sparse import Problem, call, op_arguments
from helpers.tolerances import assert_close

OP_NAMES = [
    kind + suffix for kind, suffix in itertools.product(("conv2d", "linear"), ("", "_input_grad", "_weight_grad"))
] + ["conv2d_block_scores", "linear_block_scores"]


def expressible(problems: list[Any]) -> list[Any]:
    return [p for p in problems if op_arguments(p, p.build()) is not None]


@pytest.mark.usefixtures("poison_outputs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("problem", expressible(sample_problems()), ids=str)
def test_each_pass_against_dense(problem: Problem, dtype: torch.dtype) -> None:
    for channels_last in (False, True):
        case = problem.build(dtype, seed=7)
        arguments = op_arguments(problem, case, channels_last)
        assert arguments is not None
        got = {name.partition("_")[2]: call(name, args) for name, args in arguments.items()}
        bias = None if case.bias is None else case.bias.double()
        dense_weight_grad = case.dense_weight_grad()
        expected = {
            "": case.dense(case.x.double(), case.values.double(), bias),
            "input_grad": case.dense_grads()[0],
            "weight_grad": pack_blocks(dense_weight_grad, case.slots, case.block),
            "block_scores": block_norms(dense_weight_grad, case.block),
        }
        assert got.keys() == expected.keys()
        for name, want in expected.items():
            assert got[name].dtype == dtype
            assert_close(got[name], want, f"{name or 'forward'}, channels_last={channels_last}")
        assert (got["weight_grad"][~case.active] == 0).all(), "free slots"
        if case.x.dim() == 4:
            wanted = torch.channels_last if channels_last else torch.contiguous_format
            for name in ("", "input_grad"):
                shape = got[name].shape
                assert got[name].stride() == torch.empty(shape, memory_format=wanted).stride(), name


@pytest.mark.usefixtures("poison_outputs")
@pytest.mark.parametrize(
    "problem",
    [ConvProblem(mask="none", bias=b, slots=s) for b in (True, False) for s in ("row_major", "scattered")],
    ids=str,
)
def test_no_active_block_gives_bias_and_zeros(problem: ConvProblem) -> None:
    case = problem.build(torch.float32)
    arguments = op_arguments(problem, case)
    assert arguments is not None
    y = call("conv2d", arguments["conv2d"])
    bias = torch.zeros(16) if case.bias is None else case.bias
    assert torch.equal(y, bias[None, :, None, None].expand_as(y))
    assert torch.equal(call("conv2d_input_grad", arguments["conv2d_input_grad"]), torch.zeros_like(case.x))
    assert case.values.shape[0] == 0 or problem.slots == "scattered"
    assert torch.equal(call("conv2d_weight_grad", arguments["conv2d_weight_grad"]), torch.zeros_like(case.values))
    assert (call("conv2d_block_scores", arguments["conv2d_block_scores"]) > 0).all()


@pytest.mark.usefixtures("poison_outputs")
@pytest.mark.parametrize("bias", [True, False])
def test_a_row_without_blocks_gives_exactly_the_bias(bias: bool) -> None:
    problem = ConvProblem(batch=8, channels=(32, 48), block=(16, 16), size=(12, 12), mask="empty_lines", bias=bias)
    case = problem.build(torch.float32)
    arguments = op_arguments(problem, case, channels_last=True)
    assert arguments is not None and not case.mask[1].any()
    expected = torch.zeros(48) if case.bias is None else case.bias
    y = call("conv2d", arguments["conv2d"])[:, 16:32]
    assert torch.equal(y, expected[16:32, None, None].expand_as(y))


@pytest.mark.usefixtures("poison_outputs")
@pytest.mark.parametrize("block", [(16, 16), (16, 4), (3, 16)])
@pytest.mark.parametrize(
    "problem",
    [
        ConvProblem(channels=(200, 150), kernel=(5, 5), padding=2, size=(4, 5), mask="0.1"),
        LinearProblem(batch=(9,), features=(1100, 1500), mask="0.1"),
    ],
    ids=["conv", "linear"],
)
def test_scores_of_a_weight_of_several_megabytes(problem: Problem, block: tuple[int, int]) -> None:
    # The dense gradient is formed a few block rows at a time; here it takes several such parts, the last one smaller.
    problem = replace(problem, block=block)
    case = problem.build(torch.float32)
    arguments = op_arguments(problem, case)
    assert arguments is not None
    name = next(name for name in arguments if name.endswith("block_scores"))
    assert_close(call(name, arguments[name]), block_norms(case.dense_weight_grad(), block), "scores")


def _chosen(name: str) -> list[Problem]:
    if name.startswith("linear"):
        return few(expressible(sample_linear_problems()), 3)
    return few(expressible(sample_conv_problems()), 5)


@pytest.mark.parametrize("name, problem", [(n, p) for n in OP_NAMES for p in _chosen(n)], ids=str)
def test_opcheck(name: str, problem: Problem) -> None:
    dtype = torch.float64
    case = problem.build(dtype)
    arguments = op_arguments(problem, case, channels_last=case.x.dim() == 4)
    assert arguments is not None
    differentiable = not name.endswith("block_scores")
    prepared = tuple(
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_(differentiable)
        if isinstance(a, torch.Tensor) and a.dtype == dtype
        else a
        for a in arguments[name]
    )
    torch.library.opcheck(getattr(torch.ops.ddst, name).default, prepared)


@pytest.mark.parametrize("name", OP_NAMES)
def test_fake_kernel_has_shape_dtype_and_strides_of_the_real_one(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    problems = sample_linear_problems() if name.startswith("linear") else sample_conv_problems()
    for problem, channels_last in itertools.product(few(expressible(problems), 12), (False, True)):
        case = problem.build(torch.float32)
        arguments = op_arguments(problem, case, channels_last)
        assert arguments is not None
        real = call(name, arguments[name])
        with FakeTensorMode() as mode:
            fake = call(name, tuple(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments[name]))
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride()), str(problem)


def _replaced(arguments: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*arguments[:index], value, *arguments[index + 1 :])


CONV_MISTAKES = [
    # op, position, replacement, what the message must name
    ("conv2d", 0, torch.zeros(2, 7, 6, 7), "input"),
    ("conv2d", 0, torch.zeros(8, 6, 7), "input"),
    ("conv2d", 0, torch.zeros(2, 8, 6, 7, dtype=torch.float64), "input|values"),
    ("conv2d", 0, torch.zeros(2, 8, 6, 7, dtype=torch.int32), "input"),
    ("conv2d", 1, torch.zeros(1, 8, 8), "values|topology"),
    ("conv2d", 1, torch.zeros(8, 8), "values"),
    ("conv2d", 2, torch.zeros(15), "bias"),
    ("conv2d", 2, torch.zeros(16, dtype=torch.float64), "bias"),
    ("conv2d", 3, torch.zeros(3, dtype=torch.int32), "topology|values"),
    ("conv2d", 3, torch.zeros(10, dtype=torch.int64), "topology"),
    ("conv2d", 4, [16, 8, 3], "weight_shape"),
    ("conv2d", 5, [0, 1], "stride"),
    ("conv2d", 6, [-1, 0], "padding"),
    ("conv2d", 7, [1, 0], "dilation"),
    ("conv2d", 7, [9, 9], "input|dilation"),
    ("conv2d_input_grad", 0, torch.zeros(2, 15, 6, 7), "grad_output"),
    ("conv2d_input_grad", 0, torch.zeros(2, 16, 5, 7), "grad_output|input_size"),
    ("conv2d_input_grad", 1, torch.zeros(1, 8, 8), "values|topology"),
    ("conv2d_input_grad", 4, [6], "input_size"),
    ("conv2d_weight_grad", 0, torch.zeros(3, 16, 6, 7), "grad_output|input"),
    ("conv2d_weight_grad", 0, torch.zeros(2, 16, 6, 7, dtype=torch.float64), "grad_output|input"),
    ("conv2d_weight_grad", 1, torch.zeros(2, 9, 6, 7), "input"),
    ("conv2d_weight_grad", 4, [0, 8], "block"),
    ("conv2d_weight_grad", 4, [65, 8], "block"),
    ("conv2d_block_scores", 0, torch.zeros(2, 16, 6, 6), "grad_output"),
    ("conv2d_block_scores", 3, [8, 0], "block"),
    ("conv2d_block_scores", 4, [1, 0], "stride"),
]
LINEAR_MISTAKES = [
    ("linear", 0, torch.zeros(5, 15), "input"),
    ("linear", 0, torch.zeros(5, 2, 16), "input"),
    ("linear", 0, torch.zeros(5, 16, dtype=torch.float64), "input|values"),
    ("linear", 1, torch.zeros(1, 8, 8), "values|topology"),
    ("linear", 2, torch.zeros(23), "bias"),
    ("linear", 3, torch.zeros(3, dtype=torch.int32), "topology|values"),
    ("linear", 4, [24], "weight_shape"),
    ("linear_input_grad", 0, torch.zeros(5, 23), "grad_output"),
    ("linear_weight_grad", 0, torch.zeros(4, 24), "grad_output|input"),
    ("linear_weight_grad", 4, [8, 65], "block"),
    ("linear_block_scores", 1, torch.zeros(5, 17), "input"),
    ("linear_block_scores", 3, [8], "block"),
]


@pytest.mark.parametrize("name, index, value, named", [*CONV_MISTAKES, *LINEAR_MISTAKES])
def test_wrong_argument_is_named(name: str, index: int, value: Any, named: str) -> None:
    problem: Problem = LinearProblem() if name.startswith("linear") else ConvProblem()
    arguments = op_arguments(problem, problem.build(torch.float32))
    assert arguments is not None
    call(name, arguments[name])  # right as it stands
    with pytest.raises((RuntimeError, ValueError, TypeError), match=named):
        call(name, _replaced(arguments[name], index, value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.randn(8, 16, 12, 12)}, r"input has 16 channels .*expected 32"),
        ({"input": torch.randn(32, 12, 12)}, r"input has shape \[32, 12, 12\], expected 4"),
        ({"input": torch.randn(8, 32, 12, 12).double()}, "input has dtype Double, expected Float like values"),
        ({"values": torch.randn(3, 16, 16)}, "values has 3 slots, expected .* as in topology"),
        ({"values": torch.randn(3, 16)}, r"values has shape \[3, 16\], expected \[slots, b_out, b_in\]"),
        ({"bias": torch.randn(47)}, r"bias has shape \[47\], expected \[48\]"),
        (
            {"topology": torch.zeros(8, dtype=torch.int32)},
            r"topology has 8 numbers, expected 3 \+ 1 \+ 2 \+ 1 \+ 5 \* slots",
        ),
        ({"topology": torch.zeros(7, dtype=torch.int64)}, "topology has dtype Long, expected Int"),
        ({"weight_shape": [48, 32, 3]}, "weight_shape has 3 numbers, expected 4"),
        ({"stride": [0, 1]}, r"stride is \[0, 1\], expected two ints from 1 to 2\^31 - 1"),
        ({"dilation": [9, 9]}, "is smaller than the kernel"),
        ({"padding": [0, 1_200_000_000]}, "makes an output of .* expected at most 2\\^31 - 1"),
    ],
)
def test_message_says_what_came_and_what_was_expected(change: dict[str, Any], message: str) -> None:
    case = ConvProblem(batch=8, channels=(32, 48), block=(16, 16), size=(12, 12)).build(torch.float32)
    arguments: dict[str, Any] = {"input": case.x, "values": case.values, "bias": None, "topology": case.topology}
    arguments |= {"weight_shape": case.weight_shape, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    torch.ops.ddst.conv2d(**arguments, channels_last=True)
    with pytest.raises(ValueError, match=message):
        torch.ops.ddst.conv2d(**(arguments | change), channels_last=True)


def test_a_topology_of_another_grid_is_refused() -> None:
    problem = ConvProblem()
    arguments = op_arguments(problem, problem.build(torch.float32))
    assert arguments is not None
    arguments["conv2d"][3][-1] = 1000  # a block id past the end: the kernels would read outside values
    with pytest.raises(ValueError, match="topology does not describe"):
        call("conv2d", arguments["conv2d"])
