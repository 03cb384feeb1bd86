"""Recording what the dense weight gradient is made of, so that inactive blocks can be scored for growth.

The gradient of a packed weight exists at active blocks only. Growth needs the norm of the *dense* gradient per block.
An operator is called with the key of its layer's :class:`ScoreRecorder`. While that is open, every backward formula
that computes a gradient of the layer's values also hands over its two factors ``(grad_output, input)`` and what the
operator was called with (:data:`Call`); the norms are computed from them later, a layer at a time. Because the formulas
themselves record, gradient accumulation, several forward calls, double backward (a gradient penalty), activation
checkpointing and hooks on saved tensors are all included exactly.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Added to a key: the weight lies in the operator with rows and columns exchanged; with its taps backwards.
TRANSPOSED, FLIPPED = 1, 2

#: What an operator was called with: ``(transposed + 2 · flipped, *weight_shape)``, and for a convolution stride,
#: padding and dilation, two each.
Call = tuple[int, ...]


class GradientRecord:
    """The factors of one layer's dense weight gradient; on the reference backend, that gradient itself.

    Nothing is copied: the factors are the activations of the backward pass, kept alive.

    Attributes:
        accumulated: whether a backward pass has added what is recorded to ``values.grad``.
        norm: L2 norm of ``values.grad`` at the end of that backward pass, float64; None where it has not ended.
        gradient: a copy of ``values.grad`` as it was then, if the recorder keeps it.
    """

    def __init__(self) -> None:
        self.factors: list[tuple[Tensor, Tensor]] = []
        self.calls: list[Call] = []
        self.dense: Tensor | None = None
        self.accumulated = False
        self.norm: Tensor | None = None
        self.gradient: Tensor | None = None
        self._versions: list[tuple[int, int]] = []
        self._spoilt = False

    def add_factors(self, grad_output: Tensor, input: Tensor, call: Call) -> None:
        self.factors.append((grad_output.detach(), input.detach()))
        self.calls.append(call)
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
        self.gradient = None if self.gradient is None else self.gradient.to(device)


def _version(tensor: Tensor) -> int:
    """Counts the changes in place of a tensor's memory."""
    return 0 if tensor.is_inference() else tensor._version


class ScoreRecorder:
    """Where the formulas put what they compute for one layer while it is open.

    A record goes with ``values.grad``: where that is gone at the next backward pass (``zero_grad()`` after a step that
    a gradient scaler skipped, or between the two passes of SAM), what was recorded of it goes, too.

    Attributes:
        key: what the operators are called with so that their formulas find it, plus ``TRANSPOSED`` and
            ``FLIPPED``; never 0, never used twice.
        record: what has come since the last :meth:`take`.
        on_first: called before something comes into an empty record.
        keep_gradient: whether records hold a copy of ``values.grad``.
    """

    def __init__(self) -> None:
        self.key = next(_keys)
        self.record = GradientRecord()
        self.on_first: Callable[[], None] | None = None
        self.keep_gradient = False
        self._values: Tensor | None = None
        self._hook: Any = None

    def add_factors(self, grad_output: Tensor, input: Tensor, call: Call) -> None:
        self._announce()
        self.record.add_factors(grad_output, input, call)

    def add_dense(self, gradient: Tensor) -> None:
        self._announce()
        self.record.add_dense(gradient)

    def _announce(self) -> None:
        values = self._values
        if values is not None:
            if self.record.accumulated and (values.grad is None or not bool(values.grad.any())):
                self.record = GradientRecord()
            if self._hook is None and values.requires_grad:
                self._hook = values.register_post_accumulate_grad_hook(self._note_accumulated)
        if self.on_first is not None and self.record.empty:
            self.on_first()

    def _note_accumulated(self, values: Tensor) -> None:
        if self.record.empty:
            return
        record = self.record
        record.accumulated, record.norm, record.gradient = True, None, None
        engine: Any = torch.autograd.Variable._execution_engine

        def measure() -> None:
            if values.grad is not None:
                record.norm = gradient_norm(values.grad)
                record.gradient = values.grad.detach().clone() if self.keep_gradient else None

        # The callback of a callback runs after all that were there before: DistributedDataParallel's averaging too.
        engine.queue_callback(lambda: engine.queue_callback(measure))

    def take(self) -> GradientRecord:
        """The record, which begins anew."""
        taken, self.record = self.record, GradientRecord()
        return taken

    @property
    def is_open(self) -> bool:
        """Whether formulas record here."""
        return _open.get(self.key) is self

    def open(self, values: Tensor) -> None:
        """From now on formulas record here. ``values``: the parameter whose gradient it is."""
        _open[self.key] = self
        self._values = values

    def close(self) -> None:
        """Ends what :meth:`open` began, and drops what was recorded."""
        _open.pop(self.key, None)
        self.take()
        self.on_first = self._values = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def gradient_norm(gradient: Tensor) -> Tensor:
    """L2 norm, float64 where the device has it: squares of a scaled gradient may leave float32's range."""
    wide = torch.float32 if gradient.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(gradient.detach(), dtype=wide)


