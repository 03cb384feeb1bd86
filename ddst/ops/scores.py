"""Recording what the dense weight gradient is made of, so that inactive blocks can be scored for growth.

The gradient of a packed weight exists at active blocks only. Growth needs the norm of the *dense* gradient per block.
While a :class:`ScoreRecorder` is open for a topology, every backward formula that computes a gradient of its values
also hands over its two factors ``(grad_output, input)``; the norms are computed from them later, a layer at a time.
Because the formulas themselves record, gradient accumulation, several forward calls and double backward (a gradient
penalty) are all included exactly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ScoreRecorder:
    """Collects the factors of one layer's dense weight gradient; on the reference backend, that gradient itself."""

    def __init__(self) -> None:
        self.factors: list[tuple[Tensor, Tensor]] = []
        self.dense: Tensor | None = None

    def add_factors(self, grad_output: Tensor, input: Tensor) -> None:
        self.factors.append((grad_output.detach(), input.detach()))

    def add_dense(self, gradient: Tensor) -> None:
        detached = gradient.detach()
        self.dense = detached.clone() if self.dense is None else self.dense + detached

    def clear(self) -> None:
        self.factors = []
        self.dense = None

    @property
    def empty(self) -> bool:
        return not self.factors and self.dense is None


# The key is the address of the topology vector: autograd hands the formulas the same storage the layer holds.
_open: weakref.WeakValueDictionary[int, ScoreRecorder] = weakref.WeakValueDictionary()


def open_recorder(topology: Tensor, recorder: ScoreRecorder) -> None:
    """Directs to ``recorder`` what the formulas compute for this topology. The caller keeps it alive."""
    _open[topology.data_ptr()] = recorder


def close_recorder(topology: Tensor) -> None:
    """Ends what :func:`open_recorder` began; nothing happens when nothing is open."""
    _open.pop(topology.data_ptr(), None)


def recorder_of(topology: Tensor) -> ScoreRecorder | None:
    """The recorder open for a topology, if any. Under tracing there is none: a layer that records runs eagerly."""
    if not _open or type(topology) not in (Tensor, torch.nn.Parameter):
        return None
    return _open.get(topology.data_ptr())


def gradient_is_wanted(tensor: Tensor) -> bool:
    """Whether the backward pass under way will use a gradient of ``tensor``.

    ``ctx.needs_input_grad`` is decided at forward time. During ``autograd.grad(scores, images)``, the first half of a
    gradient penalty, weight gradients are computed with it and thrown away; this asks the engine instead.
    """
    if torch.compiler.is_compiling() or not tensor.requires_grad:
        return tensor.requires_grad
    node = tensor.grad_fn or torch.autograd.graph.get_gradient_edge(tensor).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # the engine refuses to answer for a leaf that is itself among the inputs of autograd.grad
        return True


def values_gradient(
    ctx: Any, values: Tensor, topology: Tensor, grad_output: Tensor, input: Tensor, compute: Callable[[], Tensor]
) -> Tensor | None:
    """The gradient of packed values if it is wanted, recorded if the topology has an open recorder."""
    if not ctx.needs_input_grad[1] or not gradient_is_wanted(values):
        return None
    recorder = recorder_of(topology)
    if recorder is not None:
        recorder.add_factors(grad_output, input)
    return compute()
