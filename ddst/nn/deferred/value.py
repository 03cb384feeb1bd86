"""A tensor that is not computed yet.

:class:`Deferred` stands for an activation ``[N, C, H, W]``. torch's functions hand it to ``__torch_function__``, where
batch norm, activations, upsampling, pooling and sums are remembered, a block-sparse convolution runs all of them as one
operator, and anything else gets the tensor itself, computed by the functions that were called. What each function does
is in :mod:`ddst.nn.deferred.functions`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..packed.callers import inside_a_function
from .run import run, shape_of
from .work import Activated, Convolved, in_mode, mode_of, version_of


def _method(name: str) -> Any:
    def method(self: Deferred, *args: Any) -> Any:
        return self.call(name, *args)

    return method


class Deferred:
    """``work``, once somebody needs it. Changed in place, it is other work.

    Attributes:
        work: what is to be done, or an :class:`~ddst.nn.deferred.work.Activated` without steps: the tensor there is.
    """

    __array_priority__ = 1000  # a number of numpy's on the left gives way, as to a tensor

    def __init__(self, work: Activated | Convolved) -> None:
        self.work = work

    @staticmethod
    def of(source: Tensor, moments: Tensor | None = None, *, takes_norm: bool = False, shared: bool = True) -> Deferred:
        """A tensor ``[N, C, H, W]``, of which what comes next is remembered.

        Args:
            moments: of source, as of :func:`~ddst.ops.channel_moments`, if they are known.
            takes_norm: whether a batch norm is remembered, too; where it is not, it runs.
            shared: whether anybody else may hold the tensor.
        """
        mode = mode_of(source.device)
        version = version_of(source)
        return Deferred(Activated(source, mode, version, moments, takes_norm=takes_norm, shared=shared))

    def tensor(self) -> Tensor:
        """The tensor, computed once, as it would have been where it was asked for."""
        work = self.work
        if isinstance(work, Activated) and not work.steps:
            self.check_reached()
            if not work.shared:
                self.work = work._replace(shared=True)
            return work.source
        device = self.device
        if mode_of(device) == work.mode:
            found = _computed(work)
        else:
            self.check_reached()
            with in_mode(work.mode, device):
                found = _computed(work)
        self.work = Activated(found, work.mode, version_of(found))
        return found

    def for_epilogue(self) -> Deferred:
        """The same for a convolution that is to return itself as a deferred value."""
        work = self.work
        return Deferred(work._replace(asks=True)) if isinstance(work, Activated) else self

    def check_reached(self) -> None:
        """Raises where no gradient would reach it: inside of a torch.autograd.Function, which takes tensors only."""
        lost = self.work.mode.grad and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if lost and self.requires_grad and inside_a_function(checkpoints=True):
            raise TypeError(
                "the value of a fused norm, activation or convolution was handed to a torch.autograd.Function, which "
                "takes tensors only and would give it no gradient: call ddst.unfuse(model)"
            )

    # --- what code asks of a tensor without its entries ---------------------------------------------------------------

    @property
    def _first(self) -> Tensor:
        return self.work.source if isinstance(self.work, Activated) else self.work.values

    @property
    def shape(self) -> torch.Size:
        return torch.Size(shape_of(self.work))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 4

    ndimension = dim

    @property
    def ndim(self) -> int:
        return 4

    def numel(self) -> int:
        return self.shape.numel()

    nelement = numel

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        work = self.work
        if isinstance(work, Convolved):
            own = work.values.dtype
            return own if own == torch.float64 else work.mode.autocast or own
        return work.source.dtype if not work.steps or work.mode.autocast is None else self.tensor().dtype

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def layout(self) -> torch.layout:
        return torch.strided

    @property
    def is_cuda(self) -> bool:
        return self._first.is_cuda

    @property
    def is_meta(self) -> bool:
        return False

    def is_floating_point(self) -> bool:
        return True

    @property
    def requires_grad(self) -> bool:
        work = self.work
        if isinstance(work, Convolved):
            held = (work.values, work.layer.bias, *_held(work.input))
            return work.mode.grad and any(t.requires_grad for t in held if t is not None)
        return any(t.requires_grad for t in _held(work) if t is not None)

    # --- anything else ------------------------------------------------------------------------------------------------

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The method of a tensor of this name."""
        return self.__torch_function__(getattr(Tensor, name), (Deferred,), (self, *args), kwargs)

    def __getattr__(self, name: str) -> Any:
        # Only what a tensor has, and nothing that copying and pickling look for.
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"'Deferred' object has no attribute {name!r}")
        if callable(getattr(Tensor, name)):
            return lambda *args, **kwargs: self.call(name, *args, **kwargs)
        return getattr(self.tensor(), name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.tensor().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.tensor().__deepcopy__(memo)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.call("__array__", dtype)

    def __repr__(self) -> str:
        return f"Deferred(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __rsub__(self, other: Any) -> Any:
        return self.__torch_function__(torch.rsub, (Deferred,), (self, other), {})

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

    def __rmatmul__(self, other: Any) -> Any:
        return self.__torch_function__(torch.matmul, (Deferred,), (other, self), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.call("__setitem__", index, value)

    def __iter__(self) -> Any:
        return iter(self.tensor())

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> bool:
        return bool(self.tensor())

    def __float__(self) -> float:
        return float(self.tensor())

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _apply()(func, args, kwargs or {})


@functools.cache
def _apply() -> Any:
    """Which imports this module."""
    from .functions import apply

    return apply


def _computed(work: Activated | Convolved) -> Tensor:
    return work.tensor() if isinstance(work, Activated) else run(work)[0]


def _held(work: Activated) -> tuple[Tensor | None, ...]:
    norm = work.norm
    return (work.source,) if norm is None else (work.source, norm.gamma, norm.beta)


def tensor_of(value: Any) -> Any:
    """The tensor of a deferred value, and anything else as it is."""
    return value.tensor() if isinstance(value, Deferred) else value
