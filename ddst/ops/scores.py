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


class GradientRecord:
    """The factors of one layer's dense weight gradient; on the reference backend, that gradient itself.

    Nothing is copied: the factors are the activations of the backward pass, kept alive.
    """

    def __init__(self) -> None:
        self.factors: list[tuple[Tensor, Tensor]] = []
        self.dense: Tensor | None = None
        self._versions: list[tuple[int, int]] = []
        self._spoilt = False

    def add_factors(self, grad_output: Tensor, input: Tensor) -> None:
        self.factors.append((grad_output.detach(), input.detach()))
        self._versions.append((_version(grad_output), _version(input)))

    def add_dense(self, gradient: Tensor) -> None:
        detached = gradient.detach()
        self.dense = detached.clone() if self.dense is None else self.dense + detached

    @property
    def empty(self) -> bool:
        return not self.factors and self.dense is None

    @property
    def intact(self) -> bool:
        """Whether the factors are still what they were in the backward pass."""
        return not self._spoilt and self._versions == [(_version(g), _version(x)) for g, x in self.factors]

    def to(self, device: torch.device) -> None:
        """Takes the record along when its layer moves."""
        self._spoilt = not self.intact
        self.factors = [(g.to(device), x.to(device)) for g, x in self.factors]
        self._versions = [(_version(g), _version(x)) for g, x in self.factors]
        self.dense = None if self.dense is None else self.dense.to(device)


def _version(tensor: Tensor) -> int:
    """Counts the changes in place of a tensor's memory."""
    return 0 if tensor.is_inference() else tensor._version


class ScoreRecorder:
    """Where the formulas put what they compute for one topology vector.

    Attributes:
        record: what has come since the last :meth:`take`.
        topology: the vector, held so that its address belongs to nothing else while the recorder is open.
        on_first: called before something comes into an empty record.
    """

    def __init__(self) -> None:
        self.record = GradientRecord()
        self.topology: Tensor | None = None
        self.on_first: Callable[[], None] | None = None
        self._address = 0

    def add_factors(self, grad_output: Tensor, input: Tensor) -> None:
        self._announce()
        self.record.add_factors(grad_output, input)

    def add_dense(self, gradient: Tensor) -> None:
        self._announce()
        self.record.add_dense(gradient)

    def _announce(self) -> None:
        if self.on_first is not None and self.record.empty:
            self.on_first()

    def take(self) -> GradientRecord:
        """The record, which begins anew."""
        taken, self.record = self.record, GradientRecord()
        return taken

    def open(self, topology: Tensor) -> None:
        """Directs here what the formulas compute for this topology, and no other. The caller keeps the recorder alive.

        A vector without memory (on the meta device) has no address to be known by, and nothing is computed with it.
        """
        self.close()
        self.topology = topology
        self._address = topology.data_ptr()
        if self._address:
            _open[self._address] = self

    def close(self) -> None:
        """Ends what :meth:`open` began; nothing happens when nothing is open."""
        if _open.get(self._address) is self:
            del _open[self._address]
        self.topology, self._address = None, 0


# The key is the address of the topology vector: autograd hands the formulas the same storage the layer holds.
_open: weakref.WeakValueDictionary[int, ScoreRecorder] = weakref.WeakValueDictionary()


def recorder_of(topology: Tensor) -> ScoreRecorder | None:
    """The recorder open for a topology, if any. Under tracing there is none: a layer that records runs eagerly."""
    if not _open or type(topology) not in (Tensor, torch.nn.Parameter):
        return None
    address = topology.data_ptr()
    recorder = _open.get(address)
    # Memory can move under a tensor (share_memory_), and its former address can become another layer's.
    if recorder is None or recorder.topology is None or recorder.topology.data_ptr() != address:
        return None
    return recorder


def gradient_is_wanted(tensor: Tensor) -> bool:
    """Whether the backward pass under way will use a gradient of ``tensor``.

    ``ctx.needs_input_grad`` is decided at forward time. During ``autograd.grad(scores, images)``, the first half of a
    gradient penalty, weight gradients are computed with it and thrown away; this asks the engine instead.
    """
    if torch.compiler.is_compiling() or not tensor.requires_grad:
        return tensor.requires_grad
    return backward_reaches(tensor)


def backward_reaches(tensor: Tensor) -> bool:
    """Whether the backward pass under way will compute a gradient of ``tensor``, which requires one."""
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
