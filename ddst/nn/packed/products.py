"""Convolutions and linear functions of packed weights, on the block-sparse operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...operator_view import from_block_order, to_block_order
from .functions import known
from .weight import BATCH, COL, ROW, Axes, PackedWeight, taps_of


def _scale(weight: PackedWeight, atom: str) -> Tensor | None:
    return weight.out_scale if atom == ROW else weight.in_scale


def _channels(weight: PackedWeight, groups: int, space: int) -> tuple[str, str] | None:
    """What the first two dimensions run over where the weight is that of a convolution with so many groups."""
    taps = taps_of(weight.layer)
    if len(taps) != space or weight.layer.backend == "reference":
        return None
    batch = () if weight.batch is None else (BATCH,)
    for order in ((ROW, COL), (COL, ROW)):
        if _lies_as(weight, ((*batch, order[0]), (order[1],), *((tap,) for tap in taps))):
            break
    else:
        return None
    if weight.batch is not None:
        return order if groups == weight.batch and weight.layer.groups == 1 else None
    # Groups of columns are no groups of the stored weight.
    fits = (groups == 1 or order[0] == ROW) and weight.layer.use_groups(groups)
    return order if fits else None


def _lies_as(weight: PackedWeight, axes: Axes) -> bool:
    """Whether shape and order of the elements are those of these dimensions (one of length 1 may lie in any)."""
    return [atom for axis in weight.axes for atom in axis] == [atom for axis in axes for atom in axis] and (
        weight.shape == weight.with_axes(axes).shape
    )


def _gathered(weight: PackedWeight, transposed: bool) -> tuple[Tensor, Tensor, tuple[int, ...], int]:
    """Values, topology, weight shape and record for an operator."""
    layer = weight.layer
    topology, shape = layer.topology_as(transposed=transposed, flipped=weight.flipped)
    values = weight.values.transpose(1, 2).contiguous() if transposed else weight.values
    record = layer._record
    return values, topology, shape, record + transposed + 2 * weight.flipped if record else 0


def _per_image(weight: PackedWeight, input: Tensor, atom: str, space: int) -> Tensor | None:
    """``[1, N · C, …]`` as ``[N, C, …]``, times the factors of its channels."""
    assert weight.batch is not None
    if input.dim() != space + 2 or input.shape[0] != 1:
        return None
    x = input.reshape(weight.batch, weight.length(atom), *input.shape[2:])
    return _times_channels(x, _scale(weight, atom))


def _times_channels(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.to(x.dtype).reshape(*scale.shape, *[1] * (x.dim() - 2))


def _run_convolution(
    weight: Any, input: Any, bias: Tensor | None, groups: int, space: int, transposes: bool, run: Callable[..., Tensor]
) -> Tensor | None:
    """A convolution (or a transposed one) with a packed weight, on operators for images.

    Args:
        run: calls the operator with input, values, bias, topology, weight shape, backend and record.
    """
    if not isinstance(weight, PackedWeight) or not isinstance(input, Tensor):
        return None
    found = _channels(weight, groups, space)
    if found is None:
        return None
    source, target = found if transposes else found[::-1]
    x: Tensor | None = input
    if weight.batch is not None:
        x = _per_image(weight, input, source, space)
        if x is None:
            return None
    assert x is not None
    values, topology, shape, record = _gathered(weight, transposed=found[0] == COL)
    x = x.unsqueeze(-2) if space == 1 else x
    within = bias if weight.batch is None else None
    y = run(x, values, within, topology, shape, backend=weight.layer.backend, record=record)
    y = y.squeeze(-2) if space == 1 else y
    _note_use(weight, "conv")
    if weight.batch is None:
        return y
    y = _times_channels(y, _scale(weight, target))
    if bias is not None:
        y = y + bias.to(y.dtype).view(weight.batch, -1, *[1] * space)
    return y.reshape(1, -1, *y.shape[2:])


def _flat(value: Any, first: int) -> Any:
    """A setting of one dimension as that of two: what it is for the height, then its own."""
    return value if isinstance(value, str) else (first, value[0] if isinstance(value, tuple | list) else value)


@known("conv2d")
def _conv2d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor | None:
    def run(x: Tensor, values: Tensor, bias: Any, topology: Tensor, shape: Any, **how: Any) -> Tensor:
        return ops.conv2d(x, values, bias, topology, shape, stride, padding, dilation, **how)

    return _run_convolution(weight, input, bias, groups, 2, False, run)


@known("conv1d")
def _conv1d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor | None:
    def run(x: Tensor, values: Tensor, bias: Any, topology: Tensor, shape: Any, **how: Any) -> Tensor:
        settings = _flat(stride, 1), _flat(padding, 0), _flat(dilation, 1)
        return ops.conv2d(x, values, bias, topology, shape, *settings, **how)

    return _run_convolution(weight, input, bias, groups, 1, False, run)


@known("conv_transpose2d")
def _conv_transpose2d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Tensor | None:  # fmt: skip
    def run(x: Tensor, values: Tensor, bias: Any, topology: Tensor, shape: Any, **how: Any) -> Tensor:
        settings = stride, padding, output_padding, dilation
        return ops.conv_transpose2d(x, values, bias, topology, shape, *settings, **how)

    return _run_convolution(weight, input, bias, groups, 2, True, run)


@known("conv_transpose1d")
def _conv_transpose1d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Tensor | None:  # fmt: skip
    def run(x: Tensor, values: Tensor, bias: Any, topology: Tensor, shape: Any, **how: Any) -> Tensor:
        settings = _flat(stride, 1), _flat(padding, 0), _flat(output_padding, 0), _flat(dilation, 1)
        return ops.conv_transpose2d(x, values, bias, topology, shape, *settings, **how)

    return _run_convolution(weight, input, bias, groups, 1, True, run)


def _note_use(weight: PackedWeight, kind: str) -> None:
    if not torch.compiler.is_compiling():
        weight.layer.weight_uses.packed.add(kind)


def _is_matrix(weight: Any) -> int:
    """1: rows are the weight's rows; -1: its columns; 0: no packed matrix."""
    if not isinstance(weight, PackedWeight) or weight.batch is not None or len(weight.axes) != 2:
        return 0
    if weight.flipped or weight.layer.backend == "reference" or weight.layer.groups != 1:
        return 0
    columns = (COL, *taps_of(weight.layer))
    return 1 if _lies_as(weight, ((ROW,), columns)) else -1 if _lies_as(weight, (columns, (ROW,))) else 0


