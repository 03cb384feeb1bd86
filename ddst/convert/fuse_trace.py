"""What a model's code does with its activations, read off by ``torch.fx``: nothing of the model is replaced."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils import checkpoint

from ..nn import SparseLayer
from ..nn.deferred.plan import hooked
from ..nn.packed.callers import inside_a_function
from ..nn.packed.parameter import HoldsPackedParameters
from .watch import undisturbed

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

#: What calls the one module inside of it as it is.
WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


@dataclass(eq=False)
class Call:
    """A call of a module.

    Attributes:
        arguments: by position or name, those that are values of the graph. outputs: such values that it returned.
    """

    module: nn.Module
    arguments: dict[int | str, Node]
    outputs: tuple[Node, ...] = ()


@dataclass(eq=False)
class Trace:
    """The code of a module, and of those that it calls.

    Attributes:
        calls: in order; the first is that of the module itself.
        scopes: ``node -> calls that were running``, the outermost first.
        leaves: ``node -> call`` of modules whose code is not looked into.
    """

    graph: Graph
    calls: list[Call]
    scopes: dict[Node, tuple[Call, ...]]
    leaves: dict[Node, Call] = field(default_factory=dict)

    def module(self, node: Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.leaves[node].module if node in self.leaves else None


def _seen_elsewhere(value: Any) -> Any:
    """Stands in a graph for a module with hooks, which may do anything with what goes through them."""
    return value


class _Tracer(Tracer):
    """Decides itself what is a leaf: what is torch's own, sparse, or of a subclass of a layer; not user's blocks."""

    def __init__(self, root: nn.Module) -> None:
        # A checkpoint is a leaf: what it calls may run again.
        wrapped: Any = (math, checkpoint)
        super().__init__(autowrap_modules=wrapped)
        self.own = Call(root, {})
        self.calls, self.running = [self.own], [self.own]
        self.scopes: dict[Node, tuple[Call, ...]] = {}
        self.leaves: dict[Node, Call] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node: Node = super().create_node(*args, **kwargs)
        if inside_a_function():
            raise RuntimeError("it calls a torch.autograd.Function")
        self.scopes[node] = tuple(self.running)
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        call = Call(m, {place: value.node for place, value in given if isinstance(value, Proxy)})
        self.calls.append(call)
        if is_leaf(m):
            output = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
            self.leaves[output.node] = call
        elif hooked(m):
            args, kwargs = self._barrier(args), self._barrier(kwargs)
            output = self._barrier(self._inside(call, m, args, kwargs))
        else:
            output = self._inside(call, m, args, kwargs)
        call.outputs = tuple(proxy.node for proxy in _proxies_in(output))
        return output

    def _inside(self, call: Call, m: nn.Module, args: Any, kwargs: Any) -> Any:
        self.running.append(call)
        try:
            return m.forward(*args, **kwargs)  # not its hooks
        finally:
            self.running.pop()

    def _barrier(self, value: Any) -> Any:
        if isinstance(value, Proxy):
            return self.create_proxy("call_function", _seen_elsewhere, (value,), {})
        if isinstance(value, dict):
            return {key: self._barrier(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._barrier(item) for item in value)
        return value


def is_leaf(module: nn.Module) -> bool:
    """Whether a module's code is not looked into."""
    if isinstance(module, SparseLayer | HoldsPackedParameters):
        return True
    kind = type_before_parametrizations(module)
    if any(base.__module__.startswith("ddst.nn") for base in kind.__mro__):
        return True
    own = [base for base in kind.__mro__ if base.__module__.startswith("torch.nn.modules")]
    # The first of torch's classes: nn.Module for blocks of somebody's.
    return own[0] is not nn.Module and not issubclass(kind, CONTAINERS)


def trace_of(module: nn.Module) -> Trace:
    """Runs a module's code on stand-ins; arguments that have defaults have those.

    Raises:
        Exception: the code cannot be run so; of any kind.
    """
    tracer = _Tracer(module)
    parameters = inspect.signature(module.forward).parameters
    constants = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    with undisturbed(module), torch.no_grad():
        graph = tracer.trace(module, constants or None)
    given = [node for node in graph.nodes if node.op == "placeholder" and not node.target.startswith("*")]
    places = [name for name in parameters if name not in constants]
    for node in given:
        if node.target in places:
            tracer.own.arguments[places.index(node.target)] = node
    return Trace(graph, tracer.calls, tracer.scopes, tracer.leaves)


def traces_of(model: nn.Module) -> tuple[list[Trace], dict[str, str]]:
    """The code of a model, in as few pieces as can be traced; and ``{name: why}`` of modules that cannot be.

    Where the code of a module cannot, that of its children is tried; so is that of modules which were not called.
    """
    traces: list[Trace] = []
    failures: dict[str, str] = {}
    called: set[int] = set()

    def explore(name: str, module: nn.Module, runs: bool) -> None:
        if is_leaf(module):
            return
        wraps = isinstance(module, WRAPPERS) or hasattr(module, "_orig_mod")  # torch.compile(module)
        if runs and not wraps and id(module) not in called:
            called.add(id(module))
            try:
                trace = trace_of(module)
            except Exception as error:
                message = (str(error).splitlines() or [""])[0].partition(". ")[0]
                failures[name] = f"{type(error).__name__}: {message}"
            else:
                traces.append(trace)
                called.update(id(call.module) for call in trace.calls)
        for child_name, child in module.named_children():
            # A container may be there for its parts only, which other code calls; a chain of leaves is hardly.
            whole = not isinstance(child, CONTAINERS) or (
                isinstance(child, nn.Sequential) and all(is_leaf(part) for part in child)
            )
            explore(f"{name}.{child_name}" if name else child_name, child, wraps or whole)

    explore("", model, not isinstance(model, nn.ModuleList | nn.ModuleDict))
    return traces, failures


def _proxies_in(value: Any) -> Iterator[Proxy]:
    if isinstance(value, Proxy):
        yield value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for item in items:
        yield from _proxies_in(item)
