"""Views of packed weights: dimensions in another order, merged, split, added or turned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .functions import known
from .weight import BATCH, PackedWeight, regroup, taps_of, wrapped, wrapped_all


def _one_list(given: tuple[Any, ...], named: Any) -> list[Any]:
    """Sizes or dimensions, which torch takes one by one, in a list, or by name."""
    if named is not None:
        given = (named,)
    return list(given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given)


def _reshaped(weight: PackedWeight, shape: Sequence[int]) -> PackedWeight | None:
    sizes = list(shape)
    if sizes.count(-1) == 1:
        rest = -math.prod(sizes)
        sizes[sizes.index(-1)] = weight.numel() // rest if rest else 0
    parts = [(atom, weight.length(atom)) for axis in weight.axes for atom in axis]
    axes = regroup(parts, sizes)
    return None if axes is None else weight.with_axes(axes)


@known("view", "reshape")
def _view(input: Any, *shape: Any, **kwargs: Any) -> PackedWeight | None:
    sizes = kwargs.get("shape", kwargs.get("size", shape))
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = sizes[0]
    if not isinstance(input, PackedWeight) or any(isinstance(size, torch.dtype) for size in sizes):
        return None
    return _reshaped(input, sizes)


@known("view_as", "reshape_as")
def _view_as(input: Any, other: Any) -> PackedWeight | None:
    return _reshaped(input, other.shape) if isinstance(input, PackedWeight) else None


@known("flatten")
def _flatten(input: PackedWeight, start_dim: int = 0, end_dim: int = -1) -> PackedWeight | None:
    axes = list(input.axes)
    start, end = wrapped(start_dim, len(axes)), wrapped(end_dim, len(axes))
    if not axes or start > end:
        return None
    merged = tuple(atom for axis in axes[start : end + 1] for atom in axis)
    return input.with_axes((*axes[:start], merged, *axes[end + 1 :]))


@known("unsqueeze")
def _unsqueeze(input: PackedWeight, dim: int) -> PackedWeight:
    at = wrapped(dim, len(input.axes) + 1)
    return input.with_axes((*input.axes[:at], (), *input.axes[at:]))


@known("squeeze")
def _squeeze(input: PackedWeight, dim: Any = None) -> PackedWeight | None:
    shape = input.shape
    asked = range(len(shape)) if dim is None else wrapped_all(dim, len(shape))
    return _without(input, [i for i in asked if shape[i] == 1])


def _without(weight: PackedWeight, dims: Sequence[int]) -> PackedWeight | None:
    """The weight without some dimensions of size 1: rows, columns or taps of length 1 join a dimension beside."""
    axes: list[tuple[str, ...]] = []
    waiting: tuple[str, ...] = ()
    for i, axis in enumerate(weight.axes):
        if i not in dims:
            axes.append((*waiting, *axis))
            waiting = ()
        elif axes:
            axes[-1] = (*axes[-1], *axis)
        else:
            waiting = (*waiting, *axis)
    return None if waiting else weight.with_axes(tuple(axes))


def _permuted(weight: PackedWeight, dims: Sequence[int]) -> PackedWeight | None:
    order = [wrapped(d, len(weight.axes)) for d in dims]
    if sorted(order) != list(range(len(weight.axes))):
        return None
    return weight.with_axes(tuple(weight.axes[d] for d in order))


@known("permute")
def _permute(input: PackedWeight, *dims: Any, **kwargs: Any) -> PackedWeight | None:
    return _permuted(input, _one_list(dims, kwargs.get("dims")))


@known("transpose", "swapaxes", "swapdims")
def _transpose(input: PackedWeight, dim0: int, dim1: int) -> PackedWeight | None:
    order = list(range(len(input.axes)))
    a, b = wrapped(dim0, len(order)), wrapped(dim1, len(order))
    order[a], order[b] = b, a
    return _permuted(input, order)


@known("t")
def _t(input: PackedWeight) -> PackedWeight | None:
    return _permuted(input, (1, 0)) if len(input.axes) == 2 else None


@known("contiguous", "conj", "resolve_conj")
def _same(input: PackedWeight, **kwargs: Any) -> PackedWeight:
    return input


@known("expand")
def _expand(input: Any, *sizes: Any, **kwargs: Any) -> PackedWeight | None:
    return _expanded(input, _one_list(sizes, kwargs.get("size"))) if isinstance(input, PackedWeight) else None


def _expanded(input: PackedWeight, wanted: list[Any]) -> PackedWeight | None:
    new = len(wanted) - len(input.axes)
    if new < 0:
        return None
    axes, shape, batch = [()] * new + list(input.axes), [1] * new + list(input.shape), input.batch
    for i, size in enumerate(wanted):
        if size == shape[i] or (size == -1 and i >= new):
            continue
        if size < 1 or axes[i] or batch is not None:
            return None
        batch, axes[i] = size, (BATCH,)
    if batch == input.batch:
        return input.with_axes(tuple(axes))
    return input.with_scales(tuple(axes), batch, input.out_scale, input.in_scale)


@known("expand_as")
def _expand_as(input: Any, other: Any) -> Tensor | PackedWeight | None:
    if not isinstance(input, PackedWeight):
        expanded: Tensor = input.expand(other.shape)
        return expanded
    return _expanded(input, list(other.shape))


@known("repeat")
def _repeat(input: PackedWeight, *repeats: Any, **kwargs: Any) -> PackedWeight | None:
    times = _one_list(repeats, kwargs.get("repeats"))
    repeated = [i for i, count in enumerate(times) if count != 1]
    axes = [()] * (len(times) - len(input.axes)) + list(input.axes)
    if len(times) != len(axes) or len(repeated) > 1:
        return None
    if not repeated:
        return input.with_axes(tuple(axes))
    at = repeated[0]
    if input.batch is not None or times[at] < 1:
        return None
    axes[at] = (BATCH, *axes[at])
    return input.with_scales(tuple(axes), times[at], input.out_scale, input.in_scale)


@known("flip")
def _flip(input: PackedWeight, *dims: Any, **kwargs: Any) -> PackedWeight | None:
    turned = [wrapped(d, len(input.axes)) for d in _one_list(dims, kwargs.get("dims"))]
    parts = sorted(atom for d in turned for atom in input.axes[d])
    return input.with_axes(input.axes, not input.flipped) if parts == sorted(taps_of(input.layer)) else None


@known("__getitem__")
def _getitem(input: Any, index: Any) -> PackedWeight | None:
    if not isinstance(input, PackedWeight):
        return None
    steps = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(step, Tensor | PackedWeight) for step in steps) or steps.count(Ellipsis) > 1:
        return None
    if Ellipsis in steps:
        at = steps.index(Ellipsis)
        missing = len(input.axes) - sum(step is not None and step is not Ellipsis for step in steps)
        steps[at : at + 1] = [slice(None)] * missing
    axes: list[tuple[str, ...]] = []
    left, gone = list(input.axes), []
    for step in steps:
        if step is None:
            axes.append(())
        elif not left:
            return None
        elif isinstance(step, slice) and step == slice(None):
            axes.append(left.pop(0))
        elif type(step) is int and step in (0, -1) and input.shape[len(input.axes) - len(left)] == 1:
            gone.append(len(axes))
            axes.append(left.pop(0))
        else:
            return None
    return _without(input.with_axes((*axes, *left)), gone)
