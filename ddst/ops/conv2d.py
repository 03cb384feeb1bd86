"""Block-sparse 2-D convolution: public functions, fake kernels and derivatives of the four registered operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from .. import topology as tp
from .._arguments import MAX_INT, check_ints, check_operands, check_tensor, check_weight_shape
from . import reference
from .autograd import derived, register_autograd
from .gradient_record import values_gradient
from .precision import in_compute_dtype

_ops = torch.ops.ddst


def pair(value: int | Sequence[int], name: str, minimum: int) -> tuple[int, int]:
    """``(vertical, horizontal)`` of an int or a pair of ints, each at least ``minimum``, or of a one-tuple.

    >>> pair(1, "stride", 1), pair((1,), "stride", 1)
    ((1, 1), (1, 1))
    """
    vertical, horizontal = check_ints(name, value, 2, minimum)
    return vertical, horizontal


def output_is_channels_last(input: Tensor) -> bool:
    """torch's rule for ``nn.Conv2d``: the output is channels_last if the input's strides are those of channels_last.

    >>> output_is_channels_last(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    True
    """
    if input.stride(1) == 0:
        return False
    smallest = 0
    for dim in (1, 3, 2, 0):
        size, stride = input.shape[dim], input.stride(dim)
        if size == 0 or stride < smallest or (dim == 0 and smallest == input.stride(1)):
            return False
        smallest = stride * size if size > 1 else stride
    return True


def resolve_padding(
    padding: str | int | Sequence[int], kernel: Sequence[int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """``(padding, extra)``: symmetric padding, and zeros to add first, below and to the right (even 'same').

    >>> resolve_padding("same", (3, 4), (1, 1), (1, 1))
    ((1, 1), (0, 1))
    """
    if not isinstance(padding, str):
        return pair(padding, "padding", 0), (0, 0)
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding != "same":
        raise ValueError(f"padding must be an int, a pair of ints, 'same' or 'valid', got {padding!r}")
    if stride != (1, 1):
        raise ValueError(f"padding='same' is not supported for strided convolutions, got stride={stride}")
    total = [dilation[i] * (kernel[i] - 1) for i in range(2)]
    return (total[0] // 2, total[1] // 2), (total[0] % 2, total[1] % 2)


class Geometry(NamedTuple):
    """Where a convolution's taps lie; ``extra``: see :func:`resolve_padding`, ``reach``: of the kernel in pixels."""

    weight_shape: list[int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    extra: tuple[int, int]
    dilation: tuple[int, int]
    reach: tuple[int, int]

    @staticmethod
    def of(
        weight_shape: Sequence[int],
        stride: int | Sequence[int],
        padding: str | int | Sequence[int],
        dilation: int | Sequence[int],
    ) -> Geometry:
        """What the arguments of a convolution mean, once they are checked; found again where they are plain tuples.

        Raises:
            TypeError, ValueError: one of them does not fit; the message names it.
        """
        given = (weight_shape, stride, padding, dilation)
        plain = not torch.compiler.is_compiling() and all(map(_is_plain, given))
        found = _geometries.get(given) if plain else None
        if found is not None:
            return found
        if len(check_weight_shape("weight_shape", weight_shape)) != 4:
            raise ValueError(f"weight_shape must be (C_out, C_in, kH, kW), got {tuple(weight_shape)}")
        strides, dilations = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
        paddings, extra = resolve_padding(padding, weight_shape[2:], strides, dilations)
        high, wide = (dilations[i] * (weight_shape[2 + i] - 1) + 1 for i in (0, 1))
        found = Geometry(list(weight_shape), strides, paddings, extra, dilations, (high, wide))
        if plain and len(_geometries) < MOST_GEOMETRIES:
            _geometries[given] = found
        return found


MOST_GEOMETRIES = 4096
_geometries: dict[Any, Geometry] = {}
_INTS = {int}


def _is_plain(value: Any) -> bool:
    """A tuple of Python's own ints, or a name: True, 1.0 and numpy's 1 are equal to 1, but are not what was checked."""
    return type(value) is str or (type(value) is tuple and _INTS.issuperset(map(type, value)))


def check_padding(padding: Any, paddings: tuple[int, int], size: Sequence[int], reach: Sequence[int]) -> None:
    """Raises ValueError for a padding beyond input and kernel that alone makes 2³¹ output positions and more.

    Args:
        padding: as it was given. paddings: of height and width. size: of the input. reach: of the kernel.
    """
    # A padding of up to 2¹⁴ cannot: usual ones cost nothing here, and no sizes of a traced graph are compared.
    if max(paddings) > 2**14 and any(p > max(n, r) for p, n, r in zip(paddings, size, reach, strict=True)):
        height, width = (n + 2 * p for p, n in zip(paddings, size, strict=True))
        if height * width > MAX_INT:
            raise ValueError(
                f"padding must not make 2**31 positions and more, got {padding!r}, which makes {height}x{width} of an "
                f"input of {size[0]}x{size[1]}"
            )


def conv2d(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    backend: str = "auto",
    record: int = 0,
) -> Tensor:
    """``y[n, o, p] = bias[o] + Σ_{active blocks} Σ_{c, t} W[o, c, t] · x[n, c, p · stride − padding + t · dilation]``.

    Args:
        input: ``[N, C_in, H, W]`` or ``[C_in, H, W]``, any strides; float32 or float64, or a 16-bit float, which is
            computed in float32 on the CPU and returned in its own dtype. Under autocast the autocast dtype applies.
        values: packed weight ``[slots, b_out, b_in]`` in the order of :mod:`ddst.topology`.
        bias: ``[C_out]`` or None.
        topology: int32 vector of :func:`ddst.topology.build_topology`, on the input's device.
        weight_shape: ``(C_out, C_in, kH, kW)`` of the dense weight.
        stride, padding, dilation: as in :func:`torch.nn.functional.conv2d`.
        backend: "auto", "cpu", "triton", "cuda" (CUDA C++) or "reference" (dense arithmetic on the unpacked weight, the
            oracle of the tests); derivatives run on the same.
        record: key of a :class:`~ddst.ops.gradient_record.ScoreRecorder`, or 0.

    Returns:
        ``[N, C_out, H_out, W_out]``, channels_last where ``F.conv2d`` would return channels_last.

    Raises:
        ValueError, TypeError, RuntimeError: an argument does not fit; the message names it.
        RuntimeError: no memory for the output or a workspace, in torch's words, with its bytes.

    Numerics: accumulates in the compute dtype (float32 or float64); the same bits for the same number of threads.
    Differentiable any number of times; every derivative is one of the registered operators.

    Cost: ``2 · nnz · b_out · b_in · N · H_out · W_out`` operations, so proportional to density. Fast when ``b_out`` and
    ``b_in`` are multiples of 8; inputs that are not channels_last are copied once.

    >>> from ddst.topology import build_topology, pack
    >>> mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    >>> weight = torch.randn(16, 16, 3, 3)
    >>> x = torch.randn(2, 16, 8, 8)
    >>> y = conv2d(x, pack(weight, mask, (16, 16)), None, build_topology(mask), weight.shape, padding=1)
    >>> torch.allclose(y, torch.nn.functional.conv2d(x, weight, padding=1), atol=1e-4)
    True
    """
    check_operands(input, values, bias, topology)
    shape, strides, paddings, extra, dilations, reach = Geometry.of(weight_shape, stride, padding, dilation)
    if input.dim() not in (3, 4):
        raise ValueError(f"input must be [N, C_in, H, W] or [C_in, H, W], got the shape {tuple(input.shape)}")
    if input.shape[-3] != shape[1]:
        raise ValueError(f"input must have {shape[1]} channels, got the shape {tuple(input.shape)}")
    for i, name in enumerate(("height", "width")):
        padded = input.shape[i - 2] + 2 * paddings[i] + extra[i]
        if padded < reach[i]:
            raise ValueError(
                f"input's {name} with padding must be at least the kernel's reach {reach[i]}, got {padded} "
                f"from the shape {tuple(input.shape)} and padding {padding!r}"
            )
    check_padding(padding, paddings, input.shape[-2:], reach)
    x = input.unsqueeze(0) if input.dim() == 3 else input
    if any(extra):
        x = torch.nn.functional.pad(x, (0, extra[1], 0, extra[0]))
    dtype, (x, values, bias) = in_compute_dtype(x, values, bias)
    last = output_is_channels_last(x)
    problem = backends.Problem.of(x, values, (shape[2], shape[3]), strides, dilations)
    # On meta nothing is computed but shapes.
    chosen = backend if x.is_meta else backends.choose(backend, problem)
    if chosen == "reference":
        y = reference.conv2d(x, values, bias, topology, shape, strides, paddings, dilations, record)
    else:
        code = backends.code(backend)
        y = _call_conv2d(x, values, bias, topology, shape, strides, paddings, dilations, last, code, record)
    y = y if y.dtype == dtype else y.to(dtype)
    return y.squeeze(0) if input.dim() == 3 else y


def conv2d_block_scores(
    grad_output: Tensor,
    input: Tensor,
    weight_shape: Sequence[int],
    block: tuple[int, int] | int,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """``scores[r, c, kh, kw] = ‖∂L/∂W[block r, c, kh, kw]‖₂`` of the dense weight gradient, active or not.

    Args:
        grad_output: ``[N, C_out, H_out, W_out]``; input: ``[N, C_in, H, W]``; float32 or float64.
        weight_shape, stride, padding, dilation: of the convolution; block: ``(b_out, b_in)``.

    Returns:
        ``[R, C, kH, kW]`` in the dtype of the input. Not differentiable.

    Cost: the dense weight gradient's operations; it is formed a few blocks at a time and never stored whole.

    >>> conv2d_block_scores(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3), (2, 2, 1, 1), (2, 1)).flatten().tolist()
    [12.727922439575195, 12.727922439575195]
    """
    check_tensor("grad_output", grad_output, 4)
    check_tensor("input", input, 4)
    if len(check_weight_shape("weight_shape", weight_shape)) != 4:
        raise ValueError(f"weight_shape must be (C_out, C_in, kH, kW), got {tuple(weight_shape)}")
    block = tp.check_block(block)
    strides, paddings, dilations = pair(stride, "stride", 1), pair(padding, "padding", 0), pair(dilation, "dilation", 1)
    grad_output, input = grad_output.detach(), input.detach()
    args = (list(weight_shape), list(block), list(strides), list(paddings), list(dilations))
    problem = backends.Problem(
        input.device.type, input.dtype, block, (weight_shape[2], weight_shape[3]), strides, dilations
    )
    if backends.choose(backend, problem) == "reference":
        return reference.conv2d_block_scores(grad_output, input, *args)
    return _ops.conv2d_block_scores(grad_output, input, *args)


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


@torch.library.register_fake("ddst::conv2d")
def _conv2d_fake(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    channels_last: bool,
    backend: int = 0,
    record: int = 0,
) -> Tensor:
    size = [_output_size(input.shape[2 + i], weight_shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1)]
    return _empty(input, [input.shape[0], weight_shape[0], *size], channels_last)


@torch.library.register_fake("ddst::conv2d_input_grad")
def _conv2d_input_grad_fake(
    grad_output: Tensor,
    values: Tensor,
    topology: Tensor,
    weight_shape: list[int],
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    channels_last: bool,
    backend: int = 0,
    record: int = 0,
) -> Tensor:
    return _empty(grad_output, [grad_output.shape[0], weight_shape[1], *input_size], channels_last)


@torch.library.register_fake("ddst::conv2d_weight_grad")
def _conv2d_weight_grad_fake(
    grad_output: Tensor,
    input: Tensor,
    topology: Tensor,
    weight_shape: list[int],
    block: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    backend: int = 0,
) -> Tensor:
    rows, cols = -(-weight_shape[0] // block[0]), -(-weight_shape[1] // block[1])
    return input.new_empty([tp.slot_count(topology, rows, cols), *block])


@torch.library.register_fake("ddst::conv2d_block_scores")
def _conv2d_block_scores_fake(
    grad_output: Tensor,
    input: Tensor,
    weight_shape: list[int],
    block: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    rows, cols = -(-weight_shape[0] // block[0]), -(-weight_shape[1] // block[1])
    return input.new_empty([rows, cols, *weight_shape[2:]])


def _block(values: Tensor) -> list[int]:
    return [values.shape[1], values.shape[2]]


def _conv2d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, topology, ctx.weight_shape, *ctx.geometry, ctx.channels_last, ctx.backend, ctx.record = inputs
    ctx.save_for_backward(x, values, topology)


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, topology = ctx.saved_tensors
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = derived(
            _ops.conv2d_input_grad.default,
            grad,
            values,
            topology,
            ctx.weight_shape,
            x.shape[2:],
            *ctx.geometry,
            ctx.channels_last,
            ctx.backend,
            ctx.record,
        )
    grad_values = values_gradient(
        ctx, grad, x,
        lambda: derived(
            _ops.conv2d_weight_grad.default,
            grad, x, topology, ctx.weight_shape, _block(values), *ctx.geometry, ctx.backend,
        ),
        ctx.geometry,
    )  # fmt: skip
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_input, grad_values, grad_bias, *[None] * 8


def _conv2d_input_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, values, topology, ctx.weight_shape, _, *ctx.geometry, ctx.channels_last, ctx.backend, ctx.record = inputs
    ctx.save_for_backward(grad, values, topology)


def _conv2d_input_grad_backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
    grad, values, topology = ctx.saved_tensors
    grad_grad_output = None
    if ctx.needs_input_grad[0]:
        grad_grad_output = derived(
            _ops.conv2d.default,
            grad_grad,
            values,
            None,
            topology,
            ctx.weight_shape,
            *ctx.geometry,
            ctx.channels_last,
            ctx.backend,
            ctx.record,
        )
    grad_values = values_gradient(
        ctx, grad, grad_grad,
        lambda: derived(
            _ops.conv2d_weight_grad.default,
            grad, grad_grad, topology, ctx.weight_shape, _block(values), *ctx.geometry, ctx.backend,
        ),
        ctx.geometry,
    )  # fmt: skip
    return grad_grad_output, grad_values, *[None] * 9


def _conv2d_weight_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, topology, ctx.weight_shape, _, *ctx.geometry, ctx.backend = inputs
    ctx.save_for_backward(grad, x, topology)


def _conv2d_weight_grad_backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, topology = ctx.saved_tensors
    grad_grad_output = grad_input = None
    if ctx.needs_input_grad[0]:
        grad_grad_output = derived(
            _ops.conv2d.default,
            x,
            grad_values,
            None,
            topology,
            ctx.weight_shape,
            *ctx.geometry,
            output_is_channels_last(x),
            ctx.backend,
        )
    if ctx.needs_input_grad[1]:
        grad_input = derived(
            _ops.conv2d_input_grad.default,
            grad,
            grad_values,
            topology,
            ctx.weight_shape,
            x.shape[2:],
            *ctx.geometry,
            output_is_channels_last(x),
            ctx.backend,
        )
    return grad_grad_output, grad_input, None, None, None, None, None, None, None


_call_conv2d = register_autograd("conv2d", _conv2d_backward, _conv2d_setup, linear_in=(0, 1), bias=2)
register_autograd("conv2d_input_grad", _conv2d_input_grad_backward, _conv2d_input_grad_setup, linear_in=(0, 1))
register_autograd("conv2d_weight_grad", _conv2d_weight_grad_backward, _conv2d_weight_grad_setup, linear_in=(0, 1))
