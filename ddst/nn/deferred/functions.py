"""What torch's functions do with a :class:`~ddst.nn.deferred.value.Deferred`.

Each function of the table has the signature of torch's function of its name and returns None where it has to run: then
it does, on tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.norm_act_conv2d import Norm, channel_moments
from .plan import finish
from .run import shape_of
from .value import Deferred, tensor_of
from .work import Activated, Convolved, Step, mode_of, version_of

_KNOWN: dict[str, Callable[..., Any]] = {}
_IN_PLACE = {"relu_", "leaky_relu_", "mul_", "__imul__", "add_", "__iadd__"}


def known(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Puts a function into the table under torch's names."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            _KNOWN[name] = function
        return function

    return register


def apply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls one of torch's functions, some arguments of which are deferred."""
    name = getattr(func, "__name__", "")
    function = _KNOWN.get(name)
    # torch.batch_norm has other arguments than the function of torch.nn.functional.
    if function is not None and (name != "batch_norm" or func is F.batch_norm):
        result = function(name in _IN_PLACE, *args, **kwargs)
        if result is not None:
            return result
    return func(*[_tensors_in(a) for a in args], **{key: _tensors_in(value) for key, value in kwargs.items()})


def _tensors_in(value: Any) -> Any:
    if isinstance(value, list | tuple):
        items = [_tensors_in(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return tensor_of(value)


def _now(value: Any) -> Activated | None:
    """What a value is made of, for one more step in the mode there is now; None where it is no activation."""
    if not isinstance(value, Deferred) or not isinstance(value.work, Activated):
        return None
    mode = mode_of(value.device)
    if value.work.steps and value.work.mode != mode:
        value.tensor()
    value.check_reached()
    work = value.work
    assert isinstance(work, Activated)
    if work.steps:
        return work
    source = work.source if mode.grad else work.source.detach()
    return work._replace(source=source, mode=mode, version=version_of(source))


def _became(value: Deferred, work: Activated, step: Step, in_place: bool) -> Deferred | None:
    """The value after a step; None where it has to be taken, as others see the tensor change."""
    after = work._replace(steps=(*work.steps, step), takes_norm=False).noting()
    if not in_place:
        return Deferred(after)
    if not work.steps and work.shared:
        return None
    value.work = after
    return value


@known("relu", "relu_")
def _relu(in_place: bool, input: Any, inplace: bool = False) -> Any:
    return _activated(input, 0.0, (F.relu, (), {}), in_place or inplace)


@known("leaky_relu", "leaky_relu_")
def _leaky_relu(in_place: bool, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    if not isinstance(negative_slope, int | float):
        return None
    return _activated(input, float(negative_slope), (F.leaky_relu, (negative_slope,), {}), in_place or inplace)


def _activated(value: Any, slope: float, step: Step, in_place: bool) -> Deferred | None:
    work = _now(value)
    if work is None or work.slope != 1:
        return None
    return _became(value, work._replace(slope=slope), step, in_place)


@known("interpolate")
def _interpolate(
    in_place: bool,
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    work = _now(input)
    if work is None or work.upsample != 1 or not doubles(size, scale_factor, mode, align_corners, antialias):
        return None
    return _became(input, work._replace(upsample=2), (F.interpolate, (), {"scale_factor": 2.0}), False)


def doubles(size: Any, scale_factor: Any, mode: Any, align_corners: Any = None, antialias: Any = False) -> bool:
    """Whether these arguments of ``F.interpolate`` mean nearest 2x upsampling."""
    factors = list(scale_factor) if isinstance(scale_factor, tuple | list) else [scale_factor]
    plain = size is None and mode == "nearest" and align_corners is None and not antialias
    return plain and all(isinstance(f, int | float) and f == 2 for f in factors)


@known("batch_norm")
def _batch_norm(
    in_place: bool,
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    work = _now(input)
    if work is None or work.steps or not work.takes_norm or (running_mean is None) != (running_var is None):
        return None
    x, channels = work.source, (input.shape[1],)
    count, dtype, device = x.numel() // max(channels[0], 1), x.dtype, x.device
    for t in (running_mean, running_var, weight, bias):
        if t is None:
            continue
        if t.shape != channels or t.device != device:
            return None
        if t.dtype != dtype and (x.element_size() > 2 or t.dtype != torch.float32):
            return None
    if count < 2 if training else running_mean is None:  # which it says itself
        return None
    if training:
        moments = work.moments
        if moments is None or (not torch.compiler.is_compiling() and x._version != input.work.version):
            moments = channel_moments(x)
        mean, var = moments.unbind()
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                for running, new in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
                    new = new if new.dtype == running.dtype else new.to(running.dtype)
                    running.mul_(1 - momentum).add_(new, alpha=momentum)
        step: Step = (F.batch_norm, (None, None, weight, bias, True, 0.0, eps), {})
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean, running_var
        step = (F.batch_norm, (running_mean, running_var, weight, bias, False, 0.0, eps), {})
    if not work.mode.grad:
        weight, bias = (None if t is None else t.detach() for t in (weight, bias))
    return _became(input, work._replace(norm=Norm(mean, var, weight, bias, eps, training)), step, False)


@known("mul", "mul_", "__mul__", "__rmul__", "__imul__")
def _mul(in_place: bool, input: Any, other: Any, **named: Any) -> Any:
    value, factor = _sides(input, other, in_place)
    work, gamma = _now(value), None if named else _per_channel(value, factor)
    if work is None or gamma is None or work.norm is None or work.slope != 1 or work.upsample != 1:
        return None
    if work.norm.gamma is not None or work.norm.beta is not None:
        return None
    gamma = gamma if work.mode.grad else gamma.detach()
    return _became(value, work._replace(norm=work.norm._replace(gamma=gamma)), (torch.mul, (factor,), {}), in_place)


@known("add", "add_", "__add__", "__radd__", "__iadd__")
def _add(in_place: bool, input: Any, other: Any, *, alpha: Any = 1, **named: Any) -> Any:
    value, summand = _sides(input, other, in_place)
    if value is None or named or not isinstance(alpha, int | float) or alpha != 1:
        return None
    if isinstance(value.work, Convolved):
        return _summed(value, value.work, summand, in_place)
    work, beta = _now(value), _per_channel(value, summand)
    if work is None or beta is None or work.norm is None or work.slope != 1 or work.upsample != 1:
        return None
    if work.norm.beta is not None:
        return None
    beta = beta if work.mode.grad else beta.detach()
    return _became(value, work._replace(norm=work.norm._replace(beta=beta)), (torch.add, (summand,), {}), in_place)


def _sides(input: Any, other: Any, in_place: bool) -> tuple[Any, Any]:
    """The deferred operand, a convolution before an activation, and the other; None where there is none to change."""
    waits = [isinstance(side, Deferred) and isinstance(side.work, Convolved) for side in (input, other)]
    if in_place or waits[0]:
        return (input if isinstance(input, Deferred) else None), other
    if waits[1] or not isinstance(input, Deferred):
        return other, input
    return input, other


def _per_channel(value: Any, other: Any) -> Tensor | None:
    """``[C]`` or ``[N, C]`` of a factor or summand ``[N or 1, C, 1, 1]`` of the value's dtype, or None."""
    if not isinstance(value, Deferred) or not isinstance(value.work, Activated) or not isinstance(other, Tensor):
        return None
    source = value.work.source
    if other.dtype != source.dtype or other.dim() not in (3, 4) or tuple(other.shape[-2:]) != (1, 1):
        return None
    if other.shape[-3] != source.shape[1] or (other.dim() == 4 and other.shape[0] not in (1, source.shape[0])):
        return None
    flat = other.flatten(-3)
    return flat[0] if other.dim() == 4 and other.shape[0] == 1 else flat


@known("avg_pool2d")
def _avg_pool2d(
    in_place: bool,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    work = input.work if isinstance(input, Deferred) else None
    if not isinstance(work, Convolved) or work.pool != 1 or work.mode != mode_of(input.device):
        return None
    if not halves(kernel_size, stride, padding, ceil_mode, divisor_override) or min(shape_of(work)[2:]) < 2:
        return None
    plan = work.layer.plan
    if plan is None or not plan.pool:
        return None
    pooled = work._replace(pool=2)
    return Deferred(pooled) if plan.sum else finish(pooled)


def halves(kernel_size: Any, stride: Any, padding: Any, ceil_mode: Any, divisor_override: Any) -> bool:
    """Whether these arguments of ``F.avg_pool2d`` mean the means of 2x2 pixels."""
    whole = all(size in (2, (2, 2), [2, 2]) for size in (kernel_size, stride if stride else kernel_size))
    return whole and padding in (0, (0, 0), [0, 0]) and not ceil_mode and divisor_override is None


def _summed(value: Deferred, work: Convolved, residual: Any, in_place: bool) -> Any:
    plan, mode = work.layer.plan, mode_of(value.device)
    if plan is None or not plan.sum or work.mode != mode or not isinstance(residual, Tensor | Deferred):
        return None
    if tuple(residual.shape) != shape_of(work):
        return None
    factor, inner = 1, residual.work if isinstance(residual, Deferred) else None
    summand: Tensor
    # Under autocast upsampling may change the dtype.
    if isinstance(inner, Activated) and inner.is_doubled and mode.autocast is None and inner.mode.grad == mode.grad:
        inner.check_source()
        factor, summand = 2, inner.source
    else:
        summand = tensor_of(residual)
    if summand.device != value.device or not (in_place or summand.dtype == value.dtype):
        return None
    result = finish(work, summand, factor)
    if in_place:  # the value that was changed is the result, whoever holds it
        value.work = result.work if isinstance(result, Deferred) else Deferred.of(result).work
        return value if isinstance(result, Deferred) else result
    return result
