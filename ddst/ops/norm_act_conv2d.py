"""The fused half of a residual block: norm, activation, upsampling, block-sparse convolution, pooling, residual sum.

One saved tensor, the norm's input: what stands between it and the convolution is made anew while the passes read it.
Backward consists of two further operators; where it is differentiated again, the formula of :func:`composed` is
differentiated instead, whose parts are all differentiable any number of times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .._arguments import check_bool, check_int, check_number, check_operands, check_tensor, check_type
from ..topology import slot_count
from .autograd import exported, formulas, has_tangent, nothing_listens
from .conv2d import Geometry, conv2d, output_is_channels_last
from .gradient_record import gradient_is_wanted, recorder_of, values_gradient
from .precision import compute_dtype, in_compute_dtype

_ops = torch.ops.ddst
_library = torch.library.Library("ddst", "IMPL")


class Norm(NamedTuple):
    """``z = (x − mean) / √(var + eps) · gamma + beta``, per channel; gamma and beta also per sample and channel.

    Attributes:
        mean, var: ``[C]``, of this batch or running averages. Constants: no gradient goes to them.
        gamma, beta: ``[C]``, ``[N, C]`` or None, which is 1 and 0; of one shape.
        eps: added to the variance.
        batch_stats: whether mean and var are those of the input itself; then its gradient is that of batch norm in
            training.
    """

    mean: Tensor
    var: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None
    eps: float = 1e-5
    batch_stats: bool = False


def channel_moments(input: Tensor) -> Tensor:
    """``[mean_c, 1/n Σ (x − mean_c)²]`` of every channel, over samples and pixels.

    Args:
        input: ``[N, C, H, W]``, float32 or float64, or a 16-bit float, computed in float32.

    Returns:
        ``[2, C]``, float32 where the input is of 16 bits. Not differentiable: :func:`norm_act_conv2d` knows what its
        statistics are of.

    Numerics: sums of squares of differences from a mean close by, merged in float64 by the formula of Chan, Golub and
    LeVeque; nothing cancels where the mean is large.

    >>> channel_moments(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)).tolist()
    [[2.0], [1.0]]
    """
    check_tensor("input", input, 4)
    x = input.detach()
    return _ops.channel_moments(x.to(compute_dtype(x.dtype, x.device.type)))


def norm_act_conv2d(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    norm: Norm | None = None,
    negative_slope: float = 0.0,
    upsample: int = 1,
    pool: int = 1,
    residual: Tensor | None = None,
    residual_upsample: int = 1,
    moments: bool = False,
    backend: str = "auto",
    record: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """``y = pool(conv2d(up(act(norm(x)))) + bias) + up(residual)``, the half of a residual block, in one pass.

    Args:
        input: ``[N, C_in, H, W]``, any strides; dtypes as of :func:`~ddst.ops.conv2d`.
        values, bias, topology, weight_shape, stride, padding, dilation, backend, record: of :func:`~ddst.ops.conv2d`,
            over the upsampled map.
        norm: what comes first, or None.
        negative_slope: of the leaky ReLU behind it; 0 is ReLU, 1 is no activation.
        upsample: 1, or 2 for nearest upsampling of the activated map.
        pool: 1, or 2 for 2x2 average pooling of the convolution's output (an odd last row or column is left out).
        residual: of the output's shape, or None; residual_upsample: 2 where it is to be upsampled first, from half
            the output's sides.
        moments: whether to return those of ``y``, which the next norm needs.

    Returns:
        ``(y, moments)``: ``[N, C_out, H_out, W_out]``, channels_last where ``conv2d`` would return channels_last, and
        ``[2, C_out]`` as of :func:`channel_moments`, or None.

    Raises:
        ValueError, TypeError, RuntimeError: an argument does not fit; the message names it.

    Numerics: as the parts one after the other, to rounding. Differentiable any number of times.

    Cost: that of the convolution, and one pass over input and output. Backward needs the input alone and makes the
    rest anew: no activated, upsampled or unpooled map is kept, or ever there as a whole.

    >>> from ddst.topology import build_topology, pack
    >>> mask, weight = torch.ones(1, 1, 3, 3, dtype=torch.bool), torch.randn(16, 16, 3, 3)
    >>> x, values = torch.randn(2, 16, 4, 4), pack(weight, mask, (16, 16))
    >>> mean, var = channel_moments(x)
    >>> norm = Norm(mean, var, batch_stats=True)
    >>> y, _ = norm_act_conv2d(x, values, None, build_topology(mask), weight.shape, padding=1, norm=norm, upsample=2)
    >>> h = F.interpolate(F.relu(F.batch_norm(x, None, None, training=True)), scale_factor=2.0)
    >>> torch.allclose(y, F.conv2d(h, weight, padding=1), atol=1e-4)
    True
    """
    for name, factor in (("upsample", upsample), ("pool", pool), ("residual_upsample", residual_upsample)):
        if not (type(factor) is int and 1 <= factor <= 2) and check_int(name, factor, 1) > 2:
            raise ValueError(f"{name} must be 1 or 2, got {factor}")
    check_operands(input, values, bias, topology)
    shape, strides, paddings, extra, dilations, _ = Geometry.of(weight_shape, stride, padding, dilation)
    plain = type(negative_slope) is float and math.isfinite(negative_slope)
    if not plain and not torch.compiler.is_compiling():  # where it may be a symbol
        negative_slope = check_number("negative_slope", negative_slope)
    check_bool("moments", moments)
    if residual is not None:
        check_tensor("residual", residual, 4)
    if norm is not None:
        check_type("norm", norm, Norm, "a Norm or None")
    check_tensor("input", input, 4)
    if input.shape[1] != shape[1]:
        raise ValueError(f"input must have {shape[1]} channels, got the shape {tuple(input.shape)}")
    if any(extra):
        raise ValueError(f"padding='same' must need equal zeros on both sides, got kernel {tuple(weight_shape[2:])}")
    _check_norm(norm, input)
    dtype, (x, values, bias) = in_compute_dtype(input, values, bias)
    size = _output_size(x.shape[2:], shape, strides, paddings, dilations, upsample, pool)
    if min(size) < 1:
        raise ValueError(
            f"input, upsampled by {upsample} and padded by {paddings}, must make an output of a pixel or more, got the "
            f"shape {tuple(input.shape)} for the kernel {tuple(shape[2:])}, pool={pool}"
        )
    if residual is not None:
        wanted = (x.shape[0], shape[0], size[0] // residual_upsample, size[1] // residual_upsample)
        if tuple(residual.shape) != wanted or any(n % residual_upsample for n in size):
            raise ValueError(
                f"residual, upsampled by {residual_upsample}, must have the output's shape "
                f"{(x.shape[0], shape[0], *size)}, got the shape {tuple(residual.shape)}"
            )
        if residual.device != input.device:
            raise RuntimeError(f"residual must be on the device of input, {input.device}, got {residual.device}")
        if not residual.is_floating_point() or residual.element_size() > max(x.element_size(), 4):
            raise TypeError(f"residual must have the dtype of input, {dtype}, got {residual.dtype}")
        residual = residual.to(x.dtype)
    # A mean of 1,000 and a spread of 1 are too much for 16 bits.
    wide = torch.promote_types(x.dtype, torch.float32)
    statistics = [t if t is None or t.dtype == wide else t.to(wide) for t in norm[:4]] if norm else [None] * 4
    eps, batch_stats = (norm.eps, norm.batch_stats) if norm else (0.0, False)
    problem = backends.Problem.of(x, values, (shape[2], shape[3]), strides, dilations)
    chosen = backend if x.is_meta else backends.choose(backend, problem)
    geometry = (shape, list(strides), list(paddings), list(dilations))
    settings = (*geometry, eps, float(negative_slope), upsample, pool, residual_upsample, batch_stats)
    tensors: Any = (x, values, bias, residual, *statistics, topology)
    if chosen == "reference":
        y = composed(*(*tensors, *settings, backends.code(chosen), record))
        found = channel_moments(y) if moments else None
    else:
        last = output_is_channels_last(x)
        y, found = _call(*tensors, *settings, moments, last, backends.code(backend), record)
    return y if y.dtype == dtype else y.to(dtype), found if moments else None


def _check_norm(norm: Norm | None, input: Tensor) -> None:
    if norm is None:
        return
    for name, needed in (("mean", norm.mean), ("var", norm.var)):
        check_tensor(f"norm.{name}", needed)
    if not torch.compiler.is_compiling():
        check_number("norm.eps", norm.eps, 0)
        check_bool("norm.batch_stats", norm.batch_stats)
    n, c = input.shape[:2]
    device = input.device
    for name, tensor in (("mean", norm.mean), ("var", norm.var), ("gamma", norm.gamma), ("beta", norm.beta)):
        if tensor is None:
            continue
        check_tensor(f"norm.{name}", tensor)
        if tensor.shape != (c,) and (name in ("mean", "var") or tensor.shape != (n, c)):
            shapes = f"({c},)" if name in ("mean", "var") else f"({c},) or ({n}, {c})"
            raise ValueError(f"norm.{name} must have the shape {shapes}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise RuntimeError(f"norm.{name} must be on the device of input, {device}, got {tensor.device}")
    if (norm.gamma is None) != (norm.beta is None) or (norm.gamma is not None and norm.gamma.shape != norm.beta.shape):  # type: ignore[union-attr]
        got = " and ".join(str(None if t is None else tuple(t.shape)) for t in (norm.gamma, norm.beta))
        raise ValueError(f"norm.gamma and norm.beta must be of one shape or both None, got {got}")


def activated(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    negative_slope: float,
    upsample: int,
    batch_stats: bool,
) -> Tensor:
    """What the convolution reads: norm, activation and upsampling as torch's functions, differentiable."""
    z = input.to(torch.promote_types(input.dtype, torch.float32))
    if mean is not None and var is not None:
        if batch_stats:
            var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
        z = (z - mean[:, None, None]) * torch.rsqrt(var + eps)[:, None, None]
        if gamma is not None and beta is not None:
            z = z * gamma[..., None, None] + beta[..., None, None]
    if negative_slope != 1:
        # A slope of 0 is not the same: it makes a NaN of an infinity.
        z = F.relu(z) if negative_slope == 0 else F.leaky_relu(z, negative_slope)
    z = z.to(input.dtype)
    return F.interpolate(z, scale_factor=2.0, mode="nearest") if upsample == 2 else z


