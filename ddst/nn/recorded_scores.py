"""Growth scores of a layer from what the backward formulas recorded, whichever operators its weight ran on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .. import ops
from ..operator_view import from_block_order
from ..ops.gradient_record import FLIPPED, TRANSPOSED, Call, GradientRecord
from ..ops.reference import block_norms_of

if TYPE_CHECKING:
    from .base import SparseLayer


def scores_of(layer: SparseLayer, record: GradientRecord, scale: Tensor | None = None) -> Tensor:
    """``‖scale · ∂L/∂W[block]‖₂`` in the shape of the layer's block mask; ``scale`` is one of rows, or a scalar."""
    shapes = {(call, g.shape[1:], x.shape[1:]) for call, (g, x) in zip(record.calls, record.factors, strict=True)}
    if record.dense is not None or layer.groups != 1 or len(shapes) != 1:
        return block_norms_of(dense_gradient_of(layer, record, scale), layer.block)
    grads, inputs = zip(*record.factors, strict=True)
    grad_output, input = (part[0] if len(part) == 1 else torch.cat(part) for part in (grads, inputs))
    way, shape, settings = _split(record.calls[0])
    if scale is not None:  # rows are the channels of the first factor, in a transposed weight of the second
        if way & TRANSPOSED:
            input = input * over_rows(scale, 1, input)
        else:
            grad_output = grad_output * over_rows(scale, 1, grad_output)
    block = layer.block[::-1] if way & TRANSPOSED else layer.block
    if settings:
        scores = ops.conv2d_block_scores(grad_output, input, shape, block, *settings, backend=layer.backend)
    else:
        scores = ops.linear_block_scores(grad_output, input, shape, block, backend=layer.backend)
    # A matrix of all taps has the blocks of the weight in the same order.
    return _turned(scores, way).reshape(layer.mask_shape)


def dense_gradient_of(layer: SparseLayer, record: GradientRecord, scale: Tensor | None = None) -> Tensor:
    """The dense gradient itself, of the weight's shape; zero where nothing was recorded."""
    total = None if record.dense is None else _of_weight(layer, record.dense)
    for call, (grad_output, input) in zip(record.calls, record.factors, strict=True):
        part = _product(layer, call, grad_output, input)
        total = part if total is None else total.add_(part)
    if total is None:
        return layer.values.new_zeros(layer.weight_shape)
    return total if scale is None else total * over_rows(scale, 0, total)


def over_rows(scale: Tensor, dim: int, like: Tensor) -> Tensor:
    """``scale``, one number for each row or a scalar, in the dtype of a tensor and along one of its dimensions."""
    return scale.to(like.dtype).view([-1 if d == dim else 1 for d in range(like.dim())])


def _split(call: Call) -> tuple[int, tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """``(way the weight lies, weight shape of the operator, (stride, padding, dilation) of a convolution)``."""
    if len(call) == 3:
        return call[0], call[1:], ()
    return call[0], call[1:5], (call[5:7], call[7:9], call[9:11])


def _product(layer: SparseLayer, call: Call, grad_output: Tensor, input: Tensor) -> Tensor:
    way, shape, settings = _split(call)
    if settings:
        size = (shape[0], shape[1] // layer.groups, *shape[2:])
        stride, padding, dilation = settings
        gradient = conv2d_weight(input, size, grad_output, stride, padding, dilation, layer.groups)
        return _turned(gradient, way).reshape(layer.weight_shape)
    gradient = grad_output.t() @ input
    if len(layer.weight_shape) == 2:
        return gradient
    _, channels, *space = layer.op_shape
    gradient = from_block_order(gradient, channels, math.prod(space), layer.block[1])
    return _of_weight(layer, gradient.reshape(shape[0], channels, *space))


def _turned(weight: Tensor, way: int) -> Tensor:
    """What lay transposed or flipped in an operator, as it lies in the layer."""
    weight = weight.flip(2, 3) if way & FLIPPED else weight
    return weight.transpose(0, 1) if way & TRANSPOSED else weight


def _of_weight(layer: SparseLayer, gradient: Tensor) -> Tensor:
    """The gradient of the weight, from that of what the operators take for it (``op_shape``)."""
    if layer.groups == 1 or tuple(gradient.shape) == layer.weight_shape:
        return gradient.reshape(layer.weight_shape)
    # [g, rows of a group, g, columns of a group, …], of which the diagonal is the weight's.
    first, second, *space = layer.weight_shape
    parts = gradient.view(layer.groups, first // layer.groups, layer.groups, second, *space)
    return parts.diagonal(dim1=0, dim2=2).movedim(-1, 0).reshape(layer.weight_shape)