_keys = itertools.count(4, 4)
_open: weakref.WeakValueDictionary[int, ScoreRecorder] = weakref.WeakValueDictionary()


def gradient_is_wanted(node: Any) -> bool:
    """Whether the backward pass under way will compute the gradient that goes to ``node``.

    ``ctx.needs_input_grad`` is decided at forward time. During ``autograd.grad(scores, images)``, the first half of a
    gradient penalty, weight gradients are computed with it and thrown away; this asks the engine instead.
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # the engine refuses to answer for a leaf that is itself among the inputs of autograd.grad
        return True


def backward_reaches(tensor: Tensor) -> bool:
    """Whether the backward pass under way will compute a gradient of ``tensor``, which requires one."""
    return gradient_is_wanted(tensor.grad_fn or torch.autograd.graph.get_gradient_edge(tensor).node)


def values_gradient(
    ctx: Any, grad_output: Tensor, input: Tensor, compute: Callable[[], Tensor], settings: Sequence[Sequence[int]] = ()
) -> Tensor | None:
    """The gradient of packed values if it is wanted, recorded if the recorder of ``ctx.record`` is open.

    Args:
        ctx: of the formula; values are its second tensor. settings: of a convolution: stride, padding, dilation.
    """
    if not ctx.needs_input_grad[1]:
        return None
    if torch.compiler.is_compiling():
        gradient = compute()
        if not ctx.record:
            return gradient
        call = [*ctx.weight_shape, *(entry for pair in settings for entry in pair)]
        return torch.ops.ddst.recorded(gradient, grad_output, input, ctx.record, call)
    # Not asked of the saved values: hooks on saved tensors may have handed back copies.
    if not gradient_is_wanted(ctx.next_functions[1][0]):
        return None
    recorder = recorder_of(ctx.record)
    if recorder is None:
        return compute()
    call = [*ctx.weight_shape, *(entry for pair in settings for entry in pair)]
    if torch._C._are_functorch_transforms_active():
        # Its kernel is given tensors that outlive the levels of torch.func, and each sample of a vmap by itself.
        gradient = compute()
        factors = (gradient.detach(), grad_output.detach(), input.detach())
        torch.ops.ddst.recorded(*factors, ctx.record, call)
        return gradient
    recorder.add_factors(grad_output, input, (ctx.record & 3, *call))
    return compute()


def recorder_of(key: int) -> ScoreRecorder | None:
    """The open recorder of a key, if any; what was added to the key does not matter."""
    return _open.get(key & ~3)


@torch.library.custom_op("ddst::recorded", mutates_args=())
def _recorded(gradient: Tensor, grad_output: Tensor, input: Tensor, record: int, call: Sequence[int]) -> Tensor:
    """The gradient itself; its factors go to a recorder. What a compiled graph calls, whose code cannot ask for one.

    The factors are copied: a compiled graph may use their memory again.
    """
    recorder = recorder_of(record)
    if recorder is not None:
        recorder.add_factors(grad_output.clone(), input.clone(), (record & 3, *call))
    return gradient.clone()


@_recorded.register_fake
def _recorded_fake(gradient: Tensor, grad_output: Tensor, input: Tensor, record: int, call: Sequence[int]) -> Tensor:
    return torch.empty_like(gradient)
