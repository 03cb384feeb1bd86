"""What torch's functions do with a :class:`~ddst.nn.packed_weight.PackedWeight`.

Each function of the table has the signature of torch's function of its name, and returns None where it cannot keep the
weight packed: then the function itself runs on the dense weight. Convolutions and linear functions run on the
block-sparse operators; factors, powers, norms and views give another packed weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..topology import grid, inside_slots, pack_slots, split_topology
from .dense_view import DenseView
from .packed_weight import BATCH, COL, ROW, PackedWeight, calling_place, regroup, taps_of

Known = Callable[..., Any]

_KNOWN: dict[str, Known] = {}

#: Asked of a weight without looking at its entries.
_HARMLESS = {"requires_grad_", "retain_grad_", "register_hook", "is_shared_", "share_memory_", "clone", "__format__"}


def known(*names: str) -> Callable[[Known], Known]:
    """Puts a function into the table under torch's names."""

    def register(function: Known) -> Known:
        for name in names:
            _KNOWN[name] = function
        return function

    return register


def apply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls one of torch's functions, some arguments of which are packed weights."""
    name = getattr(func, "__name__", "")
    if torch.compiler.is_compiling():
        args = _turned_back(func, args)
    else:
        for value in (*args, *kwargs.values()):
            if isinstance(value, PackedWeight):
                value.check_current()
    function = _KNOWN.get(name)
    if function is not None:
        result = function(*args, **kwargs)
        if result is not None:
            return result
    return _on_dense(func, name, args, kwargs)


