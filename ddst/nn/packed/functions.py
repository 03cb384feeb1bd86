"""What torch's functions do with a :class:`~ddst.nn.packed.weight.PackedWeight`.

Each function of the table has the signature of torch's function of its name, and returns None where it cannot keep the
weight packed: then the function itself runs on the dense weight. Convolutions and linear functions run on the
block-sparse operators; factors, powers, norms and views give another packed weight.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..dense_view import DenseView
from .weight import PackedWeight

Known = Callable[..., Any]

_KNOWN: dict[str, Known] = {}
#: The arguments that each takes by name, or None for any.
_NAMES: dict[str, set[str] | None] = {}

#: numpy's names of arguments, which torch takes as well.
_ALIASES = {"axis": "dim", "keepdims": "keepdim", "axis0": "dim0", "axis1": "dim1"}

#: Asked of a weight without looking at its entries.
_HARMLESS = {"requires_grad_", "is_shared_", "share_memory_", "clone", "__format__", "stride", "element_size"}

_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad"}


def known(*names: str) -> Callable[[Known], Known]:
    """Puts a function into the table under torch's names."""

    def register(function: Known) -> Known:
        parameters = inspect.signature(function).parameters.values()
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        for name in names:
            _KNOWN[name] = function
            _NAMES[name] = None if takes_any else {p.name for p in parameters}
        return function

    return register


def apply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls one of torch's functions, some arguments of which are packed weights."""
    name = getattr(func, "__name__", "")
    if torch.compiler.is_compiling():
        args = _turned_back(func, args)
    else:
        for weight in _packed_in((*args, *kwargs.values())):
            weight.check_current()
            if weight.under_grad and not torch.is_grad_enabled():
                _check_not_in_function(weight, name)
    if name in _HOOKS:
        raise TypeError(f"{name} on a packed weight, which is no tensor of its own: call it on the layer's values")
    function = _KNOWN.get(name)
    if function is not None:
        taken, named = _NAMES[name], {_ALIASES.get(key, key): value for key, value in kwargs.items()}
        if taken is None or all(key in taken for key in named):
            result = function(*args, **named)
            if result is not None:
                return result
    return on_dense(func, name, args, kwargs)


def _check_not_in_function(weight: PackedWeight, name: str) -> None:
    """Raises where somebody's autograd.Function got the weight: it would take it for a constant, and learn nothing."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        code = frame.f_code
        if code.co_name == "apply" and code.co_filename == torch.autograd.function.__file__:
            kind = frame.f_locals.get("cls")  # there is none where backward is running
            if kind is not None and not kind.__module__.startswith("torch."):  # a checkpoint computes it again
                raise TypeError(
                    f"{name} in {kind.__name__}, which takes a packed weight for a constant: give its apply "
                    "weight.unpacked(), or set gives_dense_weight on the layer"
                )
        frame = frame.f_back


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


def on_dense(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls the function with dense weights in place of packed ones, and notes where."""
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


_OWN = (str(Path(__file__).parents[2]), str(Path(torch.__file__).parent))


def calling_place() -> str:
    """``file:line`` of the code outside of torch and this package that is being run."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


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
