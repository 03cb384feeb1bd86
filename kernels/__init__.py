"""Triton kernels of the block-sparse operators on CUDA devices; installed as ``ddst.kernels``.

One function per registered operator, with its arguments. They neither check arguments nor record derivatives:
:mod:`ddst.ops` has the checked, differentiable ones. All of them

* take float32, float16 or bfloat16 (all tensors alike), sum in float32 and round once to that dtype; float32 products
  are TF32 where torch allows it (``torch.backends.cudnn`` for convolutions, ``torch.backends.cuda.matmul`` for linear
  maps), else exact to float32;
* read images in channels_last memory as they are, and make one copy of any other;
* give the same bits at every run on the same device model;
* wait for nothing on the device and can be captured in a CUDA graph, whose replays follow blocks that move between them
  where the number of slots stays (:func:`ddst.index_cache.refresh`).

With TRITON_INTERPRET=1 they run, slowly, on CPU tensors.
"""

if __name__ != "ddst.kernels":  # another project's package of the name "kernels" exists
    raise ImportError(f"these are the kernels of ddst: import ddst.kernels, not {__name__}")

from collections.abc import Sequence

import torch
from torch import Tensor

from . import gather
from .block_scores import conv2d_block_scores, linear_block_scores
from .configs import DTYPES, SIDES, GatherConfig, Problem
from .half_block import norm_act_conv2d, norm_act_conv2d_input_grad, norm_act_conv2d_weight_grad
from .launch import native, native_rows
from .moments import channel_moments
from .weight_grad import conv2d_weight_grad, linear_weight_grad

__all__ = [
    "channel_moments",
    "conv2d",
    "conv2d_block_scores",
    "conv2d_input_grad",
    "conv2d_weight_grad",
    "linear",
    "linear_block_scores",
    "linear_input_grad",
    "linear_weight_grad",
    "norm_act_conv2d",
    "norm_act_conv2d_input_grad",
    "norm_act_conv2d_weight_grad",
    "supports",
]


def supports(dtype: torch.dtype, block: Sequence[int] | None) -> tuple[bool, str]:
    """``(ok, reason)``: whether the kernels compute in a dtype with blocks ``(b_out, b_in)``; None: with any that fits.

    >>> supports(torch.float64, (16, 16))
    (False, 'computes in float32, float16 and bfloat16, got torch.float64')
    """
    if dtype not in DTYPES:
        return False, f"computes in float32, float16 and bfloat16, got {dtype}"
    if block is not None and not all(side in SIDES for side in block):
        return False, f"needs block sides of 16, 32 or 64, got {tuple(block)}"
    return True, "sums in float32 on tensor cores"


def conv2d(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    *,
    relu: bool = False,
    config: GatherConfig | None = None,
) -> Tensor:
    """``y[n, :, i, j] = bias + Σ_{active blocks} W[:, :, kh, kw] · x[n, :, i·stride + kh·dilation - padding, …]``.

    Args:
        input: ``[N, C_in, H, W]``; values: ``[slots, b_out, b_in]``; bias: ``[C_out]`` or None.
        topology, weight_shape: of the packed weight (:mod:`ddst.topology`).
        channels_last: the memory format of the result.
        relu: whether ``max(y, 0)`` is returned.
        config: None for the tuned choice.

    Returns:
        ``[N, C_out, H_out, W_out]``. Where an output block row has no active block: the bias.

    Raises:
        ValueError: sizes beyond what int32 indices count (the tensors themselves may be larger).
    """
    kernel = weight_shape[2:]
    size = [(input.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    problem = _problem(
        "forward", input, values, topology, weight_shape, stride, padding, dilation, input.shape[2:], size
    )
    result = _images(input, (input.shape[0], weight_shape[0], *size), channels_last)
    filled = _native_images(result)
    gather.forward(problem, native(input), native_rows(values), bias, topology, filled, relu, config)
    return result if filled is result else result.copy_(filled)


def conv2d_input_grad(
    grad_output: Tensor,
    values: Tensor,
    topology: Tensor,
    weight_shape: Sequence[int],
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    *,
    config: GatherConfig | None = None,
) -> Tensor:
    """``∂⟨grad_output, conv2d(x, W)⟩ / ∂x``, ``[N, C_in, *input_size]``; arguments as in :func:`conv2d`."""
    problem = _problem(
        "input_grad", grad_output, values, topology, weight_shape, stride, padding, dilation, input_size,
        grad_output.shape[2:],
    )  # fmt: skip
    result = _images(grad_output, (grad_output.shape[0], weight_shape[1], *input_size), channels_last)
    filled = _native_images(result)
    gather.input_grad(problem, native(grad_output), native_rows(values), topology, filled, config)
    return result if filled is result else result.copy_(filled)


def linear(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: Sequence[int],
    *,
    relu: bool = False,
    config: GatherConfig | None = None,
) -> Tensor:
    """``y = x Wᵀ + bias``, ``[B, out]`` from ``[B, in]``: a 1 × 1 convolution of B images of one pixel."""
    problem = _linear_problem("forward", input, values, topology, weight_shape)
    result = input.new_empty(input.shape[0], weight_shape[0])
    gather.forward(problem, native_rows(input), native_rows(values), bias, topology, result, relu, config)
    return result


def linear_input_grad(
    grad_output: Tensor,
    values: Tensor,
    topology: Tensor,
    weight_shape: Sequence[int],
    *,
    config: GatherConfig | None = None,
) -> Tensor:
    """``∂⟨grad_output, linear(x, W)⟩ / ∂x = grad_output W``, ``[B, in]`` from ``[B, out]``."""
    problem = _linear_problem("input_grad", grad_output, values, topology, weight_shape)
    result = grad_output.new_empty(grad_output.shape[0], weight_shape[1])
    gather.input_grad(problem, native_rows(grad_output), native_rows(values), topology, result, config)
    return result


def _problem(
    op: str,
    images: Tensor,
    values: Tensor,
    topology: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input_size: Sequence[int],
    output_size: Sequence[int],
) -> Problem:
    return Problem(
        op, False, images.dtype, tuple(values.shape[1:]), tuple(weight_shape), tuple(stride), tuple(padding),
        tuple(dilation), images.shape[0], tuple(input_size), tuple(output_size), values.shape[0],
    )  # fmt: skip


def _linear_problem(op: str, rows: Tensor, values: Tensor, topology: Tensor, weight_shape: Sequence[int]) -> Problem:
    one = (1, 1)
    return Problem(
        op, True, rows.dtype, tuple(values.shape[1:]), (*weight_shape, 1, 1), one, (0, 0), one, rows.shape[0], one, one,
        values.shape[0],
    )  # fmt: skip


def _images(like: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _native_images(result: Tensor) -> Tensor:
    """The result itself if the kernels can write it, else images to be copied into it."""
    if result.is_contiguous(memory_format=torch.channels_last):
        return result
    return torch.empty_like(result, memory_format=torch.channels_last)
