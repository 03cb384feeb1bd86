"""The code that uses a packed weight: what it did with it, and where it stands."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.utils.checkpoint import CheckpointFunction

_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_OWN = (str(Path(__file__).parents[2]), str(Path(torch.__file__).parent))


class WeightUses:
    """What has been done with a packed weight.

    Attributes:
        packed: kinds of functions it ran in as blocks ("conv", "linear").
        dense: "function at file:line" of those that got the dense weight.
    """

    def __init__(self) -> None:
        self.packed: set[str] = set()
        self.dense: set[str] = set()


def inside_a_function(checkpoints: bool = False) -> bool:
    """Whether the forward pass of a torch.autograd.Function is being run; that of a checkpoint only if asked for."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is CheckpointFunction.forward.__code__ and not checkpoints:
            return False
        if frame.f_code is _APPLY:
            return True
    return False


def recomputing() -> bool:
    """Whether a reentrant checkpoint runs its code again, in the backward pass."""
    if torch._C._current_graph_task_id() == -1:  # in no backward pass: the stack need not be walked
        return False
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is CheckpointFunction.backward.__code__:
            return True
    return False


def raised_here(error: BaseException) -> bool:
    """Whether an error was raised by code of this package, which says itself what is wrong."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OWN[0])


def calling_place() -> str:
    """``file:line`` of the code outside of torch and this package that is being run."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
