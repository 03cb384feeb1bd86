"""A weight that stays packed wherever it is used, in code that knows nothing of it.

:class:`PackedWeight` stands for a dense weight. torch's functions hand it to ``__torch_function__``, which runs
convolutions and linear functions on the block-sparse operators, keeps it packed under what layers do to a weight before
they use it, and unpacks it, differentiably, for anything else. What each function does is in
:mod:`ddst.nn.packed.functions`; here is what a packed weight is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...ops.gradient_record import recorder_of
from ...topology import pack_slots, unpack_slots
from ..dense_view import DenseView

if TYPE_CHECKING:
    from ..base import SparseLayer

#: Rows (first dimension) and columns (second) of the stored weight; its taps are "t0", "t1"; "n" runs over a batch.
ROW, COL, BATCH = "o", "i", "n"

Axes = tuple[tuple[str, ...], ...]


class WeightUses:
    """What has been done with a packed weight.

    Attributes:
        packed: kinds of functions it ran in as blocks ("conv", "linear").
        dense: "function at file:line" of those that got the dense weight.
    """

    def __init__(self) -> None:
        self.packed: set[str] = set()
        self.dense: set[str] = set()


def _method(name: str) -> Any:
    def method(self: PackedWeight, *args: Any) -> Any:
        return self.call(name, *args)

    return method


class PackedWeight:
    """``W[o, i, t] · out_scale[n, o] · in_scale[n, i]``, its dimensions in any order, merged or not.

    Attributes:
        layer: whose weight it is.
        values: ``[slots, b_out, b_in]`` of ``W``, with what was multiplied into them so far; differentiable.
        axes: what each dimension runs over: rows, columns, taps and the batch, in the order of the elements. A
            dimension without any has the size 1.
        batch: size of the batch, or None.
        out_scale, in_scale: ``[n or 1, rows]`` and ``[n or 1, columns]``, factors that differ within the batch.
        flipped: whether taps run backwards.
        bound: whether it is the layer's own weight, so that what is written into it in place goes to the layer.
        under_grad: whether it was made where gradients are recorded, and has one.
    """

    __array_priority__ = 1000  # a number of numpy's on the left gives way, as to a tensor

    def __init__(
        self,
        layer: SparseLayer,
        values: Tensor,
        axes: Axes,
        batch: int | None = None,
        out_scale: Tensor | None = None,
        in_scale: Tensor | None = None,
        flipped: bool = False,
        bound: bool = False,
    ) -> None:
        self.layer, self.values, self.axes, self.batch = layer, values, axes, batch
        self.out_scale, self.in_scale, self.flipped, self.bound = out_scale, in_scale, flipped, bound
        # Not looked at in a compiled graph, which would be another one after every exchange.
        self.version = -1 if torch.compiler.is_compiling() else layer.mask_version
        self.under_grad = torch.is_grad_enabled() and self.requires_grad

    @staticmethod
    def of(layer: SparseLayer, values: Tensor, leading: int = 0, bound: bool = False) -> PackedWeight:
        """The weight of a layer with these values, after ``leading`` dimensions of size 1."""
        axes: list[tuple[str, ...]] = [()] * leading + [(ROW,), (COL,)]
        axes += [(tap,) for tap in taps_of(layer)]
        return PackedWeight(layer, values, tuple(axes), bound=bound)

    def with_values(self, values: Tensor) -> PackedWeight:
        """The same with other values: no longer the layer's own weight."""
        return PackedWeight(self.layer, values, self.axes, self.batch, self.out_scale, self.in_scale, self.flipped)

    def with_axes(self, axes: Axes, flipped: bool | None = None) -> PackedWeight:
        """A view: the same elements in other dimensions."""
        turned = self.flipped if flipped is None else flipped
        scales = (self.batch, self.out_scale, self.in_scale)
        return PackedWeight(self.layer, self.values, axes, *scales, turned, self.bound)

    def with_scales(
        self, axes: Axes, batch: int | None, out_scale: Tensor | None, in_scale: Tensor | None
    ) -> PackedWeight:
        """The same with other factors within a batch."""
        return PackedWeight(self.layer, self.values, axes, batch, out_scale, in_scale, self.flipped)

    def with_scales_and(self, values: Tensor, out_scale: Tensor | None, in_scale: Tensor | None) -> PackedWeight:
        """The same with other values and factors."""
        return PackedWeight(self.layer, values, self.axes, self.batch, out_scale, in_scale, self.flipped)

    def check_current(self) -> None:
        """Raises if blocks of the layer have moved since this weight was read."""
        if self.version not in (-1, self.layer.mask_version):
            raise RuntimeError(
                "blocks of the layer have moved since this packed weight was read from it: read layer.weight anew, or "
                "keep weight.unpacked()"
            )

    # --- what code asks of a weight before it uses it -----------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return torch.Size([math.prod([self.length(atom) for atom in axis]) for axis in self.axes])

    def length(self, atom: str) -> int:
        """How many elements a part of a dimension has."""
        if atom == BATCH:
            assert self.batch is not None
            return self.batch
        sizes = self.layer.weight_shape
        return sizes[0] if atom == ROW else sizes[1] if atom == COL else sizes[2 + int(atom[1:])]

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.axes)

    ndimension = dim

    @property
    def ndim(self) -> int:
        return len(self.axes)

    def numel(self) -> int:
        return math.prod(self.shape)

    nelement = numel

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def layout(self) -> torch.layout:
        return torch.strided

    @property
    def is_cuda(self) -> bool:
        return self.values.is_cuda

    @property
    def is_meta(self) -> bool:
        return self.values.is_meta

    @property
    def is_leaf(self) -> bool:
        return self.bound and self.values.is_leaf

    @property
    def requires_grad(self) -> bool:
        return any(t.requires_grad for t in (self.values, self.out_scale, self.in_scale) if t is not None)

    @property
    def grad_fn(self) -> Any:
        return None if self.bound else self.values.grad_fn

    @property
    def grad(self) -> Tensor | None:
        """The dense gradient of the layer's own weight, zero where there is no block; to be written to as well."""
        gradient = self.layer.values.grad if self.bound else None
        if gradient is None:
            return None
        dense = self.with_values(gradient).unpacked()
        return DenseView.of(dense, self.layer, gradient) if self.canonical else dense

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        layer = self.layer
        if not (self.bound and self.canonical):
            raise RuntimeError("grad of a product or view of a packed weight: set that of the layer's weight itself")
        if value is not None and value.shape != self.shape:
            raise RuntimeError(f"grad must have the shape of the weight, {tuple(self.shape)}, got {tuple(value.shape)}")
        dense = None if value is None else value.detach().reshape(layer.weight_shape)
        layer.values.grad = None if dense is None else pack_slots(dense, layer.slot_blocks, layer.block)

    @property
    def data(self) -> PackedWeight:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        with torch.no_grad():
            self.call("copy_", value)

    def is_floating_point(self) -> bool:
        return True

    def is_contiguous(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def detach(self) -> PackedWeight:
        out_scale = None if self.out_scale is None else self.out_scale.detach()
        in_scale = None if self.in_scale is None else self.in_scale.detach()
        values = self.values.detach()
        return PackedWeight(self.layer, values, self.axes, self.batch, out_scale, in_scale, self.flipped, self.bound)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.call("__array__", dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.unpacked().detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.unpacked().detach().clone()

    def __repr__(self) -> str:
        return f"PackedWeight(shape={tuple(self.shape)}, density={self.layer.density:.3g}, dtype={self.dtype})"

    def __len__(self) -> int:
        return self.shape[0]

    # --- the dense weight ---------------------------------------------------------------------------------------------

    def unpacked(self) -> Tensor:
        """The dense weight, differentiable. Its gradient is recorded where growth scores are requested."""
        layer = self.layer
        dense = unpack_slots(self.values, layer.slot_blocks, layer.weight_shape)
        record = layer._record
        if record and dense.requires_grad and not torch.compiler.is_compiling():
            dense.register_hook(lambda gradient: _record_dense(record, gradient))
        taps = taps_of(layer)
        if self.flipped:
            dense = dense.flip([2 + i for i in range(len(taps))])
        atoms = [ROW, COL, *taps]
        if self.batch is not None:
            space = [1] * len(taps)
            dense = dense.expand(self.batch, *dense.shape)
            if self.out_scale is not None:
                dense = dense * self.out_scale.view(-1, self.out_scale.shape[1], 1, *space)
            if self.in_scale is not None:
                dense = dense * self.in_scale.view(-1, 1, self.in_scale.shape[1], *space)
            atoms.insert(0, BATCH)
        wanted = [atom for axis in self.axes for atom in axis]
        if wanted != atoms:
            dense = dense.permute([atoms.index(atom) for atom in wanted])
        # Contiguous, so that an initialiser draws what it draws for a dense layer.
        return dense.reshape(self.shape).contiguous()

    def dense(self) -> Tensor:
        """What a function that is not known gets: writable where this is the layer's own weight."""
        writable = self.bound and self.canonical and not torch.compiler.is_compiling()
        return DenseView.of(self.unpacked(), self.layer) if writable else self.unpacked()

    @property
    def canonical(self) -> bool:
        """Whether the elements lie in the order of the stored weight."""
        return [atom for axis in self.axes for atom in axis] == [ROW, COL, *taps_of(self.layer)] and not self.flipped

    # --- arithmetic: all of it goes through __torch_function__ --------------------------------------------------------

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The method of a tensor of this name."""
        if torch.compiler.is_compiling() and name.endswith("_") and not name.endswith("__"):
            raise RuntimeError(f"{name} on a packed weight in compiled code: write into it outside")
        return self.__torch_function__(getattr(Tensor, name), (PackedWeight,), (self, *args), kwargs)

    def __getattr__(self, name: str) -> Any:
        # Only what a tensor has, and nothing that copying and pickling look for.
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"'PackedWeight' object has no attribute {name!r}")
        if callable(getattr(Tensor, name)):
            return lambda *args, **kwargs: self.call(name, *args, **kwargs)
        return getattr(self.dense(), name)

    @property
    def T(self) -> Any:
        return self.call("permute", *reversed(range(len(self.axes))))

    @property
    def mT(self) -> Any:
        return self.call("transpose", -1, -2)

    H = mH = mT

    def __rmatmul__(self, other: Any) -> Any:
        return self.__torch_function__(torch.matmul, (PackedWeight,), (other, self), {})

    def __rsub__(self, other: Any) -> Any:
        return self.__torch_function__(torch.rsub, (PackedWeight,), (self, other), {})

    __mul__ = __rmul__ = _method("mul")
    __add__ = __radd__ = _method("add")
    __sub__ = _method("sub")
    __truediv__, __rtruediv__ = _method("div"), _method("__rtruediv__")
    __floordiv__, __mod__ = _method("__floordiv__"), _method("__mod__")
    __pow__, __rpow__ = _method("pow"), _method("__rpow__")
    __neg__, __pos__, __abs__ = _method("neg"), _method("positive"), _method("abs")
    __matmul__ = _method("matmul")
    __getitem__ = _method("__getitem__")
    __imul__, __iadd__, __isub__, __itruediv__ = _method("mul_"), _method("add_"), _method("sub_"), _method("div_")
    __eq__, __ne__ = _method("eq"), _method("ne")
    __lt__, __le__, __gt__, __ge__ = _method("lt"), _method("le"), _method("gt"), _method("ge")

    def __setitem__(self, index: Any, value: Any) -> None:
        self.call("__setitem__", index, value)

    def __iter__(self) -> Any:
        return iter(self.dense())

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> bool:
        return bool(self.dense())

    def __float__(self) -> float:
        return float(self.dense())

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from .functions import apply

        return apply(func, args, kwargs or {})


def wrapped(dim: int, dims: int) -> int:
    """A dimension counted from the front."""
    if not -dims <= dim < dims:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-dims}, {dims - 1}], but got {dim})"  # torch's words
        )
    return dim % dims


def wrapped_all(dim: int | Sequence[int], dims: int) -> list[int]:
    """The same for one or several, each once."""
    found = [wrapped(d, dims) for d in (dim if isinstance(dim, tuple | list) else (dim,))]
    if len(set(found)) != len(found):
        raise RuntimeError(f"a dimension appears multiple times in the list of dims {dim}")
    return found


def taps_of(layer: SparseLayer) -> tuple[str, ...]:
    """The names of a layer's spatial dimensions."""
    return tuple(f"t{i}" for i in range(len(layer.weight_shape) - 2))


def _record_dense(key: int, gradient: Tensor) -> None:
    recorder = recorder_of(key)
    if recorder is not None:
        recorder.add_dense(gradient)


def regroup(sizes: Sequence[tuple[str, int]], shape: Sequence[int]) -> Axes | None:
    """Which parts each dimension of a new shape takes, in order; None where one would be cut through.

    >>> regroup([("o", 8), ("i", 4), ("t0", 3)], (8, 12))
    (('o',), ('i', 't0'))
    """
    left = list(sizes)
    axes: list[tuple[str, ...]] = []
    for done, wanted in enumerate(shape):
        taken: list[str] = []
        product = 1
        # A part of length 1 takes a dimension of size 1 if enough are left for the others.
        if wanted == 1 and left and left[0][1] == 1 and len(left) >= len(shape) - done:
            taken.append(left.pop(0)[0])
        while left and product < wanted:
            atom, size = left.pop(0)
            taken.append(atom)
            product *= size
        if product != wanted:
            return None
        axes.append(tuple(taken))
    if any(size != 1 for _, size in left):
        return None
    if left and not axes:
        return None
    if left:
        axes[-1] = (*axes[-1], *(atom for atom, _ in left))
    return tuple(axes)
