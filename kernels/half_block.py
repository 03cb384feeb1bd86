"""The fused half of a residual block on CUDA devices: ``pool(conv2d(up(act(norm(x)))) + bias) + up(residual)``.

One function for each registered operator, with its arguments; formulas are said in :mod:`ddst.ops.norm_act_conv2d`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ddst.topology import grid, slot_count

from . import gather_norm, weight_grad_norm
from .configs import GatherConfig, Problem, WeightGradConfig
from .gather_norm import Fusion
from .index import forward_lists, input_grad_lists
from .launch import Launch, native, native_rows
from .moments import merged
from .prologue import Tables, factors, means

_PIXELS, _CHANNELS = 64, 64


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
    *,
    config: GatherConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y, moments of y or [0])`` by one kernel, and a small one that merges the moments of its tiles.

    Args:
        mean, var, gamma, beta: float32, whatever the input's dtype.

    Numerics: the norm in float32, rounded to the input's dtype for the product; the rest as of ``conv2d``. Moments are
    float32, of y as it is rounded.
    """
    norm = Tables.of(input, mean, var, gamma, beta, eps)
    problem = _problem("forward", input, values, topology, weight_shape, stride, padding, dilation, upsample)
    size = [side // pool for side in problem.output_size]
    result = _images(input, (input.shape[0], weight_shape[0], *size), channels_last)
    filled = _native_images(result)
    fusion = Fusion(
        norm.kind, float(negative_slope), upsample, pool, bias is not None,
        0 if residual is None else residual_upsample, moments,
    )  # fmt: skip
    if result.numel() == 0:
        shape = (2, weight_shape[0]) if moments else (0,)
        return result, torch.full(shape, math.nan, dtype=torch.float32, device=input.device)
    lists = forward_lists(topology, weight_shape, problem.block)
    partial, length = gather_norm.forward(
        problem, fusion, native(input), native_rows(values), bias, None if residual is None else native(residual), norm,
        lists, filled, config,
    )  # fmt: skip
    pixels = math.prod(size) * input.shape[0]
    found = merged(partial, length, pixels) if moments else partial.new_empty(0)
    return (result if filled is result else result.copy_(filled)), found


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
    *,
    config: GatherConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_input, grad_gamma, grad_beta)``, the last two ``[0]`` where there is no gamma.

    With stride 1, or without upsampling, one kernel makes the activation's gradient and the norm's sums; with
    statistics of the batch another one, which reads that and the input once more, makes the input's. A stride with
    upsampling takes the input gradient of the upsampled map as it is, and torch's functions behind it.
    """
    norm = Tables.of(input, mean, var, gamma, beta, eps)
    problem = _problem("input_grad", input, values, topology, weight_shape, stride, padding, dilation, upsample)
    x = native(input)
    grad = torch.empty_like(x)
    wants_sums = norm.kind > 0 and (gamma is not None or batch_stats)
    if grad.numel() == 0:
        sums = norm.scale.new_zeros(2, *norm.scale.shape) if norm.kind else norm.scale
    else:
        fusion = Fusion(
            norm.kind, float(negative_slope), upsample, pool, sums=wants_sums,
            scaled=norm.kind == 1 and not batch_stats,
        )  # fmt: skip
        whole = problem.stride == (1, 1) or upsample == 1
        first = fusion if whole else Fusion(0, 1.0, 1, pool)
        target = grad if whole else native(x.new_empty(*x.shape[:2], *problem.input_size))
        lists = input_grad_lists(topology, weight_shape, problem.block, stride, padding, dilation)
        operands = native(grad_output), x, native_rows(values)
        partial, length = gather_norm.input_grad(problem, first, *operands, norm, lists, target, config)
        if whole:
            sums = _sums(partial, length, grad, x, norm) if wants_sums else partial
        else:
            sums = _masked(target, grad, x, norm, fusion)
    scaled = norm.kind == 1 and not batch_stats
    grad_gamma, grad_beta = _norm_gradients(grad, x, norm, sums, var, gamma, eps, batch_stats, scaled)
    return (grad if x is input else torch.empty_like(input).copy_(grad)), grad_gamma, grad_beta


def through_norm(
    grad: Tensor, x: Tensor, norm: Tables, var: Tensor | None, gamma: Tensor | None, eps: float, batch_stats: bool
) -> tuple[Tensor, Tensor]:
    """Turns the gradient of the norm's output, in ``grad``, into that of its input x; ``(grad_gamma, grad_beta)``.

    Both in native memory; for an input gradient whose kernel takes no sums (CUDA C++).
    """
    sums = norm.mean
    if norm.kind:
        sums = _sample_sums(grad, x, norm.mean)
        sums = sums if norm.kind == 2 else sums.sum(1)
    return _norm_gradients(grad, x, norm, sums, var, gamma, eps, batch_stats, False)


def _norm_gradients(
    grad: Tensor,
    x: Tensor,
    norm: Tables,
    sums: Tensor,
    var: Tensor | None,
    gamma: Tensor | None,
    eps: float,
    batch_stats: bool,
    scaled: bool,
) -> tuple[Tensor, Tensor]:
    if not norm.kind or var is None:
        return x.new_empty(0), x.new_empty(0)
    r = torch.rsqrt(var.float() + eps)
    if not scaled and grad.numel():
        _finish(grad, x, norm, sums if batch_stats else torch.zeros_like(sums), gamma, r)
    if gamma is None:
        return x.new_empty(0), x.new_empty(0)
    # Of no pixels r is NaN, and a sum of none is zero.
    return (sums[1] * r if grad.numel() else sums[1]).to(gamma.dtype), sums[0].to(gamma.dtype)


def _sums(partial: Tensor, length: int, grad: Tensor, x: Tensor, norm: Tables) -> Tensor:
    """``[2, C]`` or ``[2, N, C]``: Σ grad_z and Σ grad_z · (x − mean), of the kernel's tiles where these suffice."""
    if norm.kind == 1:
        return partial.sum((0, 1))
    n, c, h, w = x.shape
    if h * w % length == 0 and partial.shape[1] == 1:  # no tile has pixels of two samples
        return partial.view(n, h * w // length, 2, c).sum(1).transpose(0, 1)
    return _sample_sums(grad, x, norm.mean)


def _sample_sums(grad: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    n, c, h, w = x.shape
    sums = torch.empty(2, n, c, dtype=torch.float32, device=x.device)
    sums_launch(n, h * w, c)(grad, x, mean, sums)
    return sums


def _masked(upsampled: Tensor, grad: Tensor, x: Tensor, norm: Tables, fusion: Fusion) -> Tensor:
    """Fills ``grad`` from the gradient of the upsampled map; returns the sums. For strides with upsampling."""
    g = F.avg_pool2d(upsampled.float(), 2, divisor_override=1)
    away, scale = x.float(), 1.0
    z = away
    if norm.kind:
        away = away - norm.mean[:, None, None]
        scale, shift = (t[..., None, None] for t in norm[2:])
        z = away * scale + shift
    g = torch.where(z > 0, g, g * fusion.slope)
    grad.copy_(g * scale if fusion.scaled else g)
    over = (0, 2, 3) if norm.kind == 1 else (2, 3)
    return torch.stack((g.sum(over), (g * away).sum(over)))


def _finish(grad: Tensor, x: Tensor, norm: Tables, sums: Tensor, gamma: Tensor | None, r: Tensor) -> None:
    """Turns grad_z into grad_x: ``γ r grad_z − r (Σ γ S1) / n − (x − mean) r³ (Σ γ S2) / n``, in place."""
    weighted = sums if gamma is None else sums * gamma
    weighted = weighted if weighted.dim() == 2 else weighted.sum(1)
    n, c, h, w = x.shape
    per_pixel = torch.stack((r, r**3)) * weighted / (n * h * w)
    statistics_launch(n, h * w, c, norm.kind)(x, norm.mean, norm.scale, norm.shift, per_pixel, grad)


@triton.jit(do_not_specialize=["pixels", "samples", "C"])
def statistics_kernel(
    x, mean, scale, shift, per_pixel, grad, pixels, samples, C,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """``grad = scale · grad − per_pixel[0] − (x − mean) · per_pixel[1]``; ``pixels`` of each sample."""
    m = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    have = c < C
    n = m // pixels
    live = n < samples
    at = m.to(tl.int64)[:, None] * C + c[None, :]
    ok = live[:, None] & have[None, :]
    away = tl.load(x + at, mask=ok, other=0.0).to(tl.float32) - means(c, have, mean, NORM)
    s, _ = factors(n, c, have, live, C, scale, shift, NORM)
    g = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32) * s
    g = g - tl.load(per_pixel + c, mask=have, other=0.0)[None, :]
    g = g - away * tl.load(per_pixel + C + c, mask=have, other=0.0)[None, :]
    tl.store(grad + at, g.to(grad.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["pixels", "samples", "C"])
def sample_sums_kernel(grad, x, mean, sums, pixels, samples, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Program (n, b): ``sums[0, n] = Σ grad`` and ``sums[1, n] = Σ grad · (x − mean)`` over sample n's pixels."""
    n = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    have = c < C
    away = means(c, have, mean, 2)
    first = tl.zeros((CHANNELS,), dtype=tl.float32)
    second = tl.zeros((CHANNELS,), dtype=tl.float32)
    for m in tl.range(0, pixels, PIXELS):
        p = m + tl.arange(0, PIXELS)
        ok = (p < pixels)[:, None] & have[None, :]
        at = (tl.cast(n, tl.int64) * pixels + p)[:, None] * C + c[None, :]
        g = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
        first += tl.sum(g, axis=0)
        second += tl.sum(g * (tl.load(x + at, mask=ok, other=0.0).to(tl.float32) - away), axis=0)
    at = n * C + c
    tl.store(sums + at, first, mask=have)
    tl.store(sums + samples * C + at, second, mask=have)


def statistics_launch(samples: int, pixels: int, channels: int, norm: int) -> Launch:
    constants = {"PIXELS": _PIXELS, "CHANNELS": _CHANNELS, "NORM": 3 if norm == 2 else norm}
    programs = (-(-samples * pixels // _PIXELS), -(-channels // _CHANNELS))
    return Launch(statistics_kernel, programs, (pixels, samples, channels), constants, 4, 1)


def sums_launch(samples: int, pixels: int, channels: int) -> Launch:
    constants = {"PIXELS": _PIXELS, "CHANNELS": _CHANNELS}
    programs = (samples, -(-channels // _CHANNELS))
    return Launch(sample_sums_kernel, programs, (pixels, samples, channels), constants, 4, 1)


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
    *,
    config: WeightGradConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``(grad_values, grad_bias)``: the first by one kernel and one that adds its parts, the second by torch's sum."""
    norm = Tables.of(input, mean, var, gamma, beta, eps)
    rows, cols, _ = grid(weight_shape, (block[0], block[1]))
    values = input.new_empty(slot_count(topology, rows, cols), *block)
    problem = _problem("weight_grad", input, values, topology, weight_shape, stride, padding, dilation, upsample)
    fusion = Fusion(norm.kind, float(negative_slope), upsample, pool)
    gradient = weight_grad_norm.weight_grad(problem, fusion, native(grad_output), native(input), norm, topology, config)
    return gradient, grad_output.sum((0, 2, 3))


def _problem(
    op: str,
    input: Tensor,
    values: Tensor,
    topology: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    upsample: int,
) -> Problem:
    """The convolution itself: of the upsampled input, before pooling."""
    size = [side * upsample for side in input.shape[2:]]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight_shape[2:], strict=True)]
    out = [(size[i] + 2 * padding[i] - reach[i]) // stride[i] + 1 for i in (0, 1)]
    return Problem(
        op, False, input.dtype, (values.shape[1], values.shape[2]), tuple(weight_shape), tuple(stride), tuple(padding),
        tuple(dilation), input.shape[0], (size[0], size[1]), (out[0], out[1]), values.shape[0],
    )  # fmt: skip


def _images(like: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _native_images(result: Tensor) -> Tensor:
    """The result itself if the kernels can write it, else images to be copied into it."""
    if result.is_contiguous(memory_format=torch.channels_last):
        return result
    return torch.empty_like(result, memory_format=torch.channels_last)
