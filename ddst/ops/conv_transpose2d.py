"""Block-sparse transposed 2-D convolution: public functions on the operators of the convolution it is the transpose of.

``ddst::conv2d_input_grad`` computes it, and the other passes of that convolution are its derivatives: they are
registered there (:mod:`ddst.ops.conv2d`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from .._arguments import MAX_INT, check_operands, check_weight_shape
from ..operator_view import from_block_order
from . import reference
from .conv2d import output_is_channels_last, pair
from .precision import in_compute_dtype

_ops = torch.ops.ddst


def conv_transpose2d(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    backend: str = "auto",
    record: int = 0,
) -> Tensor:
    """``y[n, o, p · stride − padding + t · dilation] += W[c, o, t] · x[n, c, p]`` over active blocks; then the bias.

    Args:
        input: ``[N, C_in, H, W]`` or ``[C_in, H, W]``, any strides; float32 or float64, or a 16-bit float, which is
            computed in float32 on the CPU and returned in its own dtype. Under autocast the autocast dtype applies.
        values: packed weight ``[slots, b_in, b_out]`` in the order of :mod:`ddst.topology`: torch's weight of a
            transposed convolution has the input channels first, and so have its blocks.
        bias: ``[C_out]`` or None.
        topology: int32 vector of :func:`ddst.topology.build_topology`, on the input's device.
        weight_shape: ``(C_in, C_out, kH, kW)`` of the dense weight.
        stride, padding, output_padding, dilation: as in :func:`torch.nn.functional.conv_transpose2d`; the output has
            ``(H − 1) · stride − 2 · padding + dilation · (kH − 1) + output_padding + 1`` rows, columns likewise.
        backend: "auto", "cpu", "triton", "cuda" (CUDA C++) or "reference" (dense arithmetic on the unpacked weight);
            derivatives run on the same.
        record: key of a :class:`~ddst.ops.gradient_record.ScoreRecorder`, or 0.

    Returns:
        ``[N, C_out, H_out, W_out]``, channels_last where ``F.conv_transpose2d`` would return channels_last.

    Raises:
        ValueError, TypeError, RuntimeError: an argument does not fit; the message names it.
        RuntimeError: no memory for the output or a workspace, in torch's words, with its bytes.

    Numerics: accumulates in the compute dtype (float32 or float64); the same bits for the same number of threads.
    Differentiable any number of times; every derivative is one of the registered operators.

    Cost: ``2 · nnz · b_in · b_out · N · H · W`` operations, so proportional to density. Fast when ``b_in`` and
    ``b_out`` are multiples of 8; inputs that are not channels_last are copied once. The bias is one more pass over the
    output.

    >>> from ddst.topology import build_topology, pack
    >>> mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    >>> weight = torch.randn(16, 16, 4, 4)
    >>> x = torch.randn(2, 16, 5, 5)
    >>> y = conv_transpose2d(x, pack(weight, mask, (16, 16)), None, build_topology(mask), weight.shape, 2, 1)
    >>> torch.allclose(y, torch.nn.functional.conv_transpose2d(x, weight, stride=2, padding=1), atol=1e-4)
    True
    """
    check_operands(input, values, bias, topology)
    if len(check_weight_shape("weight_shape", weight_shape)) != 4:
        raise ValueError(f"weight_shape must be (C_in, C_out, kH, kW), got {tuple(weight_shape)}")
    if input.dim() not in (3, 4):
        raise ValueError(f"input must be [N, C_in, H, W] or [C_in, H, W], got the shape {tuple(input.shape)}")
    if input.shape[-3] != weight_shape[0]:
        raise ValueError(f"input must have {weight_shape[0]} channels, got the shape {tuple(input.shape)}")
    _check_bias(bias, weight_shape[1])
    strides, paddings = pair(stride, "stride", 1), pair(padding, "padding", 0)
    extra, dilations = pair(output_padding, "output_padding", 0), pair(dilation, "dilation", 1)
    size = output_size(input.shape[-2:], weight_shape[2:], strides, paddings, extra, dilations)
    x = input.unsqueeze(0) if input.dim() == 3 else input
    dtype, (x, values, bias) = in_compute_dtype(x, values, bias)
    shape, last = list(weight_shape), output_is_channels_last(x)
    problem = backends.Problem.of(x, values, (shape[2], shape[3]), strides, dilations)
    # On meta nothing is computed but shapes.
    chosen = backend if x.is_meta else backends.choose(backend, problem)
    if chosen == "reference":
        y = reference.conv_transpose2d(x, values, bias, topology, shape, strides, paddings, extra, dilations, record)
    else:
        # Output padding of a whole stride, which only dilation allows, makes positions that no input pixel belongs to.
        beyond = [extra[i] // strides[i] for i in (0, 1)]
        if any(beyond):
            x = torch.nn.functional.pad(x, (0, beyond[1], 0, beyond[0]))
        code = backends.code(backend)
        y = _ops.conv2d_input_grad(x, values, topology, shape, size, strides, paddings, dilations, last, code, record)
        if bias is not None:
            y.add_(bias.view(-1, 1, 1))
    y = y.to(dtype)
    return y.squeeze(0) if input.dim() == 3 else y


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width of a transposed convolution's output: ``(n − 1) s − 2 p + d (k − 1) + output_padding + 1``.

    Raises:
        ValueError: an output padding that reaches both stride and dilation, no output position, or 2³¹ and more.

    >>> output_size((4, 4), (4, 4), (2, 2), (1, 1), (0, 0), (1, 1))
    [8, 8]
    """
    for extra, step, spread in zip(output_padding, stride, dilation, strict=True):
        if extra >= max(step, spread):
            raise ValueError(
                f"output_padding must be smaller than stride or dilation, got {tuple(output_padding)} with "
                f"stride={tuple(stride)}, dilation={tuple(dilation)}"
            )
    # While torch.jit.trace runs, sizes are tensors, which no list of ints may hold.
    size = [int(n) if isinstance(n, Tensor) else n for n in size]
    found = [
        (size[i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + output_padding[i] + 1
        for i in range(len(size))
    ]
    if min(size) < 1 or min(found) < 1:
        raise ValueError(
            f"input must be large enough for an output of at least one position, got {size[0]}x{size[1]}, which with "
            f"kernel={tuple(kernel)}, stride={tuple(stride)} and padding={tuple(padding)} makes {found[0]}x{found[1]}"
        )
    if found[0] * found[1] > MAX_INT:
        raise ValueError(
            f"stride, dilation and kernel must not make 2**31 positions and more, got {found[0]}x{found[1]}"
        )
    return found


def conv_transpose2d_of_pixels(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: Sequence[int],
    *,
    channels_last: bool = False,
    backend: str = "auto",
    record: int = 0,
) -> Tensor:
    """``y[n, o, t] = bias[o] + Σ_{active blocks} Σ_c W[c, o, t] · x[n, c]``: :func:`conv_transpose2d` of 1×1 images.

    Without padding and dilation that is a matrix product, which runs as that of a linear layer.

    Args:
        input: ``[N, C_in, 1, 1]``. values, bias, weight_shape, backend, record: as there.
        topology: of the weight as a matrix: the block mask ``[R, C, kH, kW]`` read as ``[R, C · kH · kW]``.
        channels_last: memory format of the output.

    Returns:
        ``[N, C_out, kH, kW]``.

    >>> from ddst.topology import build_topology, pack
    >>> mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    >>> weight, x = torch.randn(16, 16, 4, 4), torch.randn(2, 16, 1, 1)
    >>> y = conv_transpose2d_of_pixels(
    ...     x, pack(weight, mask, (16, 16)), None, build_topology(mask.flatten(1)), weight.shape
    ... )
    >>> torch.allclose(y, torch.nn.functional.conv_transpose2d(x, weight), atol=1e-4)
    True
    """
    check_operands(input, values, bias, topology)
    if len(check_weight_shape("weight_shape", weight_shape)) != 4:
        raise ValueError(f"weight_shape must be (C_in, C_out, kH, kW), got {tuple(weight_shape)}")
    if input.dim() != 4 or tuple(input.shape[1:]) != (weight_shape[0], 1, 1):
        raise ValueError(f"input must be [N, {weight_shape[0]}, 1, 1], got the shape {tuple(input.shape)}")
    _check_bias(bias, weight_shape[1])
    dtype, (x, values, bias) = in_compute_dtype(input, values, bias)
    matrix = x.flatten(1)
    if not x.is_meta:
        backends.choose(backend, backends.Problem.of(matrix, values, linear=True))
    width = values.shape[2]
    taps = weight_shape[2] * weight_shape[3]
    shape = [weight_shape[0], -(-weight_shape[1] // width) * taps * width]
    y = _ops.linear_input_grad(matrix, values, topology, shape, backends.code(backend), record)
    y = as_images(y, weight_shape, width, channels_last)
    if bias is not None:
        y = y + bias.view(-1, 1, 1)
    return y.to(dtype)


def as_images(rows: Tensor, weight_shape: Sequence[int], width: int, channels_last: bool = False) -> Tensor:
    """``[N, C_out, kH, kW]`` of rows ``[N, C · kH · kW · b_out]`` in the order (block, tap, channel in the block)."""
    _, channels, height, wide = weight_shape
    if channels_last:  # in one copy
        blocks = rows.view(rows.shape[0], -(-channels // width), height, wide, width)
        images = blocks.permute(0, 2, 3, 1, 4).flatten(3)[..., :channels].permute(0, 3, 1, 2)
        return images.contiguous(memory_format=torch.channels_last)
    return from_block_order(rows, channels, height * wide, width).unflatten(-1, (height, wide)).contiguous()


def _check_bias(bias: Tensor | None, channels: int) -> None:
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias must have the shape ({channels},), got {tuple(bias.shape)}")
