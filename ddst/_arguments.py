"""Checks that the public functions share: each returns the argument, or raises an error that names it, what came, and
what was expected. A bool is no number, numpy's integers are ints.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

T = TypeVar("T")

#: Kernels and indices count in 32 bits.
MAX_INT = 2**31 - 1


def _kind(value: object) -> str:
    """What came, in few characters: a tensor or a model would print pages."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else type(value).__name__


def _is_integral(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_int(name: str, value: Any, least: int | None = None, most: int = MAX_INT) -> int:
    """An int from ``least`` to ``most``; numpy's integers too, bools and tensors not.

    >>> import numpy as np
    >>> check_int("size", np.int64(3), 1)
    3
    """
    if type(value) is not int:  # the common case costs one comparison
        if isinstance(value, torch.SymInt):
            return value  # type: ignore[return-value]  # stands for an int while a graph is traced
        if not _is_integral(value):
            raise TypeError(f"{name} must be an int, got {_kind(value)}")
        value = operator.index(value)
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return int(value)


def check_ints(
    name: str, value: Any, length: int, least: int | None = None, most: int = MAX_INT, *, one_tuple: bool = True
) -> tuple[int, ...]:
    """``length`` ints, or one for all of them: an int or, where torch takes that, a sequence of one.

    >>> check_ints("stride", 2, 2), check_ints("stride", (1,), 2), check_ints("stride", [1, 2], 2)
    ((2, 2), (1, 1), (1, 2))
    """
    entries = tuple(value) if isinstance(value, tuple | list | Sequence) and not isinstance(value, str) else (value,)
    if len(entries) == 1 and (one_tuple or not isinstance(value, Sequence)):
        entries = entries * length
    if len(entries) != length or not all(type(v) is int or _is_integral(v) for v in entries):
        pair = {1: "a sequence of one", 2: "a pair of ints"}.get(length, f"{length} ints")
        raise TypeError(f"{name} must be an int or {pair}, got {_kind(value)}")
    return tuple(check_int(name, v, least, most) for v in entries)


def check_weight_shape(name: str, value: Any) -> tuple[int, ...]:
    """``(C_out, C_in, kH, kW)``, ``(C_out, C_in, k)`` or ``(C_out, C_in)``: 4, 3 or 2 ints of at least 1."""
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} must be a tuple of ints, got {_kind(value)}")
    if len(value) not in (2, 3, 4):
        raise ValueError(f"{name} must be (C_out, C_in, kH, kW), (C_out, C_in, k) or (C_out, C_in), got {tuple(value)}")
    return tuple(check_int(name, size, 1) for size in value)


def check_number(
    name: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float | None = None,
    finite: bool = True,
    note: str = "",
) -> float:
    """A number from ``least`` to ``most``, or above ``above``, as a float; ``finite=False`` lets NaN and infinity pass.

    >>> check_number("decay", 1, 0, 1)
    1.0
    """
    if above is not None:
        limits = f"above {above:g}" + (f" and at most {most:g}" if most < math.inf else "")
    elif least > -math.inf and most < math.inf:
        limits = f"from {least:g} to {most:g}"
    else:
        limits = f"at least {least:g}" if least > -math.inf else f"at most {most:g}" if most < math.inf else ""
    expected = " ".join(f"{limits} {note}".split())
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number {expected}".rstrip() + f", got {_kind(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not finite and not math.isfinite(number):
        return number
    if not math.isfinite(number):
        raise ValueError(f"{name} must be {f'{expected} and finite' if expected else 'finite'}, got {_kind(value)}")
    if not least <= number <= most or (above is not None and not number > above):
        raise ValueError(f"{name} must be {expected}, got {_kind(value)}")
    return number


def check_bool(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_kind(value)}")
    return value


def check_one_of(name: str, value: Any, allowed: Collection[str]) -> str:
    """One of some names."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(allowed)}, got {_kind(value)}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def check_type(name: str, value: Any, kind: type[T], expected: str) -> T:
    """An instance of a class; ``expected`` says of which, in the error."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {expected}, got {_kind(value)}")
    return value


def check_module(name: str, value: Any) -> nn.Module:
    """A module, not its class."""
    return check_type(name, value, nn.Module, "a torch.nn.Module")


def check_optimizer(name: str, value: Any) -> Optimizer:
    """A torch optimizer."""
    return check_type(name, value, Optimizer, "a torch.optim.Optimizer")


def check_tensor(name: str, value: Any, dim: int | None = None) -> Tensor:
    """A tensor, with ``dim`` dimensions if that is given."""
    tensor = check_type(name, value, Tensor, "a tensor")
    if dim is not None and tensor.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimensions, got {_kind(tensor)}")
    return tensor


def check_tensors(name: str, value: Any, like: Sequence[Tensor] | None = None) -> list[Tensor]:
    """A sequence of vectors, of the lengths of others if those are given."""
    if isinstance(value, Tensor | str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of tensors, got {_kind(value)}")
    tensors = [check_tensor(f"{name}[{i}]", tensor, 1) for i, tensor in enumerate(value)]
    if like is not None and [len(t) for t in tensors] != [len(t) for t in like]:
        raise ValueError(f"{name} must have the lengths {[len(t) for t in like]}, got {[len(t) for t in tensors]}")
    return tensors


def check_operands(input: Any, values: Any, bias: Any, topology: Any) -> None:
    """The tensors of an operator; their sizes and dtypes are the operator's business."""
    tensors = isinstance(input, Tensor) and isinstance(values, Tensor) and isinstance(topology, Tensor)
    if not (tensors and (bias is None or isinstance(bias, Tensor))):
        for name, value in (("input", input), ("values", values), ("topology", topology), ("bias", bias)):
            if name != "bias" or value is not None:
                check_tensor(name, value)


def check_dtype(name: str, value: Any) -> torch.dtype | None:
    """A floating-point dtype, or None for torch's default."""
    if value is None:
        return None
    dtype = check_type(name, value, torch.dtype, "a floating-point torch.dtype or None")
    if not dtype.is_floating_point:
        raise ValueError(f"{name} must be a floating-point torch.dtype or None, got {dtype}")
    return dtype


def check_device(name: str, value: Any) -> torch.device:
    """A device; None is torch's default one, ``with torch.device(...)`` included."""
    if isinstance(value, bool) or not (value is None or isinstance(value, torch.device | str | int)):
        raise TypeError(f"{name} must be a torch.device, a string or None, got {_kind(value)}")
    try:
        return torch.empty(0, device=value).device
    except (RuntimeError, AssertionError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a device that torch has here, got {_kind(value)}: {error}") from error


def check_state_keys(state: Any, keys: Collection[str], name: str = "state") -> None:
    """What ``state_dict()`` made: a mapping with these keys."""
    if not isinstance(state, Mapping):
        raise TypeError(f"{name} must be what state_dict() returned, got {_kind(state)}")
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"{name} must be what state_dict() returned, {', '.join(missing)} is missing")


def check_generator(name: str, value: Any) -> torch.Generator | None:
    """A generator of random numbers on the CPU, or None."""
    if value is None:
        return None
    generator = check_type(name, value, torch.Generator, "a torch.Generator on the CPU or None")
    if generator.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got one on {generator.device}")
    return generator
