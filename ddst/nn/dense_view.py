"""``layer.weight`` of a sparse layer: the dense weight, to be read, and to be initialised through."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..topology import pack_slots

if TYPE_CHECKING:
    from .base import SparseLayer

#: End with "_", and write nothing.
_NO_WRITES = {"requires_grad_", "retain_grad_", "share_memory_", "is_shared_"}

#: Reading and setting of a gradient, and what asks for one.
_GRAD = (Tensor.grad.__get__, Tensor.grad.__set__)  # type: ignore[union-attr]
_DIFFERENTIATE = (torch.autograd.grad, torch.autograd.backward)


def _own(value: Any) -> Any:
    """The layer's own weight in place of dense ones read from it, which are in no graph but their own."""
    if isinstance(value, DenseView) and value._gradient is None:
        return value._layer._packed_weight()
    return type(value)(map(_own, value)) if type(value) in (list, tuple) else value


class DenseView(Tensor):
    """A dense weight that was unpacked for reading; what is written into it in place goes to the active blocks.

    It is a tensor of its own, differentiable with respect to the packed values. An operation in place (those of
    ``torch.nn.init``, ``copy_``, ``mul_``, assignment to an index) is carried out on it and packed again at once:
    numbers at inactive blocks are let go. ``data`` and ``detach()`` stay bound likewise; any other result is a plain
    tensor.
    """

    _layer: SparseLayer
    _gradient: Tensor | None

    @staticmethod
    def of(dense: Tensor, layer: SparseLayer, gradient: Tensor | None = None) -> DenseView:
        """Binds the unpacked weight to its layer, or its unpacked gradient to the packed one."""
        view = dense.as_subclass(DenseView)
        view._layer, view._gradient = layer, gradient
        return view

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        # torch.nn.init hands over its own functions, with everything by name, and writes under no_grad.
        initialises = getattr(func, "__module__", "") == "torch.nn.init"
        first = named.get("tensor") if initialises else args[0] if args else None
        target = named.get("out", first)
        view = target if isinstance(target, DenseView) else None
        name = getattr(func, "__name__", "")
        if func in _DIFFERENTIATE:
            return func(*_own(args), **{key: _own(value) for key, value in named.items()})
        if view is not None and view._gradient is None and func in _GRAD:
            own = view._layer._packed_weight()
            return own.grad if func == _GRAD[0] else setattr(own, "grad", args[1])
        with torch._C.DisableTorchFunctionSubclass():
            if view is None:
                return func(*args, **named)
            if func in (Tensor.detach, Tensor.data.__get__):  # type: ignore[attr-defined]
                return DenseView.of(func(*args, **named), view._layer, view._gradient)
            writes = (
                name == "__setitem__"
                or "out" in named
                or (name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES)
            )
            replaces = func == Tensor.data.__set__  # type: ignore[attr-defined]
            if func in (Tensor.requires_grad_, Tensor.requires_grad.__set__):  # type: ignore[attr-defined]
                view._layer.values.requires_grad_(*args[1:], **named)
                return view
            if func is Tensor.__deepcopy__:  # a plain tensor
                return func(view.as_subclass(Tensor), *args[1:], **named)
            if not writes and not replaces:
                return func(*args, **named)
            layer = view._layer
            if torch.is_grad_enabled() and view.requires_grad and not initialises and not replaces:
                raise RuntimeError(
                    f"weight.{name} writes into the dense weight of a sparse layer, which needs torch.no_grad(), as "
                    "writing into any parameter does"
                )
            with torch.no_grad():
                func(*args, **named)
                dense = view.detach().reshape(layer.weight_shape)
                target = layer.values if view._gradient is None else view._gradient
                target.copy_(pack_slots(dense, layer.slot_blocks, layer.block))
                if (
                    layer.weight_norm is not None and target is layer.values
                ):  # what was written is read again, as after torch's assignment
                    layer.weight_norm.reset(layer)
            return None if name == "__setitem__" else view
