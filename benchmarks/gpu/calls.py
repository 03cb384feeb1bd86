"""Calls of the registered operators on a chosen backend, and which backends there are to choose from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddst import backends

#: On each device, the backends that are proved and measured there.
BACKENDS_OF = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}
BLOCKS = tuple((rows, columns) for rows in (32, 64, 16) for columns in (32, 64, 16))
#: Operators without a choice of backend, and the backends whose own they are.
SCORES = {"conv2d_block_scores": ("triton", "cpu"), "linear_block_scores": ("triton", "cpu")}

WINDOW = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}


class RefusedError(Exception):
    """The backend says no to this problem; the message is its reason."""


def usable(device: str, dtype: torch.dtype, block: tuple[int, int]) -> dict[str, str | None]:
    """Backend -> None where it says yes to packed values of this dtype and block, else its reason."""
    found: dict[str, str | None] = {}
    for name in BACKENDS_OF[device]:
        yes, reason = backends.supports(name, backends.Problem(device, dtype, block))
        found[name] = None if yes else reason
    return found


def bound(name: str, arguments: Sequence[Any], backend: str) -> Callable[[], Tensor]:
    """A call of an operator on a backend.

    Args:
        arguments: of the operator, without the backend; the first is a tensor on the device.

    Raises:
        RefusedError: the backend does not do this problem.
    """
    operator = getattr(torch.ops.ddst, name).default
    if name in SCORES:
        if backend not in SCORES[name]:
            raise RefusedError("no block scores of its own")
        return partial(operator, *arguments)
    named = dict(zip((argument.name for argument in operator._schema.arguments), arguments, strict=False))
    refusal = _refusal(name, arguments[0], named, backend)
    if refusal is not None:
        raise RefusedError(refusal)
    return partial(operator, *arguments, backend=backends.code(backend))


def _refusal(name: str, first: Tensor, named: dict[str, Any], backend: str) -> str | None:
    """Why a backend does not do a call; None where it does."""
    shape = named["weight_shape"]
    block = tuple(named["values"].shape[1:]) if "values" in named else tuple(named["block"])
    window = [tuple(named.get(key, default)) for key, default in WINDOW.items()]
    if backend == "cuda":  # it may do one pass and not another
        from ddst.ops.cuda import compiled

        yes, reason = compiled.supports(name, first.device, first.dtype, shape, block, *window)
    else:
        stride, _, dilation = window
        problem = backends.Problem(first.device.type, first.dtype, block, tuple(shape[2:]) or (1, 1), stride, dilation)
        yes, reason = backends.supports(backend, problem)
    return None if yes else reason


def with_relu(name: str, arguments: Sequence[Any]) -> Callable[[], Tensor]:
    """A Triton forward pass with the ReLU fused, which no registered operator reaches."""
    from ddst import kernels

    return partial(getattr(kernels, name), *arguments, relu=True)
