"""Sums, means and norms of packed weights, and what is divided by them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import ops
from .factors import cast, raised, times
from .functions import known
from .weight import BATCH, COL, ROW, PackedWeight, wrapped_all


def _dims(weight: PackedWeight, dim: Any) -> list[int]:
    if dim is None or (isinstance(dim, tuple | list) and not dim):
        return list(range(len(weight.axes)))
    return sorted(wrapped_all(dim, len(weight.axes)))


def _summed(weight: PackedWeight, dim: Any, keepdim: bool) -> Tensor | None:
    """The sum over some dimensions, if what is left is rows, columns, rows of a batch, or nothing."""
    dims = _dims(weight, dim)
    left = [atom for i, axis in enumerate(weight.axes) if i not in dims for atom in axis]
    sizes = [1 if i in dims else size for i, size in enumerate(weight.shape) if keepdim or i not in dims]
    total = _sum_left(weight, left)
    return None if total is None else total.reshape(sizes)


def _sum_left(weight: PackedWeight, left: list[str]) -> Tensor | None:
    if weight.batch is not None:
        return _sum_of_batch(weight) if left == [BATCH, ROW] else None
    left = [atom for atom in left if weight.length(atom) != 1]
    if not left:
        return weight.layer.within(weight.values).sum()
    if left not in ([ROW], [COL]):
        return None
    return weight.layer.sums(weight.values, int(left == [COL]))


def _sum_of_batch(weight: PackedWeight) -> Tensor | None:
    """``out_scale[n, o] · Σ_{i, t} W[o, i, t] · in_scale[n, i]``: the weight on an image of its kernel's size."""
    layer = weight.layer
    if weight.in_scale is None:
        rows = _sum_left(weight.with_scales(weight.axes, None, None, None), [ROW])
        assert rows is not None and weight.batch is not None
        rows = rows.reshape(1, -1).expand(weight.batch, -1)
        return rows if weight.out_scale is None else rows * weight.out_scale
    if layer.groups != 1 or layer.backend == "reference":
        return None
    topology, shape = layer.topology_as()
    x, values = weight.in_scale.to(weight.dtype), layer.within(weight.values)
    # A sum keeps its dtype where a convolution would be computed in a narrower one.
    with torch.autocast(x.device.type, enabled=False):
        if len(shape) == 4:
            x = x[:, :, None, None].expand(-1, -1, *shape[2:])
            total = ops.conv2d(x, values, None, topology, shape, backend=layer.backend).flatten(1)
        else:
            total = ops.linear(x, values, None, topology, shape, backend=layer.backend)
    return total if weight.out_scale is None else total * weight.out_scale


@known("sum")
def _sum(input: PackedWeight, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor | None:
    return _summed(input if dtype is None else cast(input, dtype), dim, keepdim)


@known("mean")
def _mean(input: PackedWeight, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor | None:
    total = _summed(input if dtype is None else cast(input, dtype), dim, keepdim)
    return None if total is None else total / math.prod([input.shape[d] for d in _dims(input, dim)])


def _euclidean(weight: PackedWeight, dim: Any, keepdim: bool) -> Tensor | None:
    """The L2 norm, whose gradient at 0 is 0, as torch's; squares of 16-bit weights are float32, as torch's."""
    wide = cast(weight, torch.float32) if weight.dtype.itemsize < 4 else weight
    total = _summed(raised(wide, 2), dim, keepdim)
    if total is None:
        return None
    positive = total > 0
    return torch.where(positive, torch.where(positive, total, 1.0).sqrt(), 0.0).to(weight.dtype)


@known("norm")
def _norm(
    input: PackedWeight, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None
) -> Tensor | None:
    matrices = isinstance(dim, tuple | list) and len(dim) > 2  # of which torch has a 2-norm and no Frobenius norm
    if p not in ("fro", 2, None) or (matrices and p != 2) or out is not None:
        return None
    return _euclidean(input if dtype is None else cast(input, dtype), dim, keepdim)


@known("linalg_norm")
def _linalg_norm(
    input: PackedWeight, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor | None:
    if ord is not None or (isinstance(dim, tuple | list) and len(dim) > 2):
        return None
    return _euclidean(input if dtype is None else cast(input, dtype), dim, keepdim)


@known("linalg_vector_norm", "vector_norm")
def _vector_norm(
    x: Any = None, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, input: Any = None
) -> Tensor | None:
    weight = input if x is None else x
    wide = weight.dtype if dtype is None else dtype
    if ord != 2 or torch.promote_types(weight.dtype, wide) != wide:  # which torch refuses
        return None
    return _euclidean(cast(weight, wide), dim, keepdim)


@known("normalize")
def _normalize(input: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> PackedWeight | None:
    if not isinstance(input, PackedWeight) or p != 2 or out is not None:
        return None
    norm = _euclidean(input, dim, keepdim=True)
    return None if norm is None else times(input, norm.clamp_min(eps), divide=True)


@known("_weight_norm")
def _weight_norm(v: Any, g: Any, dim: int = 0) -> PackedWeight | None:
    if not isinstance(v, PackedWeight) or isinstance(g, PackedWeight):
        return None
    others = None if dim == -1 else [d for d in range(len(v.axes)) if d != dim]
    norm = _euclidean(v, others, keepdim=dim != -1)
    # A row without blocks has the norm 0, and nothing to divide.
    return None if norm is None else times(v, g / torch.where(norm > 0, norm, 1.0), divide=False)
