"""16-bit floats, autocast, and refusal of mixed dtypes."""

from __future__ import annotations

import pytest
import torch

from ddst.ops import conv2d
from helpers.problems import ConvProblem, LinearProblem
from helpers.sparse import BACKENDS, Problem, apply, forward_and_grads
from helpers.tolerances import assert_close

HALVES = [torch.bfloat16, torch.float16]
# Long sums of numbers of one sign: accumulated in 16 bits, they would be wrong by several percent.
LONG_CONV = ConvProblem(channels=(64, 32), block=(16, 16), mask="0.8", size=(8, 8), padding="same")
LONG_LINEAR = LinearProblem(batch=(300,), features=(1024, 32), block=(16, 16), mask="0.8")


def _positive(problem: Problem, dtype: torch.dtype):
    case = problem.build(torch.float64, seed=2)
    for t in (case.x, case.values, case.bias, case.grad):
        assert t is not None
        t.abs_().mul_(0.1)
    rounded = problem.build(dtype, seed=2)
    for name in ("x", "values", "bias", "grad"):
        getattr(rounded, name).copy_(getattr(case, name))
    return rounded


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("problem", [LONG_CONV, LONG_LINEAR], ids=["conv", "linear"])
def test_half_types_compute_in_float32_and_return_their_own(problem: Problem, dtype: torch.dtype, backend: str) -> None:
    case = _positive(problem, dtype)
    y, *grads = forward_and_grads(case, backend)
    expected = case.dense(case.x.double(), case.values.double(), case.bias.double())
    assert y.dtype == dtype
    assert_close(y, expected, "output")
    for name, got, want in zip(("input", "values", "bias"), grads, case.dense_grads(), strict=True):
        assert got.dtype == dtype
        if name != "bias":  # torch itself sums a 16-bit bias gradient
            assert_close(got, want, f"gradient of {name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("problem", [ConvProblem(channels=(9, 18)), LinearProblem()], ids=["conv", "linear"])
def test_autocast_is_followed_as_by_the_dense_layer(problem: Problem, dtype: torch.dtype, backend: str) -> None:
    case = problem.build(torch.float32)
    x, values, bias = (t.detach().requires_grad_() for t in (case.x, case.values, case.bias))
    with torch.autocast("cpu", dtype=dtype):
        y = apply(case, backend, x, values, bias)
        assert y.dtype == dtype == case.dense(case.x, case.values, case.bias).dtype
    y.backward(case.grad.to(dtype))
    assert_close(y, case.dense(case.x.double(), case.values.double(), case.bias.double()), "output")
    for leaf, want in zip((x, values, bias), case.dense_grads(), strict=True):
        assert leaf.grad.dtype == torch.float32
        error = (leaf.grad.double() - want).norm() / want.norm()
        assert error < (2e-2 if dtype == torch.bfloat16 else 3e-3)  # three roundings to the autocast dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", [ConvProblem(), LinearProblem()], ids=["conv", "linear"])
def test_autocast_takes_mixed_arguments_and_leaves_float64_alone(problem: Problem, backend: str) -> None:
    case, double = problem.build(torch.float32), problem.build(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = apply(case, backend, x=case.x.bfloat16())
        assert torch.equal(mixed, apply(case, backend))
        y = apply(double, backend)
    assert y.dtype == torch.float64
    assert_close(y, double.dense(double.x, double.values, double.bias), "float64 output under autocast")
    with torch.autocast("cpu", enabled=False):
        assert apply(case, backend).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", [ConvProblem(), LinearProblem()], ids=["conv", "linear"])
@pytest.mark.parametrize(
    "dtypes, named",
    [
        ((torch.float32, torch.float64, torch.float32), "values"),
        ((torch.float64, torch.float32, torch.float64), "values"),
        ((torch.bfloat16, torch.float32, torch.bfloat16), "values"),
        ((torch.float32, torch.float32, torch.float64), "bias"),
        ((torch.int64, torch.int64, torch.int64), "input"),
        ((torch.complex64, torch.complex64, torch.complex64), "input"),
        ((torch.bool, torch.bool, torch.bool), "input"),
    ],
    ids=str,
)
def test_other_dtypes_are_refused(problem: Problem, dtypes: tuple[torch.dtype, ...], named: str, backend: str) -> None:
    case = problem.build(torch.float32)
    tensors = [t.to(dtype) for t, dtype in zip((case.x, case.values, case.bias), dtypes, strict=True)]
    with pytest.raises(TypeError, match=named):
        apply(case, backend, *tensors)


def test_whole_numbers_are_refused_also_under_autocast() -> None:
    case = ConvProblem().build(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="input"):
        conv2d(case.x.int(), case.values, None, case.topology, case.weight_shape)
