"""Products of packed weights with numbers and factors, powers, other dtypes: what gives another packed weight."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...topology import pack_slots
from .functions import known, on_dense
from .weight import BATCH, COL, ROW, PackedWeight, taps_of


def _spread(vector: Tensor, width: int, blocks: int, place: Tensor) -> Tensor:
    """``[slots, width]``: the entries of a vector over rows (or columns) for each slot; 1 beyond its end."""
    padded = F.pad(vector, (0, (blocks + 1) * width - vector.shape[0]), value=1.0)
    return padded.view(blocks + 1, width)[place]


def _by_rows(weight: PackedWeight, vector: Tensor) -> Tensor:
    row, _ = weight.layer.places()
    return _spread(vector, weight.layer.block[0], weight.layer.mask_shape[0], row)[:, :, None]


def _by_columns(weight: PackedWeight, vector: Tensor) -> Tensor:
    _, col = weight.layer.places()
    return _spread(vector, weight.layer.block[1], weight.layer.mask_shape[1], col)[:, None, :]


@known("mul", "__mul__", "__rmul__", "multiply")
def _mul(input: Any, other: Any, *, out: Any = None) -> PackedWeight | None:
    weight, factor = (input, other) if isinstance(input, PackedWeight) else (other, input)
    if out is not None:
        return None
    return raised(weight, 2) if _same(weight, factor) else times(weight, factor, divide=False)


def _same(weight: PackedWeight, other: Any) -> bool:
    """Whether both are one weight, read once or twice."""
    parts = ("values", "out_scale", "in_scale")
    return (
        isinstance(other, PackedWeight)
        and all(getattr(weight, part) is getattr(other, part) for part in parts)
        and (weight.axes, weight.batch, weight.flipped) == (other.axes, other.batch, other.flipped)
    )


@known("div", "__truediv__", "true_divide", "divide")
def _div(input: Any, other: Any, *, rounding_mode: Any = None, out: Any = None) -> PackedWeight | None:
    if rounding_mode is not None or out is not None or not isinstance(input, PackedWeight):
        return None
    return times(input, other, divide=True)


@known("__rtruediv__", "__rdiv__")
def _reflected_div(input: Any, other: Any) -> Any:
    # What torch.compile makes of weight / tensor.
    return times(other, input, divide=True) if isinstance(other, PackedWeight) else None


@known("__rsub__", "rsub")
def _reflected_sub(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    # Likewise of weight - tensor; torch's own function is one that it cannot trace.
    if not isinstance(other, PackedWeight) or not isinstance(input, Tensor):
        return None
    return on_dense(torch.sub, "sub", (other, input), {"alpha": alpha})


def times(weight: PackedWeight, factor: Any, divide: bool) -> PackedWeight | None:
    """``W · factor`` or ``W / factor``, packed; None where it would have another shape or entries of another kind."""
    if isinstance(factor, Real) and not isinstance(factor, int | float):  # a number of numpy's
        factor = float(factor)
    if isinstance(factor, int | float) or (isinstance(factor, Tensor) and factor.dim() == 0):
        return weight.with_values(_scaled(weight.values, factor, divide))
    if not isinstance(factor, Tensor) or factor.is_complex():
        return None
    dims = max(factor.dim(), len(weight.axes))
    axes: list[tuple[str, ...]] = [()] * (dims - len(weight.axes)) + list(weight.axes)
    sizes = [1] * (dims - factor.dim()) + list(factor.shape)
    batch, along = weight.batch, []
    for i, size in enumerate(sizes):
        if size == 1:
            continue
        if not axes[i] and batch is None:
            batch, axes[i] = size, (BATCH,)
        along.append(i)
    view = weight.with_axes(tuple(axes))
    view.batch = batch
    if any(view.shape[i] != sizes[i] for i in along):
        return None
    parts = [atom for i in along for atom in axes[i]]
    f = factor.reshape([view.length(atom) for atom in parts])
    if not parts or BATCH not in parts:
        values = _scaled_by(view, parts, f, divide)
        return None if values is None else view.with_values(values)
    if len(parts) > 2 or any(atom not in (BATCH, ROW, COL) for atom in parts):
        return None
    dtype = torch.promote_types(view.dtype, f.dtype)
    view, f = cast(view, dtype), f.to(dtype)
    f = f if parts[0] == BATCH else f.transpose(0, 1)
    kind = next((atom for atom in parts if atom != BATCH), ROW)
    f = f.reshape(view.length(BATCH), -1)
    if parts == [BATCH]:  # one number for each image
        f = f.expand(-1, view.length(ROW))
    old = view.out_scale if kind == ROW else view.in_scale
    new = (1.0 / f if divide else f) if old is None else _scaled(old, f, divide)
    out_scale, in_scale = (new, view.in_scale) if kind == ROW else (view.out_scale, new)
    return view.with_scales(view.axes, view.batch, out_scale, in_scale)


def _scaled(values: Tensor, factor: Any, divide: bool) -> Tensor:
    return values / factor if divide else values * factor


def _scaled_by(weight: PackedWeight, parts: list[str], factor: Tensor, divide: bool) -> Tensor | None:
    """The values times a factor over some parts of the dimensions."""
    if not parts:
        return _scaled(weight.values, factor.reshape(1), divide)
    if parts == [ROW]:
        return _scaled(weight.values, _by_rows(weight, factor), divide)
    if parts == [COL]:
        return _scaled(weight.values, _by_columns(weight, factor), divide)
    # Any other: entry by entry. Its inactive blocks are not looked at.
    layer = weight.layer
    atoms = [ROW, COL, *taps_of(layer)]
    f = factor.to(torch.promote_types(weight.dtype, factor.dtype)).permute(
        [parts.index(atom) for atom in atoms if atom in parts]
    )
    f = f.reshape([weight.length(atom) if atom in parts else 1 for atom in atoms]).expand(layer.weight_shape)
    f = f.flip(list(range(2, f.dim()))) if weight.flipped else f
    f = 1.0 / f if divide else f
    return weight.values * pack_slots(f, layer.slot_blocks, layer.block)


@known("neg", "negative", "__neg__")
def _neg(input: PackedWeight) -> PackedWeight:
    return input.with_values(-input.values)


@known("square")
def _square(input: PackedWeight) -> PackedWeight:
    return raised(input, 2)


@known("pow", "__pow__")
def _pow(input: Any, exponent: Any) -> PackedWeight | None:
    # Others have no derivative at the zeros of free slots, first or second.
    if isinstance(input, PackedWeight) and isinstance(exponent, int | float) and (exponent == 1 or exponent >= 2):
        return raised(input, exponent)
    return None


@known("abs", "absolute", "__abs__")
def _abs(input: PackedWeight) -> PackedWeight:
    scales = [None if s is None else s.abs() for s in (input.out_scale, input.in_scale)]
    return input.with_scales_and(input.values.abs(), *scales)


def raised(weight: PackedWeight, exponent: float) -> PackedWeight:
    scales = [None if s is None else s.pow(exponent) for s in (weight.out_scale, weight.in_scale)]
    return weight.with_scales_and(weight.values.pow(exponent), *scales)


def cast(weight: PackedWeight, dtype: torch.dtype) -> PackedWeight:
    if dtype == weight.dtype:
        return weight
    scales = [None if s is None else s.to(dtype) for s in (weight.out_scale, weight.in_scale)]
    return weight.with_scales_and(weight.values.to(dtype), *scales)


@known("to")
def _to(input: Any, *args: Any, **kwargs: Any) -> PackedWeight | None:
    if not isinstance(input, PackedWeight):
        return None
    given = [*args, *(kwargs[key] for key in ("device", "dtype", "other") if kwargs.get(key) is not None)]
    dtype = input.dtype
    for value in given:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, Tensor | PackedWeight):
            dtype = value.dtype
            if value.device != input.device:
                return None
        elif isinstance(value, str | torch.device) or (type(value) is int and value is args[0]):
            device = torch.device(value)
            if device.type != input.device.type or device.index not in (None, input.device.index):
                return None
    return cast(input, dtype) if dtype.is_floating_point else None


@known("type")
def _type(input: Any, dtype: Any = None, non_blocking: bool = False) -> PackedWeight | None:
    fits = isinstance(input, PackedWeight) and isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return cast(input, dtype) if fits else None


@known("type_as")
def _type_as(input: Any, other: Any) -> PackedWeight | None:
    return _to(input, other)


@known("float")
def _float(input: PackedWeight, **kwargs: Any) -> PackedWeight:
    return cast(input, torch.float32)


@known("double")
def _double(input: PackedWeight, **kwargs: Any) -> PackedWeight:
    return cast(input, torch.float64)


@known("half")
def _half(input: PackedWeight, **kwargs: Any) -> PackedWeight:
    return cast(input, torch.float16)


@known("bfloat16")
def _bfloat16(input: PackedWeight, **kwargs: Any) -> PackedWeight:
    return cast(input, torch.bfloat16)
