"""gradcheck, gradgradcheck, and a WGAN-GP penalty through a sparse discriminator against its dense masked twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from helpers.dense import pack_blocks, unpack_blocks
from helpers.problems import Case, ConvProblem, LinearProblem, few, sample_problems
from helpers.sparse import BACKENDS, Problem, apply
from helpers.tolerances import assert_close

SMALL = ConvProblem(batch=2, channels=(3, 5), kernel=(2, 3), size=(3, 4), block=(2, 2), mask="0.5", padding=(1, 1))


def _function_and_leaves(case: Case, backend: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    leaves = tuple(t.detach().clone().requires_grad_() for t in (case.x, case.values, case.bias) if t is not None)

    def function(*tensors: Tensor) -> Tensor:
        return apply(case, backend, tensors[0], tensors[1], tensors[2] if case.bias is not None else None)

    return function, leaves


EXACT: list[Problem] = [
    SMALL,
    replace(SMALL, stride=(2, 1), dilation=(1, 2), padding=(0, 2), size=(4, 3), bias=False, block=(3, 5)),
    LinearProblem(batch=(3,), features=(5, 7), block=(2, 3), mask="0.6"),
]
# The generator's problems in "fast mode": one random direction instead of every entry.
FAST = [p for p in few([*sample_problems()], 30) if p.build().x.numel() and p.build().values.numel()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", EXACT, ids=str)
def test_gradcheck_every_entry(problem: Problem, backend: str) -> None:
    function, leaves = _function_and_leaves(problem.build(), backend)
    assert gradcheck(function, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", EXACT, ids=str)
def test_gradgradcheck_every_entry(problem: Problem, backend: str) -> None:
    function, leaves = _function_and_leaves(problem.build(), backend)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("problem", FAST, ids=str)
def test_gradcheck_and_gradgradcheck_in_a_random_direction(problem: Problem) -> None:
    function, leaves = _function_and_leaves(problem.build(), "cpu")
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", EXACT, ids=str)
def test_second_derivatives_in_float32(problem: Problem, backend: str) -> None:
    case = problem.build(torch.float32)

    def second(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (case.x, case.values)]
        # A cubed output makes every second derivative depend on every argument.
        y = function(*leaves).pow(3).sum()
        first = torch.autograd.grad(y, leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    got = second(lambda x, v: apply(case, backend, x, v, None), torch.float32)
    want = second(lambda x, v: case.dense(x, v, None), torch.float64)
    for name, g, w in zip(("input", "values"), got, want, strict=True):
        error = (g.double() - w).norm() / w.norm()
        assert error < 1e-5, f"{name}: {error}"


def test_third_derivative_of_an_output_that_is_cubed() -> None:
    case = replace(SMALL, batch=1).build()

    def third(function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        x, v = (t.detach().clone().requires_grad_() for t in (case.x, case.values))
        out = function(x, v).pow(3).sum()
        for _ in range(2):
            (out,) = torch.autograd.grad(out, x, create_graph=True)
            out = out.square().sum()
        return torch.autograd.grad(out, v)[0]

    got = third(lambda x, v: apply(case, "cpu", x, v, None))
    want = third(lambda x, v: case.dense(x, v, None))
    assert_close(got / want.norm(), want / want.norm(), "third derivative", dtype=torch.float32)


def _discriminators(backend: str) -> tuple[list[Tensor], Callable[[Tensor], Tensor], list[Any], Callable[..., Tensor]]:
    """A strided conv, a padded conv and a linear layer, packed; and the same with dense weights."""
    layers: list[tuple[Problem, Case]] = []
    sizes = [(8, 8), (4, 4)]
    conv_a = ConvProblem(channels=(3, 20), stride=2, size=sizes[0], block=(8, 2), mask="0.6")
    conv_b = ConvProblem(channels=(20, 12), size=sizes[1], block=(4, 8), mask="0.3")
    for problem in (conv_a, conv_b, LinearProblem(features=(12, 1), block=(1, 4), mask="full")):
        layers.append((problem, problem.build(torch.float64, seed=len(layers))))
    cases = [case for _, case in layers]
    packed = [t.clone().requires_grad_() for case in cases for t in (case.values * 0.3, case.bias)]
    dense = [t.detach().clone() for t in packed]
    for i, case in enumerate(cases):
        dense[2 * i] = unpack_blocks(dense[2 * i], case.slots, case.weight_shape)
    dense = [t.requires_grad_() for t in dense]

    def sparse(x: Tensor) -> Tensor:
        x = F.leaky_relu(apply(cases[0], backend, x, packed[0], packed[1]), 0.2)
        x = F.softplus(apply(cases[1], backend, x, packed[2], packed[3]))
        return apply(cases[2], backend, x.mean((2, 3)), packed[4], packed[5])

    def twin(x: Tensor) -> Tensor:
        # The mask is multiplied in, so that the twin's inactive weights get no gradient either.
        w = [dense[2 * i] * (dense[2 * i] != 0) for i in range(3)]
        x = F.leaky_relu(F.conv2d(x, w[0], dense[1], stride=2, padding=1), 0.2)
        x = F.softplus(F.conv2d(x, w[1], dense[3], padding=1))
        return F.linear(x.mean((2, 3)), w[2], dense[5])

    def repack(gradients: list[Tensor]) -> list[Tensor]:
        return [
            pack_blocks(g, cases[i // 2].slots, cases[i // 2].block) if i % 2 == 0 else g
            for i, g in enumerate(gradients)
        ]

    return packed, sparse, [dense, repack], twin


def _penalised_loss(critic: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(11)
    real, fake = (torch.randn(4, 3, 8, 8, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    share = torch.rand(4, 1, 1, 1, generator=g, dtype=torch.float64).to(dtype)
    mixed = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    # Not the difference of means, in which the last bias cancels.
    return F.softplus(critic(fake)).mean() + F.softplus(-critic(real)).mean() + 10 * penalty


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["backward", "grad"])
def test_gradient_penalty_equals_that_of_the_dense_masked_twin(backend: str, how: str) -> None:
    packed, sparse, (dense, repack), twin = _discriminators(backend)
    got_loss, want_loss = _penalised_loss(sparse, torch.float64), _penalised_loss(twin, torch.float64)
    assert_close(got_loss, want_loss, "loss")
    if how == "backward":
        got_loss.backward()
        want_loss.backward()
        got, want = [p.grad for p in packed], [p.grad for p in dense]
    else:
        got, want = list(torch.autograd.grad(got_loss, packed)), list(torch.autograd.grad(want_loss, dense))
    for i, (g, w) in enumerate(zip(got, repack(want), strict=True)):
        assert g is not None
        error = (g - w).norm() / w.norm()
        assert error < 1e-12, f"parameter {i}: {error}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", [SMALL, EXACT[2]], ids=str)
def test_gradients_of_values_that_are_no_leaf(problem: Problem, backend: str) -> None:
    # As under spectral norm: the op sees values / sigma. Asked for at the leaf, and at the quotient itself.
    case = problem.build()
    want = case.dense_grads()[1]
    leaf = (case.values * 2).requires_grad_()
    quotient = leaf / 2
    y = apply(case, backend, values=quotient)
    (at_quotient,) = torch.autograd.grad(y, quotient, case.grad, retain_graph=True)
    assert_close(at_quotient, want, "gradient at the quotient")
    y.backward(case.grad)
    assert_close(leaf.grad, want / 2, "gradient at the leaf")


def test_block_scores_refuse_to_be_differentiated_silently() -> None:
    # Scores are a measurement: they carry no graph, so nothing can be trained through them by mistake.
    from ddst.ops import conv2d_block_scores

    case = SMALL.build()
    x = case.x.detach().requires_grad_()
    args = (case.weight_shape, case.block, (1, 1), (1, 1), (1, 1))
    assert not conv2d_block_scores(case.grad, x, *args).requires_grad
