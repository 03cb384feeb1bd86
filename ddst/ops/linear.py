"""Block-sparse linear map: public functions, fake kernels and derivatives of the four registered operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._arguments import check_operands, check_tensor, check_weight_shape
from ..topology import check_block, slot_count
from . import reference
from .autograd import derived, register_autograd
from .gradient_record import values_gradient
from .precision import in_compute_dtype

_ops = torch.ops.ddst


def linear(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: Sequence[int],
    *,
    backend: str = "auto",
    record: int = 0,
) -> Tensor:
    """``y[…, o] = bias[o] + Σ_{active blocks} Σ_i W[o, i] · x[…, i]``.

    Args:
        input: ``[…, in_features]``, any strides; float32, float64, or a 16-bit float, which is computed in float32 on
            the CPU and returned in its own dtype.
        values: packed weight ``[slots, b_out, b_in]``; topology: its int32 index vector (:mod:`ddst.topology`).
        bias: ``[out_features]`` or None.
        weight_shape: ``(out_features, in_features)``.
        backend: "auto", "cpu", "triton", "cuda" or "reference"; derivatives run on the same.
        record: key of a :class:`~ddst.ops.gradient_record.ScoreRecorder`, or 0.
        record: key of a :class:`~ddst.ops.gradient_record.ScoreRecorder`, or 0.

    Returns:
        ``[…, out_features]``.

    Raises:
        ValueError, TypeError, RuntimeError: an argument does not fit; the message names it.
        RuntimeError: no memory for the output or a workspace, in torch's words, with its bytes.

    Numerics: accumulates in the compute dtype; the same bits for the same number of threads. Differentiable any number
    of times.

    Cost: ``2 · nnz · b_out · b_in`` operations per row of the input, so proportional to density.

    >>> from ddst.topology import build_topology, pack
    >>> mask = torch.tensor([[True, False]])
    >>> weight = torch.ones(16, 32)
    >>> linear(torch.ones(2, 32), pack(weight, mask, (16, 16)), None, build_topology(mask), weight.shape)[0, 0].item()
    16.0
    """
    check_operands(input, values, bias, topology)
    if len(check_weight_shape("weight_shape", weight_shape)) != 2:
        raise ValueError(f"weight_shape must be (out_features, in_features), got {tuple(weight_shape)}")
    if input.dim() == 0 or input.shape[-1] != weight_shape[1]:
        raise ValueError(f"input must have {weight_shape[1]} features, got the shape {tuple(input.shape)}")
    dtype, (x, values, bias) = in_compute_dtype(input, values, bias)
    # Sizes are read off tensors only where there is need: tracers take what is read for a constant.
    matrix = x if x.dim() == 2 else x.reshape(-1, weight_shape[1])
    # On meta nothing is computed but shapes.
    chosen = backend if x.is_meta else backends.choose(backend, backends.Problem.of(x, values, linear=True))
    if chosen == "reference":
        y = reference.linear(matrix, values, bias, topology, list(weight_shape), record)
    else:
        y = _call_linear(matrix, values, bias, topology, list(weight_shape), backends.code(backend), record)
    if x.dim() != 2:
        y = y.view(*input.shape[:-1], weight_shape[0])
    return y if y.dtype == dtype else y.to(dtype)


def linear_transposed(
    input: Tensor,
    values: Tensor,
    topology: Tensor,
    weight_shape: Sequence[int],
    *,
    backend: str = "auto",
    record: int = 0,
) -> Tensor:
    """``y = x W``, the product with the transposed weight of :func:`linear`.

    Shapes: ``[…, out_features]`` to ``[…, in_features]``.

    Arguments, errors, numerics and cost are those of :func:`linear`.

    >>> from ddst.topology import build_topology, pack
    >>> mask = torch.tensor([[True, False]])
    >>> values = pack(torch.ones(16, 32), mask, (16, 16))
    >>> linear_transposed(torch.ones(2, 16), values, build_topology(mask), (16, 32)).sum(1).tolist()
    [256.0, 256.0]
    """
    check_operands(input, values, None, topology)
    if len(check_weight_shape("weight_shape", weight_shape)) != 2:
        raise ValueError(f"weight_shape must be (out_features, in_features), got {tuple(weight_shape)}")
    if input.dim() == 0 or input.shape[-1] != weight_shape[0]:
        raise ValueError(f"input must have {weight_shape[0]} features, got the shape {tuple(input.shape)}")
    dtype, (x, values, _) = in_compute_dtype(input, values, None)
    matrix = x if x.dim() == 2 else x.reshape(-1, weight_shape[0])
    chosen = backend if x.is_meta else backends.choose(backend, backends.Problem.of(x, values, linear=True))
    if chosen == "reference":
        y = matrix @ reference.dense_weight(values, topology, weight_shape, record)
    else:
        y = _ops.linear_input_grad(matrix, values, topology, list(weight_shape), backends.code(backend), record)
    if x.dim() != 2:
        y = y.view(*input.shape[:-1], weight_shape[1])
    return y.to(dtype)


def linear_block_scores(
    grad_output: Tensor,
    input: Tensor,
    weight_shape: Sequence[int],
    block: tuple[int, int] | int,
    *,
    backend: str = "auto",
) -> Tensor:
    """``scores[r, c] = ‖∂L/∂W[block r, c]‖₂`` of the dense weight gradient, active or not.

    Args:
        grad_output: ``[B, out_features]``; input: ``[B, in_features]``; float32 or float64.
        weight_shape: ``(out_features, in_features)``; block: ``(b_out, b_in)``.

    Returns:
        ``[R, C]`` in the dtype of the input. Not differentiable.

    Cost: the dense weight gradient's operations; it is formed a few blocks at a time and never stored whole.

    >>> linear_block_scores(torch.ones(1, 2), torch.ones(1, 4), (2, 4), (2, 2)).tolist()
    [[2.0, 2.0]]
    """
    check_tensor("grad_output", grad_output, 2)
    check_tensor("input", input, 2)
    if len(check_weight_shape("weight_shape", weight_shape)) != 2:
        raise ValueError(f"weight_shape must be (out_features, in_features), got {tuple(weight_shape)}")
    block = check_block(block)
    grad_output, input = grad_output.detach(), input.detach()
    problem = backends.Problem(input.device.type, input.dtype, block, linear=True)
    if backends.choose(backend, problem) == "reference":
        return reference.linear_block_scores(grad_output, input, list(weight_shape), list(block))
    return _ops.linear_block_scores(grad_output, input, list(weight_shape), list(block))


@torch.library.register_fake("ddst::linear")
def _linear_fake(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: list[int],
    backend: int = 0,
    record: int = 0,
) -> Tensor:
    return input.new_empty([input.shape[0], weight_shape[0]])


@torch.library.register_fake("ddst::linear_input_grad")
def _linear_input_grad_fake(
    grad_output: Tensor, values: Tensor, topology: Tensor, weight_shape: list[int], backend: int = 0, record: int = 0
) -> Tensor:
    return grad_output.new_empty([grad_output.shape[0], weight_shape[1]])


@torch.library.register_fake("ddst::linear_weight_grad")
def _linear_weight_grad_fake(
    grad_output: Tensor,
    input: Tensor,
    topology: Tensor,
    weight_shape: list[int],
    block: list[int],
    backend: int = 0,
) -> Tensor:
    rows, cols = -(-weight_shape[0] // block[0]), -(-weight_shape[1] // block[1])
    return input.new_empty([slot_count(topology, rows, cols), *block])


@torch.library.register_fake("ddst::linear_block_scores")
def _linear_block_scores_fake(grad_output: Tensor, input: Tensor, weight_shape: list[int], block: list[int]) -> Tensor:
    return input.new_empty([-(-weight_shape[0] // block[0]), -(-weight_shape[1] // block[1])])


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, topology, ctx.weight_shape, ctx.backend, ctx.record = inputs
    ctx.save_for_backward(x, values, topology)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, topology = ctx.saved_tensors
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = derived(
            _ops.linear_input_grad.default, grad, values, topology, ctx.weight_shape, ctx.backend, ctx.record
        )
    block = [values.shape[1], values.shape[2]]
    grad_values = values_gradient(
        ctx, grad, x,
        lambda: derived(_ops.linear_weight_grad.default, grad, x, topology, ctx.weight_shape, block, ctx.backend),
    )  # fmt: skip
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum(0)
    return grad_input, grad_values, grad_bias, *[None] * 4


def _linear_input_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, values, topology, ctx.weight_shape, ctx.backend, ctx.record = inputs
    ctx.save_for_backward(grad, values, topology)


def _linear_input_grad_backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
    grad, values, topology = ctx.saved_tensors
    grad_grad_output = None
    if ctx.needs_input_grad[0]:
        grad_grad_output = derived(
            _ops.linear.default, grad_grad, values, None, topology, ctx.weight_shape, ctx.backend, ctx.record
        )
    block = [values.shape[1], values.shape[2]]
    grad_values = values_gradient(
        ctx, grad, grad_grad,
        lambda: derived(
            _ops.linear_weight_grad.default, grad, grad_grad, topology, ctx.weight_shape, block, ctx.backend
        ),
    )  # fmt: skip
    return grad_grad_output, grad_values, *[None] * 5


def _linear_weight_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, topology, ctx.weight_shape, _, ctx.backend = inputs
    ctx.save_for_backward(grad, x, topology)


def _linear_weight_grad_backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, topology = ctx.saved_tensors
    grad_grad_output = grad_input = None
    if ctx.needs_input_grad[0]:
        grad_grad_output = derived(_ops.linear.default, x, grad_values, None, topology, ctx.weight_shape, ctx.backend)
    if ctx.needs_input_grad[1]:
        grad_input = derived(_ops.linear_input_grad.default, grad, grad_values, topology, ctx.weight_shape, ctx.backend)
    return grad_grad_output, grad_input, None, None, None, None


_call_linear = register_autograd("linear", _linear_backward, _linear_setup, linear_in=(0, 1), bias=2)
register_autograd("linear_input_grad", _linear_input_grad_backward, _linear_input_grad_setup, linear_in=(0, 1))
register_autograd("linear_weight_grad", _linear_weight_grad_backward, _linear_weight_grad_setup, linear_in=(0, 1))
