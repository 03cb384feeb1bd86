"""Derivatives of the registered operators.

Like ``torch.library.register_autograd``, this puts a Python kernel under the dispatch key Autograd. torch's reads the
operator's schema at every call, which takes longer than a small layer computes; this one reads it once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("ddst", "IMPL")


def register_autograd(
    name: str, backward: Callable[..., tuple[Tensor | None, ...]], setup_context: Callable[..., None]
) -> None:
    """Makes ``ddst::name`` differentiable, with formulas such as torch's ``register_autograd`` takes.

    ``setup_context`` gets every argument of the schema, defaults included.
    """
    operator = getattr(torch.ops.ddst, name).default
    defaults = tuple(argument.default_value for argument in operator._schema.arguments)

    def compute(keyset: Any, args: tuple[Any, ...]) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *args: Any) -> Tensor:
        *given, keyset = args
        output = compute(keyset, tuple(given))
        # The dispatcher drops trailing arguments that have their default values.
        setup_context(ctx, (*given, *defaults[len(given) :]), output)
        return output

    def gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(ctx, *grads), None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function: Any = type(f"ddst_{name}", (torch.autograd.Function,), methods)

    def kernel(keyset: Any, *args: Any) -> Tensor:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, keyset)
        return compute(keyset, args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)
