"""Forward-mode derivatives of the public functions and of layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import ddst
from ddst.nn import SparseLayer
from helpers.problems import ConvProblem, LinearProblem
from helpers.sparse import Problem, apply

PROBLEMS: list[Problem] = [
    LinearProblem((3,), (7, 5), (4, 2), "0.6"),
    LinearProblem((2, 2), (4, 6), (2, 4), "0.4", bias=False),
    ConvProblem(2, (5, 6), (3, 2), (5, 4), (2, 4), stride=2, padding=1, mask="0.5"),
    ConvProblem(1, (4, 4), (3, 3), (4, 4), (4, 4), padding="same", mask="0.4", bias=False),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_gradcheck_in_forward_mode(problem: Problem) -> None:
    case = problem.build(torch.float64, seed=3)
    given = [t.detach().clone().requires_grad_() for t in (case.x, case.values, case.bias) if t is not None]

    def function(x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        return apply(case, "cpu", x, values, bias)

    assert torch.autograd.gradcheck(
        function, given, check_forward_ad=True, check_batched_grad=False, check_undefined_grad=False
    )


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("which", range(3), ids=["x", "values", "bias"])
def test_a_single_tangent_is_that_of_the_dense_function(problem: Problem, which: int) -> None:
    case = problem.build(torch.float64, seed=4)
    operands = [case.x, case.values, case.bias]
    if operands[which] is None:
        pytest.skip("no bias")
    tangent = torch.randn_like(operands[which])

    def along(function: Callable[..., Tensor]) -> Tensor:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, tangent) if i == which else t for i, t in enumerate(operands)]
            return forward_ad.unpack_dual(function(*duals)).tangent.clone()

    got = along(lambda x, values, bias: apply(case, "cpu", x, values, bias))
    torch.testing.assert_close(got, along(case.dense))


LAYERS = pytest.mark.parametrize(
    "layer, shape",
    [
        (ddst.SparseLinear(8, 12, density=0.5, block=4), (2, 8)),
        (ddst.SparseConv2d(4, 8, 3, padding=1, density=0.5, block=4), (1, 4, 3, 3)),
    ],
    ids=["linear", "conv"],
)


def derivative(function: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent.clone()


@LAYERS
def test_forward_mode_of_layers_and_over_their_gradients(layer: SparseLayer, shape: tuple[int, ...]) -> None:
    layer = layer.double()
    twin = layer.to_dense()
    x, tangent = (torch.randn(shape, dtype=torch.float64) for _ in range(2))

    def of(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: x.sum() + layer(x).sin()

    def gradient_of(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """Its derivative along a tangent is a product with the Hessian."""
        return lambda x: torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)[0]

    torch.testing.assert_close(derivative(of(layer), x, tangent), derivative(of(twin), x, tangent))
    x.requires_grad_()
    torch.testing.assert_close(derivative(gradient_of(layer), x, tangent), derivative(gradient_of(twin), x, tangent))


def test_outside_of_a_level_inference_tensors_are_computed_with() -> None:
    layer = ddst.SparseLinear(8, 8, density=0.5, block=4)
    with torch.inference_mode():
        x = torch.randn(2, 8)
    with torch.no_grad():
        assert torch.equal(layer(x[None, 0]), layer(x.clone()[None, 0]))
