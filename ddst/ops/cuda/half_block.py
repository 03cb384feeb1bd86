"""The operators of the fused half block on CUDA devices: argument checks, then the kernels, as in :mod:`.dispatch`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .dispatch import (
    AUTO,
    Meta,
    Shape,
    _check_alike,
    _check_conv2d,
    _check_conv2d_window,
    _check_shape,
    _fail,
    _index,
    _kernels,
    _meta,
    _serves,
)

Window = tuple[Shape, Shape, Shape]


@lru_cache(maxsize=4096)
def _check_sizes(
    op: str,
    weight_shape: Shape,
    window: Window,
    upsample: int,
    pool: int,
    residual_upsample: int,
    input: Meta,
    grad_output: Meta | None = None,
    residual: Meta | None = None,
) -> None:
    """Of what is read at half the coordinates, or summed by four."""
    factors = {"upsample": upsample, "pool": pool, "residual_upsample": residual_upsample}
    for name, factor in factors.items():
        if factor not in (1, 2):
            _fail(op, f"{name} is {factor}, expected 1 or 2")
    _check_shape(op, "input", input, (None, weight_shape[1], None, None), f"[N, {weight_shape[1]}, H, W]")
    size = (input.shape[2] * upsample, input.shape[3] * upsample)
    n, (height, width) = (
        input.shape[0],
        (side // pool for side in _check_conv2d_window(op, weight_shape, size, *window)),
    )
    if min(height, width) < 1:
        _fail(op, f"the output of {height * pool} x {width * pool} pixels has none left after pooling by {pool}")
    _check_alike(op, {"input": input, "grad_output": grad_output, "residual": residual})
    if grad_output is not None:
        shape = (n, weight_shape[0], height, width)
        _check_shape(op, "grad_output", grad_output, shape, str(list(shape)))
    if residual is not None:
        if height % residual_upsample or width % residual_upsample:
            _fail(op, f"residual cannot be upsampled by {residual_upsample} to {height} x {width} pixels")
        shape = (n, weight_shape[0], height // residual_upsample, width // residual_upsample)
        _check_shape(op, "residual", residual, shape, str(list(shape)))


@lru_cache(maxsize=4096)
def _check_norm(
    op: str, input: Meta, mean: Meta | None, var: Meta | None, gamma: Meta | None, beta: Meta | None
) -> None:
    n, c = input.shape[:2]
    if (mean is None) != (var is None) or (gamma is None) != (beta is None) or (mean is None and gamma is not None):
        _fail(op, "mean and var, gamma and beta must both be there or both be None, and gamma only beside mean")
    for name, meta in {"mean": mean, "var": var, "gamma": gamma, "beta": beta}.items():
        if meta is None:
            continue
        if meta.dtype != torch.float32 or meta.device != input.device:
            _fail(op, f"{name} is {meta.dtype} on {meta.device}, expected torch.float32 on {input.device}")
        shapes = ((c,),) if name in ("mean", "var") else ((c,), (n, c))
        if meta.shape not in shapes:
            _fail(op, f"{name} has the shape {list(meta.shape)}, expected {' or '.join(str(list(s)) for s in shapes)}")
    if gamma is not None and beta is not None and gamma.shape != beta.shape:
        _fail(op, f"gamma and beta have the shapes {list(gamma.shape)} and {list(beta.shape)}, expected one shape")


def _check(
    op: str,
    backend: int,
    weight_shape: Sequence[int],
    block: Sequence[int],
    window: Window,
    factors: tuple[int, int, int],
    norm: Sequence[Tensor | None],
    topology: Tensor,
    input: Tensor,
    *,
    grad_output: Tensor | None = None,
    residual: Tensor | None = None,
    values: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    meta, shape = _meta(input), tuple(weight_shape)
    others = (None if t is None else _meta(t) for t in (grad_output, residual))
    _check_sizes(op, shape, window, *factors, meta, *others)
    _check_norm(op, meta, *(None if t is None else _meta(t) for t in norm))
    upsampled = meta._replace(shape=(*meta.shape[:2], *(side * factors[0] for side in meta.shape[2:])))
    _check_conv2d(
        op, backend, shape, tuple(block), window, input=upsampled, values=None if values is None else _meta(values),
        bias=None if bias is None else _meta(bias), topology=_index(op, topology),
    )  # fmt: skip


@_serves("channel_moments")
def channel_moments(input: Tensor) -> Tensor:
    """``ddst::channel_moments`` on a CUDA device; float64, which the Triton kernels lack, by torch."""
    if input.dim() != 4 or not input.is_floating_point():
        _fail(
            "channel_moments", f"input is {input.dtype} of the shape {list(input.shape)}, expected floats [N, C, H, W]"
        )
    if input.dtype == torch.float64:
        var, mean = torch.var_mean(input, (0, 2, 3), correction=0)
        return torch.stack((mean, var))
    return importlib.import_module("ddst.kernels").channel_moments(input)


@_serves("norm_act_conv2d")
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
    batch_stats: bool,
    moments: bool,
    channels_last: bool,
    backend: int = AUTO,
    record: int = 0,
) -> tuple[Tensor, Tensor]:
    """``ddst::norm_act_conv2d`` on a CUDA device."""
    op, norm, window = "norm_act_conv2d", (mean, var, gamma, beta), (tuple(stride), tuple(padding), tuple(dilation))
    _check(
        op, backend, weight_shape, values.shape[1:], window, (upsample, pool, residual_upsample), norm, topology, input,
        residual=residual, values=values, bias=bias,
    )  # fmt: skip
    kernels = _kernels(op, backend, input, weight_shape, values.shape[1:], topology, window)
    return kernels.norm_act_conv2d(
        input, values, bias, residual, *norm, topology, weight_shape, *window, eps, negative_slope, upsample, pool,
        residual_upsample, moments, channels_last,
    )  # fmt: skip


@_serves("norm_act_conv2d_input_grad")
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
    channels_last: bool,
    backend: int = AUTO,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ddst::norm_act_conv2d_input_grad`` on a CUDA device; the gradient has the input's memory format."""
    op, norm = "norm_act_conv2d_input_grad", (mean, var, gamma, beta)
    window = (tuple(stride), tuple(padding), tuple(dilation))
    _check(
        op, backend, weight_shape, values.shape[1:], window, (upsample, pool, 1), norm, topology, input,
        grad_output=grad_output, values=values,
    )  # fmt: skip
    kernels = _kernels(op, backend, grad_output, weight_shape, values.shape[1:], topology, window)
    return kernels.norm_act_conv2d_input_grad(
        grad_output, input, values, *norm, topology, weight_shape, *window, eps, negative_slope, upsample, pool,
        batch_stats,
    )  # fmt: skip


@_serves("norm_act_conv2d_weight_grad")
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
    backend: int = AUTO,
) -> tuple[Tensor, Tensor]:
    """``ddst::norm_act_conv2d_weight_grad`` on a CUDA device."""
    op, norm = "norm_act_conv2d_weight_grad", (mean, var, gamma, beta)
    window = (tuple(stride), tuple(padding), tuple(dilation))
    _check(
        op, backend, weight_shape, block, window, (upsample, pool, 1), norm, topology, input, grad_output=grad_output
    )
    kernels = _kernels(op, backend, input, weight_shape, block, topology, window)
    return kernels.norm_act_conv2d_weight_grad(
        grad_output, input, *norm, topology, weight_shape, block, *window, eps, negative_slope, upsample, pool
    )
