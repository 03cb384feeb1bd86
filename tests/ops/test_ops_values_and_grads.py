"""Output and first gradients of the public functions on every problem and backend, against dense float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers.dense import inside
from helpers.problems import ConvProblem, LinearProblem, sample_conv_problems, sample_linear_problems, sample_problems
from helpers.sparse import BACKENDS, Problem, apply, forward_and_grads
from helpers.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poison_outputs")
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", sample_problems(), ids=str)
def test_whole_numbers_are_exact(problem: Problem, dtype: torch.dtype, backend: str) -> None:
    # Sums of small whole numbers have no rounding, so any term lost, doubled or misplaced shows in full.
    case = problem.build(dtype, numbers="whole", seed=3)
    y, *grads = forward_and_grads(case, backend)
    expected = case.dense(case.x.double(), case.values.double(), None if case.bias is None else case.bias.double())
    assert y.dtype == dtype and torch.equal(y.double(), expected)
    for name, got, want in zip(("input", "values", "bias"), grads, case.dense_grads(), strict=True):
        if got is not None:
            assert got.dtype == dtype and torch.equal(got.double(), want), f"gradient of {name}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", sample_problems(), ids=str)
def test_real_numbers_agree(problem: Problem, dtype: torch.dtype, backend: str) -> None:
    case = problem.build(dtype, seed=5)
    y, *grads = forward_and_grads(case, backend)
    expected = case.dense(case.x.double(), case.values.double(), None if case.bias is None else case.bias.double())
    assert_close(y, expected, "output")
    for name, got, want in zip(("input", "values", "bias"), grads, case.dense_grads(), strict=True):
        if got is not None:
            assert_close(got, want, f"gradient of {name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", [ConvProblem(channels=(11, 21)), LinearProblem(features=(11, 21))], ids=str)
def test_outside_entries_get_zero_gradient_and_are_not_read(problem: Problem, backend: str) -> None:
    case = problem.build(torch.float32)
    outside = ~inside(case.slots, case.weight_shape, case.block)
    assert outside.any()
    y, dx, dvalues, _ = forward_and_grads(case, backend)
    assert torch.equal(dvalues[outside], torch.zeros(int(outside.sum())))
    polluted = problem.build(torch.float32)
    polluted.values[outside] = 1e6
    y2, dx2, *_ = forward_and_grads(polluted, backend)
    assert_close(y2, y.double(), "output")
    assert_close(dx2, dx.double(), "gradient of input")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", [ConvProblem(channels=(9, 12)), LinearProblem()], ids=str)
def test_any_subset_of_arguments_may_need_gradients(problem: Problem, backend: str) -> None:
    case = problem.build(torch.float64)
    everything = dict(zip(("x", "values", "bias"), case.dense_grads(), strict=True))
    for count in (1, 2):
        for names in itertools.combinations(everything, count):
            leaves = {name: getattr(case, name).detach().requires_grad_(name in names) for name in everything}
            y = apply(case, backend, **leaves)
            y.backward(case.grad)
            for name, leaf in leaves.items():
                assert (leaf.grad is not None) == (name in names)
                if leaf.grad is not None:
                    assert_close(leaf.grad, everything[name], f"gradient of {name} of {names}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", [ConvProblem(), LinearProblem()], ids=str)
def test_arguments_are_left_alone(problem: Problem, backend: str) -> None:
    case = problem.build(torch.float32)
    tensors = (case.x, case.values, case.grad, case.topology)
    before = [t.clone() for t in tensors]
    forward_and_grads(case, backend)
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now.nan_to_num(9e9), then.nan_to_num(9e9))


@pytest.mark.parametrize("changed", ["x", "values", "topology"])
@pytest.mark.parametrize("problem", [ConvProblem(), LinearProblem()], ids=str)
def test_backward_refuses_arguments_changed_in_place(problem: Problem, changed: str) -> None:
    # The packed op keeps its arguments, not copies, so a change between forward and backward must not pass unnoticed.
    case = problem.build(torch.float32)
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in ("x", "values")}
    y = apply(case, "cpu", **leaves)
    with torch.no_grad():
        {**leaves, "topology": case.topology}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(case.grad)


@pytest.mark.parametrize("problem", [*sample_conv_problems()[::5], *sample_linear_problems()[::5]], ids=str)
def test_auto_gives_the_bits_of_one_backend(problem: Problem) -> None:
    case = problem.build(torch.float32)
    auto = apply(case, "auto")
    assert any(torch.equal(auto, apply(case, backend)) for backend in BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "size, padding, kernel", [((5, 4), 1, 3), ((1, 1), 1, 3), ((1, 1), 2, 3), ((1, 1), 0, 1), ((1, 6), 0, 1)]
)
@pytest.mark.parametrize("channels", [(6, 10), (1, 10), (6, 1), (1, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
def test_memory_format_of_the_output_is_that_of_torch(
    size: tuple[int, int], padding: int, kernel: int, channels: tuple[int, int], layout: str, backend: str
) -> None:
    problem = ConvProblem(
        size=size, padding=padding, kernel=(kernel, kernel), channels=channels, layout=layout, mask="full"
    )
    case = problem.build(torch.float32)
    # The twin's weight is stored as a new nn.Conv2d's: contiguous.
    expected = case.dense(case.x, case.values, case.bias)
    y = apply(case, backend)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert y.is_contiguous(memory_format=memory_format) == expected.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_format_survives_a_chain_and_its_backward(layout: str, backend: str) -> None:
    case = ConvProblem(channels=(8, 8), layout=layout).build(torch.float32)
    x = case.x.detach().requires_grad_()
    y = apply(case, backend, x=apply(case, backend, x=x).relu())
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert y.is_contiguous(memory_format=wanted)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.is_contiguous(memory_format=wanted)
