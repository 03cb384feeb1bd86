"""Calls of the registered operators on a chosen backend, and which backends there are to choose from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddst import backends
from ddst.ops.cuda import compiled, gather, hopper, hopper_weight_grad

#: On each device, the backends that are proved and measured there.
BACKENDS_OF = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}
#: Backend "cuda" with the kernel set that its model would choose: the forms for sm_90a, and the one for all.
FORMS: dict[str, hopper.Form | str] = {
    "cuda/N=16": hopper.Form(1, 2),
    "cuda/N=64": hopper.Form(4, 2),
    "cuda/K=32": hopper.Form(1, 2, 2),
    "cuda/im2col": hopper.Form(1, 2, 1, True),
    "cuda/mma.sync": "general",
}
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


def forms(device: str, dtype: torch.dtype) -> list[str]:
    """Those of :data:`FORMS` that the device has."""
    if device != "cuda":
        return []
    return [] if hopper.device_refusal(dtype, torch.cuda.get_device_capability()) else list(FORMS)


def plain(backend: str) -> str:
    """The backend, without the form.

    >>> plain("cuda/N=16"), plain("triton")
    ('cuda', 'triton')
    """
    return backend.partition("/")[0]


def forcing(backend: str) -> AbstractContextManager[None]:
    """Within it, what runs on the backend does so in its form."""
    return hopper.forced(FORMS[backend]) if backend in FORMS else nullcontext()


def bound(name: str, arguments: Sequence[Any], backend: str) -> Callable[[], Tensor]:
    """A call of an operator on a backend.

    Args:
        arguments: of the operator, without the backend; the first is a tensor on the device.

    Raises:
        RefusedError: the backend does not do this problem.
    """
    operator = getattr(torch.ops.ddst, name).default
    if name in SCORES:
        if plain(backend) != backend or backend not in SCORES[name]:
            raise RefusedError("no block scores of its own")
        return partial(operator, *arguments)
    named = dict(zip((argument.name for argument in operator._schema.arguments), arguments, strict=False))
    refusal = _refusal(name, arguments[0], named, backend)
    if refusal is not None:
        raise RefusedError(refusal)
    call = partial(operator, *arguments, backend=backends.code(plain(backend)))
    return partial(_forced, call, backend) if backend in FORMS else call


def _forced(call: Callable[[], Tensor], backend: str) -> Tensor:
    with forcing(backend):
        return call()


def _refusal(name: str, first: Tensor, named: dict[str, Any], backend: str) -> str | None:
    """Why a backend does not do a call; None where it does."""
    shape = named["weight_shape"]
    block = tuple(named["values"].shape[1:]) if "values" in named else tuple(named["block"])
    window = [tuple(named.get(key, default)) for key, default in WINDOW.items()]
    if plain(backend) == "cuda":  # it may do one pass and not another
        yes, reason = compiled.supports(name, first.device, first.dtype, shape, block, *window)
        form = FORMS.get(backend)
        if yes and isinstance(form, hopper.Form):
            reason = _form_refusal(name, first, shape, block, window, form)
            yes = not reason
    else:
        stride, _, dilation = window
        problem = backends.Problem(first.device.type, first.dtype, block, tuple(shape[2:]) or (1, 1), stride, dilation)
        yes, reason = backends.supports(backend, problem)
    return None if yes else reason


def _form_refusal(
    name: str, first: Tensor, shape: Sequence[int], block: Sequence[int], window: Sequence[Any], form: hopper.Form
) -> str:
    """Why a form for sm_90a does not do a call: forcing it would run the kernel for all architectures."""
    if not name.endswith("weight_grad"):
        return hopper.supports(name, gather.facts(first.device), first.dtype, shape, block, *window[:2], form)[1]
    if form != FORMS["cuda/N=16"]:
        return "weight gradients have one form: that of N=16"
    return hopper_weight_grad.supports(gather.facts(first.device), first.dtype, shape, block, *window)[1]


def with_relu(name: str, arguments: Sequence[Any]) -> Callable[[], Tensor]:
    """A Triton forward pass with the ReLU fused, which no registered operator reaches."""
    from ddst import kernels

    return partial(getattr(kernels, name), *arguments, relu=True)
