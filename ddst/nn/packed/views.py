"""Views of packed weights: dimensions in another order, merged, split, added or turned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .functions import known
from .weight import BATCH, PackedWeight, regroup, taps_of


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
def _flatten(input: PackedWeight, start_dim: int = 0, end_dim: int = -1) -> PackedWeight:
    axes = list(input.axes)
    start, end = start_dim % len(axes), end_dim % len(axes)
    merged = tuple(atom for axis in axes[start : end + 1] for atom in axis)
    return input.with_axes((*axes[:start], merged, *axes[end + 1 :]))


@known("unsqueeze")
def _unsqueeze(input: PackedWeight, dim: int) -> PackedWeight:
    at = dim % (len(input.axes) + 1)
    return input.with_axes((*input.axes[:at], (), *input.axes[at:]))


@known("squeeze")
def _squeeze(input: PackedWeight, dim: int | None = None) -> PackedWeight | None:
    gone = [i for i, axis in enumerate(input.axes) if not axis]
    ones = [i for i, size in enumerate(input.shape) if size == 1]
    wanted = ones if dim is None else [i for i in ones if i == dim % len(input.axes)]
    if any(i not in gone for i in wanted):
        return None
    return input.with_axes(tuple(axis for i, axis in enumerate(input.axes) if i not in wanted))


def _permuted(weight: PackedWeight, dims: Sequence[int]) -> PackedWeight:
    return weight.with_axes(tuple(weight.axes[d] for d in dims))


@known("permute")
def _permute(input: PackedWeight, *dims: Any, **kwargs: Any) -> PackedWeight:
    order = kwargs.get("dims", dims[0] if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims)
    return _permuted(input, order)


@known("transpose", "swapaxes", "swapdims")
def _transpose(input: PackedWeight, dim0: int, dim1: int) -> PackedWeight:
    order = list(range(len(input.axes)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permuted(input, order)


@known("t")
def _t(input: PackedWeight) -> PackedWeight | None:
    return _permuted(input, (1, 0)) if len(input.axes) == 2 else None


@known("contiguous", "conj", "resolve_conj")
def _same(input: PackedWeight, **kwargs: Any) -> PackedWeight:
    return input


@known("expand", "repeat")
def _expand(input: Any, *sizes: Any, **kwargs: Any) -> PackedWeight | None:
    if not isinstance(input, PackedWeight) or kwargs:
        return None
    wanted = list(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes)
    axes = [()] * (len(wanted) - len(input.axes)) + list(input.axes)
    batch = input.batch
    for i, size in enumerate(wanted):
        if size in (-1, 1) or (axes[i] and size == math.prod([input.length(atom) for atom in axes[i]])):
            continue
        if axes[i] or batch is not None:
            return None
        batch, axes[i] = size, (BATCH,)
    if batch == input.batch:
        return input.with_axes(tuple(axes))
    return input.with_scales(tuple(axes), batch, input.out_scale, input.in_scale)


@known("flip")
def _flip(input: PackedWeight, *dims: Any) -> PackedWeight | None:
    turned = list(dims[0] if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims)
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
    left = list(input.axes)
    for step in steps:
        if step is None:
            axes.append(())
        elif not left:
            return None
        elif isinstance(step, slice) and step == slice(None):
            axes.append(left.pop(0))
        elif isinstance(step, int) and step in (0, -1) and not left[0]:
            left.pop(0)
        else:
            return None
    return input.with_axes((*axes, *left))