def composed(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    topology: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    eps: float,
    negative_slope: float,
    upsample: int,
    pool: int,
    residual_upsample: int,
    batch_stats: bool,
    backend: int,
    record: int,
) -> Tensor:
    """The same by its parts: the oracle of the tests, and what second derivatives are taken of."""
    h = activated(input, mean, var, gamma, beta, eps, negative_slope, upsample, batch_stats)
    name = backends.name_of(backend)
    y = conv2d(h, values, bias, topology, weight_shape, stride, padding, dilation, backend=name, record=record)
    if pool == 2:
        y = F.avg_pool2d(y, 2)
    if residual is not None:
        y = y + (F.interpolate(residual, scale_factor=2.0, mode="nearest") if residual_upsample == 2 else residual)
    return y


def _output_size(
    size: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    upsample: int,
    pool: int,
) -> list[int]:
    reach = [dilation[i] * (weight_shape[2 + i] - 1) + 1 for i in (0, 1)]
    return [((size[i] * upsample + 2 * padding[i] - reach[i]) // stride[i] + 1) // pool for i in (0, 1)]


def _empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


@torch.library.register_fake("ddst::channel_moments")
def _channel_moments_fake(input: Tensor) -> Tensor:
    return _moments_like(input, [2, input.shape[1]])


def _moments_like(input: Tensor, shape: list[int]) -> Tensor:
    return input.new_empty(shape, dtype=torch.promote_types(input.dtype, torch.float32))


@torch.library.register_fake("ddst::norm_act_conv2d")
def _norm_act_conv2d_fake(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    topology: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    eps: float,
    negative_slope: float,
    upsample: int,
    pool: int,
    residual_upsample: int,
    batch_stats: bool,
    moments: bool,
    channels_last: bool,
    backend: int = 0,
    record: int = 0,
) -> tuple[Tensor, Tensor]:
    size = _output_size(input.shape[2:], weight_shape, stride, padding, dilation, upsample, pool)
    y = _empty(input, [input.shape[0], weight_shape[0], *size], channels_last)
    return y, _moments_like(input, [2, weight_shape[0]] if moments else [0])


@torch.library.register_fake("ddst::norm_act_conv2d_input_grad")
def _input_grad_fake(
    grad_output: Tensor,
    input: Tensor,
    values: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    topology: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    eps: float,
    negative_slope: float,
    upsample: int,
    pool: int,
    batch_stats: bool,
    channels_last: bool,
    backend: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    affine = [0] if gamma is None else gamma.shape
    return _empty(input, input.shape, channels_last), input.new_empty(affine), input.new_empty(affine)


@torch.library.register_fake("ddst::norm_act_conv2d_weight_grad")
def _weight_grad_fake(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    topology: Tensor,
    weight_shape: list[int],
    block: list[int],
    *settings: Any,
    **named: Any,
) -> tuple[Tensor, Tensor]:
    rows, cols = -(-weight_shape[0] // block[0]), -(-weight_shape[1] // block[1])
    return input.new_empty([slot_count(topology, rows, cols), *block]), input.new_empty([weight_shape[0]])


def _unpooled(grad: Tensor, settings: Sequence[Any], input: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """The gradient of what was pooled."""
    stride, padding, dilation, _, _, upsample, pool = settings[:7]
    if pool == 1:
        return grad
    full = _output_size(input.shape[2:], weight_shape, stride, padding, dilation, upsample, 1)
    spread = F.interpolate(grad, scale_factor=2.0, mode="nearest") / 4
    return F.pad(spread, (0, full[1] - spread.shape[3], 0, full[0] - spread.shape[2]))


class _NormActConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *given, keyset = args
        y, found = _compute(keyset, given)
        x, values, _, _, mean, var, gamma, beta, topology, ctx.weight_shape, *settings = given
        ctx.settings = (*settings[:7], *settings[8:9])  # without residual_upsample
        ctx.residual_upsample, (ctx.channels_last, ctx.backend, ctx.record) = settings[7], (*settings[10:], 0, 0)[:3]
        # Edges of the graph lead to tensors: an argument that is None has none.
        ctx.edges = {i: sum(isinstance(t, Tensor) for t in given[:i]) for i in _DIFFERENTIABLE}
        ctx.save_for_backward(x, values, mean, var, gamma, beta, topology)
        ctx.mark_non_differentiable(found)
        return y, found

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if ctx.needs_input_grad[3]:
            doubled = ctx.residual_upsample == 2
            gradients[3] = F.avg_pool2d(grad, 2, divisor_override=1) if doubled else grad
        wanted = [i for i in _DIFFERENTIABLE if ctx.needs_input_grad[i] and _reaches(ctx, i)]
        if torch.is_grad_enabled():
            _differentiable_gradients(ctx, grad, wanted, gradients)
            if ctx.needs_input_grad[2]:
                gradients[2] = grad.sum((0, 2, 3))
            return tuple(gradients)
        x, values, mean, var, gamma, beta, topology = ctx.saved_tensors
        norm, geometry = (mean, var, gamma, beta), (topology, ctx.weight_shape)
        if any(i != 1 for i in wanted):
            gradients[0], grad_gamma, grad_beta = _ops.norm_act_conv2d_input_grad(
                grad, x, values, *norm, *geometry, *ctx.settings, ctx.channels_last, ctx.backend
            )
            if gamma is not None:
                gradients[6], gradients[7] = grad_gamma, grad_beta

        def weight_grad() -> Tensor:
            block = [values.shape[1], values.shape[2]]
            grad_values, grad_bias = _ops.norm_act_conv2d_weight_grad(
                grad, x, *norm, *geometry, block, *ctx.settings[:7], ctx.backend
            )
            gradients[2] = grad_bias if ctx.needs_input_grad[2] else None
            return grad_values

        factors = grad, x
        if ctx.record and (torch.compiler.is_compiling() or recorder_of(ctx.record) is not None):
            factors = _unpooled(grad, ctx.settings, x, ctx.weight_shape), activated(x, *norm, *_prologue(ctx.settings))
        gradients[1] = values_gradient(ctx, *factors, weight_grad, ctx.settings[:3])
        if gradients[2] is None and ctx.needs_input_grad[2]:
            gradients[2] = grad.sum((0, 2, 3))
        return tuple(gradients)


#: Arguments that gradients go to through the convolution: input, values, gamma and beta.
_DIFFERENTIABLE = (0, 1, 6, 7)


def _prologue(settings: Sequence[Any]) -> tuple[float, float, int, bool]:
    """eps, negative_slope, upsample and batch_stats of stride, padding, dilation and these."""
    return settings[3], settings[4], settings[5], settings[7]


def _reaches(ctx: Any, position: int) -> bool:
    return torch.compiler.is_compiling() or gradient_is_wanted(ctx.next_functions[ctx.edges[position]][0])


def _differentiable_gradients(ctx: Any, grad: Tensor, wanted: list[int], gradients: list[Tensor | None]) -> None:
    """The gradients as functions of what they are made of, for a second derivative."""
    x, values, mean, var, gamma, beta, topology = ctx.saved_tensors
    tensors = {0: x, 1: values, 6: gamma, 7: beta}
    *settings, batch_stats = ctx.settings
    weight: Any = (topology, ctx.weight_shape)
    rest = (*settings, 1, batch_stats, ctx.backend, ctx.record)
    y = composed(x, values, None, None, mean, var, gamma, beta, *weight, *rest)
    found = torch.autograd.grad(y, [tensors[i] for i in wanted], grad, create_graph=True) if wanted else ()
    for position, gradient in zip(wanted, found, strict=True):
        gradients[position] = gradient


def _compute(keyset: Any, args: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Below the derivative; keyset: of the call under way, or None where the dispatcher has not been asked."""
    operator = _ops.norm_act_conv2d.default
    with torch._C._AutoDispatchBelowAutograd():
        if keyset is None:
            return operator(*args)
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _call(*args: Any) -> tuple[Tensor, Tensor]:
    """The operator, of all its arguments; past the dispatcher where nothing listens to it."""
    if not nothing_listens(args):
        return _ops.norm_act_conv2d(*args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return _NormActConv2d.apply(*args, None)
    return _compute(None, args)


def _kernel(keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
    if exported("norm_act_conv2d", args):
        return formulas["norm_act_conv2d"](*args)
    if has_tangent(args) or torch._C._are_functorch_transforms_active():
        moments, _, *rest = (*args[19:], 0, 0)[:4]
        y = composed(*args[:19], *rest)
        return y, channel_moments(y) if moments else _moments_like(y, [0])
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return _NormActConv2d.apply(*args, keyset)
    return _compute(keyset, args)


_library.impl("norm_act_conv2d", _kernel, "Autograd", with_keyset=True)