def _turned_back(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # torch.compile turns w @ x into a call with (x, w), which is not to be told from x @ w where both could be meant.
    if func not in (Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__) or len(args) != 2:
        return args
    x, w = args
    if not isinstance(w, PackedWeight) or not isinstance(x, Tensor) or x.dim() == 0 or w.dim() < 2:
        return args
    rows = x.shape[-2] if x.dim() > 1 else x.shape[-1]
    if w.shape[-1] != rows:
        return args
    if x.shape[-1] != w.shape[-2]:
        return w, x
    raise RuntimeError(
        "torch.compile does not tell x @ weight from weight @ x for a packed weight of this shape: write "
        "torch.nn.functional.linear(x, weight) or torch.matmul(x, weight)"
    )


# --- on the dense weight ----------------------------------------------------------------------------------------------


def _on_dense(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling():
        return func(*_dense_in(args, {}), **_dense_in(kwargs, {}))
    initialises = getattr(func, "__module__", "") == "torch.nn.init"
    first = kwargs.get("tensor") if initialises else args[0] if args else None
    target = kwargs.get("out", first)
    ends_in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    writes = isinstance(target, PackedWeight) and (
        initialises or "out" in kwargs or (ends_in_place and name not in _HARMLESS)
    )
    if writes and not (target.bound and target.canonical):  # type: ignore[union-attr]
        raise RuntimeError(
            f"{name} would write into a product or view of a packed weight, which has no memory of its own: write into "
            "the layer's weight itself, or into weight.unpacked()"
        )
    if not writes and name not in _HARMLESS:
        for weight in _packed_in((*args, *kwargs.values())):
            weight.layer.weight_uses.dense.add(f"{name or func} at {calling_place()}")
    handed: dict[int, Any] = {}
    result = func(*_dense_in(args, handed), **{key: _dense_in(value, handed) for key, value in kwargs.items()})
    return target if writes and isinstance(result, DenseView) else result


def _packed_in(value: Any) -> list[PackedWeight]:
    if isinstance(value, PackedWeight):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [weight for item in items for weight in _packed_in(item)]


def _dense_in(value: Any, handed: dict[int, Any]) -> Any:
    """The value with dense weights in place of packed ones, the same one for the same."""
    if isinstance(value, PackedWeight):
        if id(value) not in handed:
            handed[id(value)] = value.dense()
        return handed[id(value)]
    if isinstance(value, list | tuple):
        items = [_dense_in(item, handed) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: _dense_in(item, handed) for key, item in value.items()}
    return value


@known("clone")
def _clone(input: PackedWeight, *, memory_format: Any = None) -> Tensor:
    return input.unpacked().clone()


@known("requires_grad_")
def _requires_grad(input: PackedWeight, requires_grad: bool = True) -> PackedWeight:
    if not input.bound or input.values is not input.layer.values:
        raise TypeError(
            "a packed weight is no tensor of its own that could be given requires_grad or become a Parameter: use "
            "weight.unpacked() or layer.dense_weight()"
        )
    input.layer.values.requires_grad_(requires_grad)
    return input


# --- convolutions -----------------------------------------------------------------------------------------------------


def _scale(weight: PackedWeight, atom: str) -> Tensor | None:
    return weight.out_scale if atom == ROW else weight.in_scale


def _channels(weight: PackedWeight, groups: int, space: int) -> tuple[str, str] | None:
    """What the first two dimensions run over where the weight is that of a convolution with so many groups."""
    taps = taps_of(weight.layer)
    if len(taps) != space or weight.axes[2:] != tuple((tap,) for tap in taps) or weight.layer.backend == "reference":
        return None
    first, second = weight.axes[0], weight.axes[1]
    if weight.batch is not None:
        if groups != weight.batch or first[:1] != (BATCH,) or weight.layer.groups != 1:
            return None
        first = first[1:]
    elif not weight.layer.use_groups(groups):
        return None
    if (first, second) in (((ROW,), (COL,)), ((COL,), (ROW,))):
        return first[0], second[0]
    return None


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
        y = y + bias.view(weight.batch, -1, *[1] * space)
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


# --- linear functions -------------------------------------------------------------------------------------------------


def _is_matrix(weight: Any) -> int:
    """1: rows are the weight's rows; -1: its columns; 0: no packed matrix."""
    if not isinstance(weight, PackedWeight) or weight.batch is not None or len(weight.axes) != 2:
        return 0
    if weight.flipped or weight.layer.backend == "reference" or weight.layer.groups != 1:
        return 0
    columns = (COL, *taps_of(weight.layer))
    return {((ROW,), columns): 1, (columns, (ROW,)): -1}.get((weight.axes[0], weight.axes[1]), 0)


def _by_matrix(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b`` with the stored weight as a matrix ``[rows, columns · taps]``."""
    layer = weight.layer
    _note_use(weight, "linear")
    topology, shape = layer.topology_as(matrix=True)
    x = _to_packed_columns(x, weight) if len(layer.weight_shape) > 2 else x
    return ops.linear(x, weight.values, bias, topology, shape, backend=layer.backend, record=layer._record)


def _by_transposed(x: Tensor, weight: PackedWeight) -> Tensor:
    """``x W`` with the stored weight as a matrix."""
    layer = weight.layer
    _note_use(weight, "linear")
    topology, shape = layer.topology_as(matrix=True)
    y = ops.linear_transposed(x, weight.values, topology, shape, backend=layer.backend, record=layer._record)
    return _from_packed_columns(y, weight) if len(layer.weight_shape) > 2 else y


def _to_packed_columns(x: Tensor, weight: PackedWeight) -> Tensor:
    """Columns (channel, tap) in the order of the blocks: (input block, tap, channel within the block)."""
    _, cols, taps = grid(weight.layer.weight_shape, weight.layer.block)
    width = weight.layer.block[1]
    x = x.reshape(*x.shape[:-1], weight.layer.weight_shape[1], taps)
    x = F.pad(x, (0, 0, 0, cols * width - x.shape[-2]))
    return x.reshape(*x.shape[:-2], cols, width, taps).transpose(-1, -2).reshape(*x.shape[:-2], cols * width * taps)


def _from_packed_columns(y: Tensor, weight: PackedWeight) -> Tensor:
    _, cols, taps = grid(weight.layer.weight_shape, weight.layer.block)
    width, channels = weight.layer.block[1], weight.layer.weight_shape[1]
    y = y.reshape(*y.shape[:-1], cols, taps, width).transpose(-1, -2).reshape(*y.shape[:-1], cols * width, taps)
    return y[..., :channels, :].reshape(*y.shape[:-2], channels * taps)


@known("linear")
def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    way = _is_matrix(weight)
    if not way or not isinstance(input, Tensor):
        return None
    if way > 0:
        return _by_matrix(input, weight, bias)
    y = _by_transposed(input, weight)
    return y if bias is None else y + bias


@known("matmul", "mm", "__matmul__", "mv")
def _matmul(input: Any, other: Any = None, *, mat2: Any = None, vec: Any = None) -> Tensor | None:
    right = mat2 if other is None else other
    return _product(input, vec if right is None else right)


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
    product = _product(mat1, mat2)
    if product is None:
        return None
    return beta * input + alpha * product


# --- factors ----------------------------------------------------------------------------------------------------------


def _places(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """Block row and block column of each slot, those of free slots one beyond the last."""
    layer = weight.layer
    rows, cols = layer.mask_shape[0], layer.mask_shape[1]
    index = split_topology(layer.topology, rows, cols * layer.groups)
    row, col = index.block_row.long(), index.block_col.long()
    return row, col if layer.groups == 1 else torch.where(row == rows, cols, col % cols)


def _spread(vector: Tensor, width: int, blocks: int, place: Tensor) -> Tensor:
    """``[slots, width]``: the entries of a vector over rows (or columns) for each slot; 1 beyond its end."""
    padded = F.pad(vector, (0, (blocks + 1) * width - vector.shape[0]), value=1.0)
    return padded.view(blocks + 1, width)[place]


def _by_rows(weight: PackedWeight, vector: Tensor) -> Tensor:
    row, _ = _places(weight)
    return _spread(vector, weight.layer.block[0], weight.layer.mask_shape[0], row)[:, :, None]


def _by_columns(weight: PackedWeight, vector: Tensor) -> Tensor:
    _, col = _places(weight)
    return _spread(vector, weight.layer.block[1], weight.layer.mask_shape[1], col)[:, None, :]


@known("mul", "__mul__", "__rmul__", "multiply")
def _mul(input: Any, other: Any, *, out: Any = None) -> PackedWeight | None:
    weight, factor = (input, other) if isinstance(input, PackedWeight) else (other, input)
    return None if out is not None else _times(weight, factor, divide=False)


@known("div", "__truediv__", "true_divide", "divide")
def _div(input: Any, other: Any, *, rounding_mode: Any = None, out: Any = None) -> PackedWeight | None:
    if rounding_mode is not None or out is not None or not isinstance(input, PackedWeight):
        return None
    return _times(input, other, divide=True)


@known("__rtruediv__", "__rdiv__")
def _reflected_div(input: Any, other: Any) -> Any:
    # What torch.compile makes of weight / tensor.
    return _times(other, input, divide=True) if isinstance(other, PackedWeight) else None


@known("__rsub__", "rsub")
def _reflected_sub(input: Any, other: Any) -> Any:
    # Likewise of weight - tensor; torch's own function is one that it cannot trace.
    return other.unpacked() - input if isinstance(other, PackedWeight) and isinstance(input, Tensor) else None


def _times(weight: PackedWeight, factor: Any, divide: bool) -> PackedWeight | None:
    """``W · factor`` or ``W / factor``, packed; None where it would have another shape or entries of another kind."""
    if isinstance(factor, int | float) or (isinstance(factor, Tensor) and factor.dim() == 0):
        return weight.with_values(_scaled(weight.values, factor, divide))
    if not isinstance(factor, Tensor):
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
        return None if values is None else view.with_scales_and(values)
    if len(parts) > 2 or any(atom not in (BATCH, ROW, COL) for atom in parts):
        return None
    f = f if parts[0] == BATCH else f.transpose(0, 1)
    kind = next((atom for atom in parts if atom != BATCH), ROW)
    f = f.reshape(view.length(BATCH), -1)
    if f.shape[1] == 1:  # one number for each image
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
        return _scaled(weight.values, factor, divide)
    if parts == [ROW]:
        return _scaled(weight.values, _by_rows(weight, factor), divide)
    if parts == [COL]:
        return _scaled(weight.values, _by_columns(weight, factor), divide)
    # Any other: entry by entry. Its inactive blocks are not looked at.
    layer = weight.layer
    atoms = [ROW, COL, *taps_of(layer)]
    f = factor.permute([parts.index(atom) for atom in atoms if atom in parts])
    f = f.reshape([weight.length(atom) if atom in parts else 1 for atom in atoms]).expand(layer.weight_shape)
    f = f.flip(list(range(2, f.dim()))) if weight.flipped else f
    f = 1.0 / f if divide else f
    return weight.values * pack_slots(f, layer.slot_blocks, layer.block)


@known("neg", "negative", "__neg__")
def _neg(input: PackedWeight) -> PackedWeight:
    return input.with_values(-input.values)


@known("square")
def _square(input: PackedWeight) -> PackedWeight:
    return _raised(input, 2)


@known("pow", "__pow__", "float_power")
def _pow(input: Any, exponent: Any) -> PackedWeight | None:
    if not isinstance(input, PackedWeight) or not isinstance(exponent, int | float) or exponent <= 0:
        return None
    return _raised(input, exponent)


@known("abs", "absolute", "__abs__")
def _abs(input: PackedWeight) -> PackedWeight:
    scales = [None if s is None else s.abs() for s in (input.out_scale, input.in_scale)]
    return input.with_scales_and(input.values.abs(), *scales)


def _raised(weight: PackedWeight, exponent: float) -> PackedWeight:
    scales = [None if s is None else s.pow(exponent) for s in (weight.out_scale, weight.in_scale)]
    return weight.with_scales_and(weight.values.pow(exponent), *scales)


def _cast(weight: PackedWeight, dtype: torch.dtype) -> PackedWeight:
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
        elif isinstance(value, str | torch.device):
            device = torch.device(value)
            if device.type != input.device.type or device.index not in (None, input.device.index):
                return None
    return _cast(input, dtype) if dtype.is_floating_point else None


@known("type")
def _type(input: Any, dtype: Any = None, non_blocking: bool = False) -> PackedWeight | None:
    fits = isinstance(input, PackedWeight) and isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return _cast(input, dtype) if fits else None


@known("type_as")
def _type_as(input: Any, other: Any) -> PackedWeight | None:
    return _to(input, other)


@known("float")
def _float(input: PackedWeight, **kwargs: Any) -> PackedWeight:
    return _cast(input, torch.float32)


@known("double")
def _double(input: PackedWeight, **kwargs: Any) -> PackedWeight:
    return _cast(input, torch.float64)


@known("half")
def _half(input: PackedWeight, **kwargs: Any) -> PackedWeight:
    return _cast(input, torch.float16)


@known("bfloat16")
def _bfloat16(input: PackedWeight, **kwargs: Any) -> PackedWeight:
    return _cast(input, torch.bfloat16)


# --- sums and norms ---------------------------------------------------------------------------------------------------


def _clean(weight: PackedWeight) -> Tensor:
    """The values without what edge blocks hold beyond the weight."""
    layer = weight.layer
    if all(size % width == 0 for size, width in zip(layer.weight_shape, layer.block, strict=False)):
        return weight.values
    inside = inside_slots(layer.slot_blocks, layer.weight_shape, layer.block)
    return weight.values * inside.to(weight.values.device)


def _dims(weight: PackedWeight, dim: Any) -> list[int]:
    if dim is None or (isinstance(dim, tuple | list) and not dim):
        return list(range(len(weight.axes)))
    return sorted({d % len(weight.axes) for d in (dim if isinstance(dim, tuple | list) else (dim,))})


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
    if not left:
        return _clean(weight).sum()
    if left not in ([ROW], [COL]):
        return None
    (rows, cols), side = weight.layer.mask_shape[:2], left == [COL]
    place, blocks, width = _places(weight)[side], (rows, cols)[side], weight.layer.block[side]
    parts = _clean(weight).sum(1 if side else 2)
    total = parts.new_zeros(blocks + 1, width).index_add(0, place, parts)
    return total[:blocks].reshape(-1)[: weight.layer.weight_shape[side]]


def _sum_of_batch(weight: PackedWeight) -> Tensor | None:
    """``out_scale[n, o] · Σ_{i, t} W[o, i, t] · in_scale[n, i]``: the weight on an image of its kernel's size."""
    layer = weight.layer
    if layer.groups != 1 or weight.in_scale is None or layer.backend == "reference":
        return None
    topology, shape = layer.topology_as()
    x = weight.in_scale.to(weight.dtype)
    if len(shape) == 4:
        x = x[:, :, None, None].expand(-1, -1, *shape[2:])
        total = ops.conv2d(x, _clean(weight), None, topology, shape, backend=layer.backend).flatten(1)
    else:
        total = ops.linear(x, _clean(weight), None, topology, shape, backend=layer.backend)
    return total if weight.out_scale is None else total * weight.out_scale


@known("sum")
def _sum(input: PackedWeight, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor | None:
    return _summed(input if dtype is None else _cast(input, dtype), dim, keepdim)


@known("mean")
def _mean(input: PackedWeight, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor | None:
    total = _summed(input if dtype is None else _cast(input, dtype), dim, keepdim)
    return None if total is None else total / math.prod([input.shape[d] for d in _dims(input, dim)])


def _euclidean(weight: PackedWeight, dim: Any, keepdim: bool) -> Tensor | None:
    """The L2 norm, whose gradient at 0 is 0, as torch's."""
    total = _summed(_raised(weight, 2), dim, keepdim)
    if total is None:
        return None
    positive = total > 0
    return torch.where(positive, torch.where(positive, total, 1.0).sqrt(), 0.0)


@known("norm")
def _norm(
    input: PackedWeight, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None
) -> Tensor | None:
    if p not in ("fro", 2, None) or out is not None:
        return None
    return _euclidean(input if dtype is None else _cast(input, dtype), dim, keepdim)


@known("linalg_vector_norm", "vector_norm")
def _vector_norm(
    x: Any = None, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, input: Any = None
) -> Tensor | None:
    weight = input if x is None else x
    return None if ord != 2 else _euclidean(weight if dtype is None else _cast(weight, dtype), dim, keepdim)


@known("normalize")
def _normalize(input: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> PackedWeight | None:
    if not isinstance(input, PackedWeight) or p != 2 or out is not None:
        return None
    norm = _euclidean(input, dim, keepdim=True)
    return None if norm is None else _times(input, norm.clamp_min(eps), divide=True)


@known("_weight_norm")
def _weight_norm(v: Any, g: Any, dim: int = 0) -> PackedWeight | None:
    if not isinstance(v, PackedWeight) or isinstance(g, PackedWeight):
        return None
    others = None if dim == -1 else [d for d in range(len(v.axes)) if d != dim]
    norm = _euclidean(v, others, keepdim=dim != -1)
    # A row without blocks has the norm 0, and nothing to divide.
    return None if norm is None else _times(v, g / torch.where(norm > 0, norm, 1.0), divide=False)


# --- views ------------------------------------------------------------------------------------------------------------


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
