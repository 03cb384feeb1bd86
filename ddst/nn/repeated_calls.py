"""Tells the forward call that activation checkpointing repeats from a new one."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")

#: Results kept at most. They end with the weights they belong to; this is for loops that step no optimizer.
KEPT = 64

_never_repeated = ContextVar("never_repeated", default=False)


@contextmanager
def never_repeated() -> Iterator[None]:
    """No backward pass repeats the forward calls inside: no random number is drawn to name them by.

    >>> with torch.no_grad(), never_repeated():
    ...     may_be_checkpointed()
    False
    """
    before = _never_repeated.set(True)
    try:
        yield
    finally:
        _never_repeated.reset(before)


def may_be_checkpointed() -> bool:
    """Whether the present forward call may be repeated in a backward pass, or be such a repetition.

    Checkpointing runs the forward pass without gradients (reentrant) or under hooks for saved tensors (not reentrant),
    and its repetition inside a backward pass. Compiled graphs repeat operators, not calls of Python.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch.is_inference_mode_enabled():
        return False
    if _never_repeated.get():
        return False
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return hooked or not torch.is_grad_enabled() or _in_backward()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class RepeatedCalls(Generic[Result]):
    """Returns again, when a call is repeated in a backward pass, what the call returned the first time.

    Checkpointing of either kind, nested too, by torch or by others, restores one thing before it repeats a call: the
    state of the random numbers. So a number drawn from it names a call, whichever of several comes back first.

    >>> calls = RepeatedCalls()
    >>> calls.result(lambda: "made", lambda: "present", version=0)
    'made'
    """

    def __init__(self) -> None:
        self._results: OrderedDict[int, Result] = OrderedDict()
        self._version: object = None

    def result(self, make: Callable[[], Result], present: Callable[[], Result], version: object) -> Result:
        """``make()``, or what it gave in the call that is being repeated.

        Args:
            make: of a new call; it draws no random numbers. present: of a repetition whose first call is unknown.
            version: of what a result depends on; with another one the results of before are let go.
        """
        name = int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())
        if version != self._version:
            self._results.clear()
            self._version = version
        if not _in_backward():
            result = self._results[name] = make()
            self._results.move_to_end(name)
            while len(self._results) > KEPT:
                self._results.popitem(last=False)
            return result
        if name in self._results:
            return self._results[name]
        warnings.warn(
            "a layer with spectral norm was called inside a backward pass, and the call that this repeats is unknown: "
            "it uses the present vectors. Checkpoint with preserve_rng_state=True, and run backward before the "
            f"optimizer's step and within {KEPT} forward calls",
            stacklevel=2,
        )
        return present()

    def __deepcopy__(self, memo: object) -> RepeatedCalls[Result]:
        return RepeatedCalls()

    def __reduce__(self) -> tuple[type[RepeatedCalls[Result]], tuple[()]]:
        return RepeatedCalls, ()
