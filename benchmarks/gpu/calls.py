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


class RefusedError(Exception):
    """The backend says no to this problem; the message is its reason."""


def usable(device: str, dtype: torch.dtype = torch.float32, block: tuple[int, int] = (32, 32)) -> dict[str, str | None]:
    """Backend -> None where it says yes to packed values of this dtype and block, else its reason."""
    found: dict[str, str | None] = {}
    for name in BACKENDS_OF[device]:
        if name not in backends.BACKENDS:
            found[name] = "not in this tree"
            continue
        yes, reason = backends.supports(name, backends.Problem(device, dtype, block))
        found[name] = None if yes else reason
    return found


def check(
    backend: str,
    device: str,
    dtype: torch.dtype,
    block: tuple[int, int],
    window: Sequence[tuple[int, int]] = ((1, 1), (1, 1), (1, 1)),
) -> None:
    """Raises RefusedError if a backend does not do a problem. ``window``: kernel, stride and dilation."""
    yes, reason = backends.supports(backend, backends.Problem(device, dtype, block, *window))
    if not yes:
        raise RefusedError(reason)


def bound(
    name: str,
    arguments: Sequence[Any],
    backend: str,
    block: tuple[int, int],
    window: Sequence[tuple[int, int]] = ((1, 1), (1, 1), (1, 1)),
) -> Callable[[], Tensor]:
    """A call of an operator on a backend.

    Args:
        arguments: of the operator, without the backend; the first is a tensor on the device.
        block: of the packed values. window: kernel, stride and dilation.

    Raises:
        RefusedError: the backend does not do this problem.
    """
    operator = getattr(torch.ops.ddst, name).default
    if name in SCORES:
        if backend not in SCORES[name]:
            raise RefusedError("no block scores of its own")
        return partial(operator, *arguments)
    check(backend, arguments[0].device.type, arguments[0].dtype, block, window)
    return partial(operator, *arguments, backend=backend)


def with_relu(name: str, arguments: Sequence[Any]) -> Callable[[], Tensor]:
    """A Triton forward pass with the ReLU fused, which no registered operator reaches."""
    from ddst import kernels

    return partial(getattr(kernels, name), *arguments, relu=True)
