"""Derivatives of the registered operators.

Like ``torch.library.register_autograd``, this puts a Python kernel under the dispatch key Autograd. torch's reads the
operator's schema at every call, which takes longer than a small layer computes; this one reads it once, and knows
forward-mode derivatives and the transforms of ``torch.func``.

Each way through the dispatcher into Python and back takes as long as a small layer's product. So layers call what
:func:`register_autograd` returns, which goes to the derivative directly, and the formulas of derivatives call
:func:`derived`, which goes below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.nn import Parameter

_library = torch.library.Library("ddst", "IMPL")
#: Operator -> what ``torch.onnx.export`` writes for it (:mod:`ddst.ops.onnx_export`).
formulas: dict[str, Callable[..., Any]] = {}


def register_autograd(
    name: str,
    backward: Callable[..., tuple[Tensor | None, ...]],
    setup_context: Callable[..., None],
    linear_in: Sequence[int],
    bias: int | None = None,
) -> Callable[..., Tensor]:
    """Makes ``ddst::name`` differentiable, with formulas such as torch's ``register_autograd`` takes.

    ``setup_context`` gets every argument of the schema, defaults included.

    Args:
        linear_in: positions of the arguments in which the operator, without its bias, is linear: its forward-mode
            derivative is the sum of its values with one of them at a time replaced by the tangent.
        bias: position of the bias, if it has one.

    Returns:
        The operator, of all its arguments by position.
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

    def plain_forward(ctx: Any, *args: Any) -> Tensor:
        output: Tensor = below(operator, args)
        setup_context(ctx, args, output)
        return output

    def forward_keeping(ctx: Any, *args: Any) -> Tensor:
        ctx.arguments = args[:-1]
        return forward(ctx, *args)

    def tangent(ctx: Any, *tangents: Any) -> Tensor:
        arguments = list(ctx.arguments)
        del ctx.arguments
        total = None
        if bias is not None:
            arguments[bias] = None
        for position in linear_in:
            if tangents[position] is not None:
                changed = [*arguments]
                changed[position] = tangents[position]
                part = operator(*changed)
                total = part if total is None else total + part
        if bias is not None and tangents[bias] is not None:
            along = tangents[bias].view(-1, *[1] * (arguments[0].dim() - 2))
            total = operator(*arguments).zero_() + along if total is None else total + along
        assert total is not None
        return total

    def made(base: type, forward: Callable[..., Tensor], gradients: Any = gradients, **more: Any) -> Any:
        methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients), **more}
        return type(f"ddst_{name}", (base,), methods)

    jvp = staticmethod(tangent)
    function = made(torch.autograd.Function, forward)
    plain_function = made(torch.autograd.Function, plain_forward, backward)
    dual_function = made(torch.autograd.Function, forward_keeping, jvp=jvp)
    lifted_function = made(_SingleLevelFunction, _lifted(forward))
    lifted_dual_function = made(_SingleLevelFunction, _lifted(forward_keeping), jvp=jvp)

    def kernel(keyset: Any, *args: Any) -> Tensor:
        if exported(name, args):
            return formulas[name](*args)
        if has_tangent(args):
            chosen, lifted = dual_function, lifted_dual_function
        elif torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            chosen, lifted = function, lifted_function
        else:
            return compute(keyset, args)
        if torch._C._are_functorch_transforms_active():
            # The levels of torch.func are already taken apart: this is an ordinary derivative within one of them.
            with enable_single_level_autograd_function():
                return lifted.apply(*args, keyset)
        return chosen.apply(*args, keyset)

    _library.impl(name, kernel, "Autograd", with_keyset=True)

    def call(*args: Any) -> Tensor:
        result: Tensor
        if not nothing_listens(args):
            result = operator(*args)
        elif torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            result = plain_function.apply(*args)
        else:
            result = below(operator, args)
        return result

    return call


def below(operator: Any, args: Sequence[Any]) -> Any:
    """An operator without its derivative."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def derived(operator: Any, *args: Any) -> Any:
    """An operator within the formula of a derivative: past the dispatcher where nothing listens and no graph is made.

    Around the operator only: what else a formula does, such as unpacking saved tensors, may make graphs of its own.
    """
    if not nothing_listens(args) or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        return operator(*args)
    return below(operator, args)


def exported(name: str, args: Sequence[Any]) -> bool:
    """Whether ``torch.onnx.export`` asks for an operator: with fake tensors, where other threads go on with theirs."""
    return torch.onnx.is_in_onnx_export() and name in formulas and not _PLAIN.issuperset(map(type, args))


#: Types of arguments that nothing can hide in.
_PLAIN = {Tensor, Parameter, torch.Size, type(None), list, tuple, int, float, bool}


def nothing_listens(args: Sequence[Any]) -> bool:
    """Whether a call is one of torch's own tensors in eager mode, which no tracer, transform or mode follows.

    Modes of dispatch (fake tensors, counters of operators) see what runs below the derivative, too.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ) and _PLAIN.issuperset(map(type, args))


def _lifted(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``forward`` of one level of ``torch.func``, below which further levels may differentiate."""

    def lifted(*args: Any) -> Tensor:
        # An autograd function computes without derivatives, those of the levels below included.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return forward(*args)

    return lifted


def has_tangent(args: Sequence[Any]) -> bool:
    """Whether an argument is a dual tensor, of ``torch.autograd.forward_ad`` or ``torch.func.jvp``."""
    # torch._C._is_fwd_grad_enabled says yes outside of any level, too, where inference tensors cannot be asked.
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(a, Tensor) and torch._unpack_dual(a, level=0)[1] is not None for a in args)
