"""What a node of a traced graph does to an activation: norm, activation, upsampling, pooling, sum."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.nn.utils.parametrize import type_before_parametrizations

from ..nn import SparseConv2d, SparseLayer
from ..nn.deferred.functions import doubles, halves
from ..nn.deferred.plan import hooked, is_norm
from ..nn.deferred.run import refusal
from .fuse_trace import Trace

_RELU = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_LEAKY = {F.leaky_relu, F.leaky_relu_, torch._C._nn.leaky_relu_}
_MUL = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE = {operator.iadd, operator.imul, operator.isub, operator.itruediv}

#: Where torch's own modules stand that do nothing with their input but hand it to functions.
_FUNCTIONAL = (
    "conv", "batchnorm", "normalization", "instancenorm", "activation", "pooling", "upsampling", "padding", "flatten",
    "dropout", "pixelshuffle", "linear",
)  # fmt: skip


class State(NamedTuple):
    """What an activation has behind it, as :class:`~ddst.nn.deferred.work.Activated` keeps it."""

    norm: bool = False
    scale: bool = False
    shift: bool = False
    act: bool = False
    up: bool = False


class Step(NamedTuple):
    """A node that can be put off: its kind, its name in reports, and what the value is afterwards."""

    kind: str
    name: str
    state: State


def step_of(trace: Trace, node: Node, value: Node, state: State) -> Step | None:
    """What a node does to a value, if that can be put off in this state of the value."""
    module = trace.module(node)
    if module is not None:
        return _module_step(module, state) if reads(trace, node, value) and not hooked(module) else None
    target = node.target
    if target in _MUL or target in _ADD:
        return _affine_step(node, value, state, target in _MUL)
    if node.op == "placeholder" or not reads(trace, node, value):
        return None
    if target in _RELU or target in _LEAKY:
        slope = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
        fits = not state.act and (target in _RELU or isinstance(slope, int | float))
        return Step("act", "relu" if target in _RELU else "leaky_relu", state._replace(act=True)) if fits else None
    if target is F.interpolate:
        named = dict(zip(("size", "scale_factor", "mode", "align_corners"), node.args[1:], strict=False)) | node.kwargs
        settings = (named.get("size"), named.get("scale_factor"), named.get("mode", "nearest"))
        fits = doubles(*settings, named.get("align_corners"), named.get("antialias", False)) and not state.up
        return Step("up", "2x", state._replace(up=True)) if fits else None
    if target is F.batch_norm and state == State():
        affine = any(a is not None for a in (*node.args[3:5], node.kwargs.get("weight"), node.kwargs.get("bias")))
        return Step("norm", "batch_norm", State(True, affine, affine))
    return None


def _module_step(module: nn.Module, state: State) -> Step | None:
    name = type(module).__name__
    if is_norm(module):
        affine = bool(module.affine)
        return Step("norm", name, State(True, affine, affine)) if state == State() else None
    if type(module) in (nn.ReLU, nn.LeakyReLU):
        return None if state.act else Step("act", name, state._replace(act=True))
    if type(module) in (nn.Upsample, nn.UpsamplingNearest2d):
        m: Any = module
        fits = doubles(m.size, m.scale_factor, m.mode, m.align_corners) and not state.up
        return Step("up", "2x", state._replace(up=True)) if fits else None
    return None


def _affine_step(node: Node, value: Node, state: State, scales: bool) -> Step | None:
    operands = [a for a in node.args if isinstance(a, Node)]
    if len(operands) != 2 or operands[0] is operands[1] or node.kwargs or value not in operands:
        return None
    other = operands[1] if operands[0] is value else operands[0]
    free = not (state.scale or state.shift) if scales else not state.shift
    if not state.norm or state.act or state.up or not free or not per_channel(other):
        return None
    return Step(
        "scale" if scales else "shift",
        "scale" if scales else "shift",
        state._replace(**{"scale" if scales else "shift": True}),
    )


def per_channel(node: Node) -> bool:
    """Whether a value is seen to have the shape ``[…, 1, 1]``."""
    args = node.args
    if node.target is operator.getitem and isinstance(args[1], tuple):
        return len(args[1]) > 2 and args[1][-2:] == (None, None)
    if node.op == "call_method" and node.target in ("view", "reshape"):
        sizes = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
        return tuple(sizes[-2:]) == (1, 1)
    if node.op == "call_method" and node.target == "unsqueeze":
        inner: Any = args[0]
        twice = isinstance(inner, Node) and inner.op == "call_method" and inner.target == "unsqueeze"
        return twice and args[1] in (-1, 3) and inner.args[1] in (-1, 2)
    if node.target in (operator.add, torch.add, operator.mul, torch.mul, operator.sub):
        nodes = [a for a in args if isinstance(a, Node)]
        return len(nodes) == 1 and all(isinstance(a, Node | int | float) for a in args) and per_channel(nodes[0])
    return False


def conv_at(trace: Trace, node: Node) -> SparseConv2d | None:
    """The block-sparse convolution that a node calls, if it can take up what is around it."""
    module = trace.module(node)
    return module if isinstance(module, SparseConv2d) and not hooked(module) and refusal(module) is None else None


def reads_chain(trace: Trace, node: Node) -> bool:
    """Whether a node calls a dense convolution that runs what is put off in front of it."""
    module = trace.module(node)
    return isinstance(module, nn.Conv2d) and getattr(type(module), "reads_deferred", False) and not hooked(module)


def is_pool(trace: Trace, node: Node, value: Node) -> bool:
    """Whether a node takes the means of 2x2 pixels of a value."""
    if not reads(trace, node, value):
        return False
    module: Any = trace.module(node)
    if type(module) is nn.AvgPool2d:
        settings = (module.kernel_size, module.stride, module.padding, module.ceil_mode, module.divisor_override)
        return halves(*settings) and not hooked(module)
    if node.target is not F.avg_pool2d:
        return False
    places = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = dict(zip(places, node.args[1:], strict=False)) | node.kwargs
    rest = (given.get("padding", 0), given.get("ceil_mode", False), given.get("divisor_override"))
    return halves(given.get("kernel_size"), given.get("stride"), *rest)


def other_summand(node: Node, value: Node) -> Node | None:
    """What a node adds to a value, not overwriting anything else."""
    if node.target not in _ADD or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if not isinstance(first, Node) or not isinstance(second, Node) or first is second or value not in node.args:
        return None
    return None if overwritten(node) not in (None, value) else second if first is value else first


def overwritten(node: Node, module: nn.Module | None = None) -> Node | None:
    """The value that a node changes in place, or None."""
    target, first = node.target, node.args[0] if node.args else None
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    method = node.op != "call_module" and name.endswith("_") and not name.endswith("__")
    inplace = node.kwargs.get("inplace", getattr(module, "inplace", False)) is True
    changes = target in _IN_PLACE or method or inplace or name == "setitem"
    return first if changes and isinstance(first, Node) else None


def users(trace: Trace, value: Node) -> Iterator[Node]:
    """The nodes that use a value, behind modules that hand it on as it is."""
    for user in value.users:
        if hands_through(trace, user):
            yield from users(trace, user)
        else:
            yield user


def hands_through(trace: Trace, node: Node) -> bool:
    """Whether a node calls a module that returns what it gets."""
    module = trace.module(node)
    return type(module) is nn.Identity and not hooked(module)


def reads(trace: Trace, node: Node, value: Node) -> bool:
    """Whether a value is the first argument of a function or layer."""
    given = input_of(node)
    while isinstance(given, Node) and given is not value and hands_through(trace, given):
        given = input_of(given)
    return given is value


def takes_objects(trace: Trace, node: Node) -> bool:
    """Whether a node is sure to hand what it gets to torch's functions, which see that it is deferred."""
    if node.op == "output":
        return False
    if node.op == "call_method":
        return True
    module = trace.module(node)
    if module is None:
        place = getattr(node.target, "__module__", None) or ""
        builtin = node.target in (getattr, len) or type(node.target).__name__ in ("builtin_function_or_method",)
        return (
            builtin or place in ("_operator", "math") or place in ("torch", "torch.nn.functional", "torch.functional")
        )
    if isinstance(module, SparseLayer):
        return not hooked(module)
    kind = type_before_parametrizations(module)
    place, _, name = kind.__module__.rpartition(".")
    plain = place == "torch.nn.modules" and name in _FUNCTIONAL
    return plain and kind not in (nn.MultiheadAttention, nn.SyncBatchNorm) and not hooked(module)


def described(trace: Trace, node: Node) -> str:
    """A node in a report."""
    module = trace.module(node)
    if module is not None:
        return f"{type_before_parametrizations(module).__name__}"
    if node.op in ("placeholder", "output"):
        return "the input" if node.op == "placeholder" else "the output"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return {"_seen_elsewhere": "a module with hooks", "iadd": "a sum", "add": "a sum", "add_": "a sum"}.get(name, name)


_VIEWS = {
    "view", "view_as", "reshape", "contiguous", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze",
    "expand", "detach", "chunk", "split", "narrow", "to", "getitem", "getattr", "float", "double",
}  # fmt: skip


def memory_of(trace: Trace, node: Node) -> Node:
    """The first value that may lie in the same memory."""
    while True:
        module = trace.module(node)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        same = isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d | nn.Flatten | nn.Unflatten)
        before = overwritten(node, module) or (input_of(node) if same or (module is None and name in _VIEWS) else None)
        if not isinstance(before, Node):
            return node
        node = before


def input_of(node: Node) -> Any:
    """The first argument of a function or layer."""
    return node.args[0] if node.args else node.kwargs.get("input")
