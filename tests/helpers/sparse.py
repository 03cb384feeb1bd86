"""Calls the library on a problem's tensors: the public functions, and the registered ops with explicit arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddst.ops import conv2d, linear
from helpers.problems import Case, ConvProblem, LinearProblem

BACKENDS = ["cpu", "reference"]
Problem = ConvProblem | LinearProblem
_UNSET: Any = object()


def apply(case: Case, backend: str = "auto", x: Tensor = _UNSET, values: Tensor = _UNSET, bias: Any = _UNSET) -> Tensor:
    """The public sparse function on a case, with some tensors replaced."""
    x = case.x if x is _UNSET else x
    values = case.values if values is _UNSET else values
    bias = case.bias if bias is _UNSET else bias
    if len(case.weight_shape) == 4:
        return conv2d(x, values, bias, case.topology, case.weight_shape, backend=backend, **case.kwargs)
    return linear(x, values, bias, case.topology, case.weight_shape, backend=backend)


def forward_and_grads(case: Case, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Output, and the gradients of input, values and bias for the case's output gradient."""
    leaves = [t.detach().requires_grad_() for t in (case.x, case.values, case.bias) if t is not None]
    y = apply(case, backend, leaves[0], leaves[1], leaves[2] if case.bias is not None else None)
    grads = torch.autograd.grad(y, leaves, case.grad)
    return y.detach(), grads[0], grads[1], grads[2] if case.bias is not None else None


def op_arguments(problem: Problem, case: Case, channels_last: bool = False) -> dict[str, tuple[Any, ...]] | None:
    """Arguments of the four registered ops by name, or None where the ops cannot express the problem.

    The ops take 4-D (linear: 2-D) tensors and explicit symmetric padding; the public functions do the rest.
    """
    x, grad, shape, block = case.x, case.grad, list(case.weight_shape), list(case.block)
    values, bias, topology = case.values, case.bias, case.topology
    if isinstance(problem, LinearProblem):
        if x.dim() != 2:
            return None
        return {
            "linear": (x, values, bias, topology, shape),
            "linear_input_grad": (grad, values, topology, shape),
            "linear_weight_grad": (grad, x, topology, shape, block),
            "linear_block_scores": (grad, x, shape, block),
        }
    explicit = problem.explicit()
    if explicit is None or x.dim() != 4:
        return None
    size = list(x.shape[2:])
    return {
        "conv2d": (x, values, bias, topology, shape, *explicit, channels_last),
        "conv2d_input_grad": (grad, values, topology, shape, size, *explicit, channels_last),
        "conv2d_weight_grad": (grad, x, topology, shape, block, *explicit),
        "conv2d_block_scores": (grad, x, shape, block, *explicit),
    }


def call(name: str, arguments: tuple[Any, ...]) -> Tensor:
    """One registered op."""
    return getattr(torch.ops.ddst, name)(*arguments)
