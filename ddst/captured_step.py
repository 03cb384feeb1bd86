"""A training step as one CUDA graph, over which blocks may move."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from ._arguments import check_int, check_type
from .nn import sparse_layers
from .nn.base import SparseLayer

__all__ = ["CapturedStep", "capture"]

_log = logging.getLogger("ddst")
Result = TypeVar("Result")


class CapturedStep(Generic[Result]):
    """What :func:`ddst.capture` returns: call it as the step.

    Attributes:
        captures: how often the step has been captured. replays: how often a graph ran in its place.
    """

    def __init__(self, step: Callable[..., Result], parts: tuple[nn.Module | Optimizer, ...], warmups: int) -> None:
        self.captures = self.replays = 0
        self._step, self._warmups = step, warmups
        self._modules = [part for part in parts if isinstance(part, nn.Module)]
        self._optimizers = [part for part in parts if isinstance(part, Optimizer)]
        self._stream = torch.cuda.Stream()
        self._forget()

    def _forget(self) -> None:
        self._graph: Any = None
        self._settings: Any = None
        self._signature: Any = None
        self._inputs: list[Any] = []
        self._result: Any = None
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        self._waiting = self._warmups

    @property
    def _layers(self) -> Iterator[SparseLayer]:
        for module in self._modules:
            yield from sparse_layers(module).values()

    def __call__(self, *inputs: Any) -> Result:
        """A step on these inputs. Tensors that it returns are those of a graph: the next call overwrites them."""
        leaves, form = tree_flatten(inputs)
        signature = form, [_kind(leaf) for leaf in leaves]
        settings = self._present_settings()
        if self._graph is not None and settings != self._settings:
            self._say_why(settings)
            self._forget()
        if any(layer.scores_requested for layer in self._layers):
            return self._eagerly(inputs)  # what scores are made of is recorded by Python
        if self._graph is None:
            if self._waiting > 0:
                self._waiting -= 1
                return self._eagerly(inputs)
            self._capture(leaves, form, signature, settings)
        elif signature != self._signature:
            return self._eagerly(inputs)
        return self._replay(leaves)

    def _eagerly(self, inputs: tuple[Any, ...]) -> Result:
        """The step itself, on the stream that it is captured on: autograd remembers where gradients are summed."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._step(*inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _capture(self, leaves: list[Any], form: Any, signature: Any, settings: Any) -> None:
        self._inputs = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._signature, self._settings = signature, settings
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._result = self._step(*tree_unflatten(self._inputs, form))
        except BaseException:
            self._forget()
            raise
        self._graph = graph
        self._gradients = [(p, p.grad) for module in self._modules for p in module.parameters()]
        self.captures += 1
        _log.info("a step was captured as a CUDA graph, the %d. time", self.captures)

    def _replay(self, leaves: list[Any]) -> Result:
        for held, given in zip(self._inputs, leaves, strict=True):
            if isinstance(held, Tensor):
                held.copy_(given, non_blocking=True)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            if parameter.grad is not gradient:  # a step without the graph came in between
                parameter.grad = gradient
        self.replays += 1
        result: Result = self._result
        return result

    # --- what a graph was captured for ------------------------------------------------------------------------------

    def _present_settings(self) -> tuple[Any, ...]:
        """What is in a graph for good: another one needs another graph."""
        storage = [layer.storage_version for layer in self._layers]
        modes = [(m.training, getattr(m, "backend", None)) for module in self._modules for m in module.modules()]
        wanted = [p.requires_grad for module in self._modules for p in module.parameters()]
        numbers = [
            [(name, value) for name, value in group.items() if isinstance(value, bool | int | float | tuple | str)]
            for optimizer in self._optimizers
            for group in optimizer.param_groups
        ]
        return storage, modes, wanted, numbers

    def _say_why(self, settings: tuple[Any, ...]) -> None:
        names = ("the storage of packed values", "modes or backends of modules", "which parameters are trained",
                 "settings of an optimizer")  # fmt: skip
        changed = [n for n, old, new in zip(names, self._settings, settings, strict=True) if old != new]
        _log.info("a captured step will be captured anew: %s changed", " and ".join(changed))


def _kind(leaf: Any) -> Any:
    """What of an input must stay for a graph to serve: shape, dtype and layout of a tensor, or the thing itself."""
    if not isinstance(leaf, Tensor):
        return leaf
    return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad


def capture(step: Callable[..., Result], *parts: nn.Module | Optimizer, warmups: int = 3) -> CapturedStep[Result]:
    """``captured(*inputs)`` does what ``step(*inputs)`` does, from the fourth call on as one CUDA graph.

    Forward and backward passes and the steps of optimizers, of a generator and a discriminator, say, are launched at
    once, without Python. Blocks may move between calls, and their number may change within the slots that are there
    (``reserve``): the graph walks index lists that are rewritten in place, and is not captured anew. Where storage
    grows or shrinks it is, by itself; likewise where a module's mode, a backend, or a number in an optimizer's groups
    changes (a learning rate that changes often should be a tensor).

    Args:
        step: a function of tensors (nested in lists, tuples and dicts, beside other values). It sets gradients to None
            before each backward pass, and does not wait for the device (``loss.item()``). What it does beside is done
            in the calls without a graph only.
        parts: the modules and optimizers that it uses. Optimizers need ``capturable=True``, where they have it.
        warmups: how many calls run as they are before the step is captured, in the beginning and after each change:
            kernels are compiled and optimizer state is made. They are steps like any other.

    Returns:
        A function of the same inputs with the same results. Results of a graph lie in its memory, which the next call
        overwrites. Calls with inputs of other shapes than those captured, and calls while growth scores are requested,
        run without the graph.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: torch sees no CUDA device, or parameters lie elsewhere.

    Numerics: the same as without, bit for bit, random numbers included.

    Cost: the launches of a step; memory of its own for everything that lives within it. A capture takes as long as
    about two steps.

    Example::

        adam_g, adam_d = (torch.optim.Adam(net.parameters(), 2e-4, capturable=True) for net in (G, D))
        step = ddst.capture(iteration, G, D, adam_g, adam_d)
        for reals in batches:
            losses = step(reals)
    """
    if not callable(step):
        raise TypeError(f"step must be a function, got {type(step).__name__}")
    kinds: Any = nn.Module | Optimizer
    for part in parts:
        check_type("parts", part, kinds, "torch.nn.Modules and torch.optim.Optimizers")
    check_int("warmups", warmups, 1)
    modules = [part for part in parts if isinstance(part, nn.Module)]
    if not modules:
        raise ValueError("parts must hold the modules that step uses, got none")
    if not torch.cuda.is_available():
        raise RuntimeError("capture makes a CUDA graph, and torch sees no CUDA device here")
    elsewhere = sorted({str(p.device) for m in modules for p in m.parameters() if not _on_device(p)})
    if elsewhere:
        raise RuntimeError(f"parts must be on a CUDA device, got parameters on {', '.join(elsewhere)}")
    return CapturedStep(step, parts, warmups)


def _on_device(parameter: Tensor) -> bool:
    return parameter.is_cuda