def _by_matrix(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b`` with the stored weight as a matrix ``[rows, columns · taps]``."""
    layer = weight.layer
    _note_use(weight, "linear")
    topology, shape = layer.topology_as(matrix=True)
    taps = math.prod(layer.weight_shape[2:])
    x = to_block_order(x, taps, layer.block[1]) if taps_of(layer) else x
    return ops.linear(x, weight.values, bias, topology, shape, backend=layer.backend, record=layer._record)


def _by_transposed(x: Tensor, weight: PackedWeight) -> Tensor:
    """``x W`` with the stored weight as a matrix."""
    layer = weight.layer
    _note_use(weight, "linear")
    topology, shape = layer.topology_as(matrix=True)
    y = ops.linear_transposed(x, weight.values, topology, shape, backend=layer.backend, record=layer._record)
    taps = math.prod(layer.weight_shape[2:])
    return from_block_order(y, layer.weight_shape[1], taps, layer.block[1]).flatten(-2) if taps_of(layer) else y


@known("linear")
def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    way = _is_matrix(weight)
    if not way or not isinstance(input, Tensor):
        return None
    if way > 0:
        return _by_matrix(input, weight, bias)
    y = _by_transposed(input, weight)
    return y if bias is None else y + bias.to(y.dtype)


@known("matmul", "__matmul__")
def _matmul(input: Any, other: Any) -> Tensor | None:
    return _product(input, other)


@known("mm")
def _mm(input: Any, mat2: Any) -> Tensor | None:
    return _product(input, mat2) if input.dim() == mat2.dim() == 2 else None


@known("mv")
def _mv(input: Any, vec: Any) -> Tensor | None:
    return _product(input, vec) if input.dim() == 2 and vec.dim() == 1 else None


def _product(left: Any, right: Any) -> Tensor | None:
    way = _is_matrix(right)
    if way and isinstance(left, Tensor):
        return _by_transposed(left, right) if way > 0 else _by_matrix(left, right)
    way = _is_matrix(left)
    if way and isinstance(right, Tensor):
        rows = right if right.dim() == 1 else right.transpose(-1, -2)
        y = _by_matrix(rows, left) if way > 0 else _by_transposed(rows, left)
        return y if right.dim() == 1 else y.transpose(-1, -2)
    return None


@known("addmm")
def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Tensor | None:
    product = _mm(mat1, mat2)
    if product is None:
        return None
    return beta * input.to(product.dtype) + alpha * product
