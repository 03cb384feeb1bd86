"""The fused half block by CUDA C++ (``csrc/cuda/gather_fused.cuh``, ``weight_grad.cuh``): the calls.

Norm, activation and upsampling happen where pixels are staged, pooling, bias, residual and the activation's derivative
where sums are stored. Moments, and the norm's own gradient from its two sums, are passes of their own, by the Triton
kernels of :mod:`ddst.kernels.half_block`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .gather import Fused, Window, _check_dilation, _dense_channels_last, _gather
from .weight_grad import conv2d_weight_grad


def _tables(
    like: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Any, tuple[Tensor, Tensor, Tensor] | None]:
    norm = importlib.import_module("ddst.kernels.prologue").Tables.of(like, mean, var, gamma, beta, eps)
    return norm, tuple(norm[1:]) if norm.kind else None


def _window(
    input: Tensor, upsample: int, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Window, tuple[int, int]]:
    """The convolution's own, and the size of its output."""
    size = (input.shape[2] * upsample, input.shape[3] * upsample)
    out = [(size[i] + 2 * padding[i] - weight_shape[2 + i]) // stride[i] + 1 for i in (0, 1)]
    return Window(size, (stride[0], stride[1]), (padding[0], padding[1])), (out[0], out[1])


def norm_act_conv2d(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    topology: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    eps: float,
    negative_slope: float,
    upsample: int,
    pool: int,
    residual_upsample: int,
    moments: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """``(y, moments of y or [0])``; as :func:`ddst.kernels.norm_act_conv2d`."""
    _check_dilation(dilation)
    window, out = _window(input, upsample, weight_shape, stride, padding)
    _, norm = _tables(input, mean, var, gamma, beta, eps)
    y = _gather(
        input, values, bias, residual, topology, weight_shape, window, out, channels_last, input_gradient=False,
        relu=False, linear=False, fused=Fused(norm, None, negative_slope, upsample, pool, residual_upsample),
    )  # fmt: skip
    if not moments:
        return y, torch.empty(0, dtype=torch.float32, device=y.device)
    return y, importlib.import_module("ddst.kernels").channel_moments(y)


def norm_act_conv2d_input_grad(
    grad_output: Tensor,
    input: Tensor,
    values: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    topology: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    eps: float,
    negative_slope: float,
    upsample: int,
    pool: int,
    batch_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_input, grad_gamma, grad_beta)``; as :func:`ddst.kernels.norm_act_conv2d_input_grad`.

    Raises:
        ValueError: a stride with upsampling.
    """
    _check_dilation(dilation)
    if upsample == 2 and tuple(stride) != (1, 1):
        raise ValueError(
            f"ddst::norm_act_conv2d_input_grad: backend cuda: needs stride 1 with upsample=2, got {tuple(stride)}: use "
            "backend 'triton'"
        )
    window, _ = _window(input, upsample, weight_shape, stride, padding)
    norm, tables = _tables(input, mean, var, gamma, beta, eps)
    x = _dense_channels_last(input)
    fused = Fused(tables, x if norm.kind or negative_slope != 1 else None, negative_slope, upsample, pool)
    grad = _gather(
        grad_output, values, None, None, topology, weight_shape, window, window.input_size, True, input_gradient=True,
        relu=False, linear=False, fused=fused,
    )  # fmt: skip
    through_norm = importlib.import_module("ddst.kernels.half_block").through_norm
    grad_gamma, grad_beta = through_norm(grad, x, norm, var, gamma, eps, batch_stats)
    return torch.empty_like(input).copy_(grad) if input.stride() != grad.stride() else grad, grad_gamma, grad_beta


def norm_act_conv2d_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    topology: Tensor,
    weight_shape: Sequence[int],
    block: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    eps: float,
    negative_slope: float,
    upsample: int,
    pool: int,
) -> tuple[Tensor, Tensor]:
    """``(grad_values, grad_bias)``; as :func:`ddst.kernels.norm_act_conv2d_weight_grad`."""
    _, norm = _tables(input, mean, var, gamma, beta, eps)
    fused = Fused(norm, None, negative_slope, upsample, pool)
    arguments = (grad_output, input, topology, weight_shape, block, stride, padding, dilation)
    return conv2d_weight_grad(*arguments, fused=fused), grad_output.sum((0, 2, 3))
