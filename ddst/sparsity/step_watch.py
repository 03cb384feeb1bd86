"""Whether an optimizer has made a step: a gradient scaler skips those whose gradients are not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class StepWatch:
    """Counts nothing, asks no device until it is asked: whether a step was made since :meth:`forget`.

    ``torch.amp.GradScaler`` does not call ``step()`` of an optimizer whose step it skips; a fused one is called, with
    an attribute ``found_inf``, and changes nothing where that is set.

    >>> param = torch.nn.Parameter(torch.zeros(1))
    >>> sgd = torch.optim.SGD([param])
    >>> watch = StepWatch(sgd)
    >>> watch.any
    False
    >>> sgd.step()
    >>> watch.any
    True
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._made = self._captured = False
        self._least: Tensor | None = None
        self._hook = optimizer.register_step_post_hook(self._note)

    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        # A captured step is replayed without a word to Python.
        self._captured |= torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        found = found_inf(optimizer)
        if found is None:
            self._made = True
        else:
            self._least = found if self._least is None else torch.minimum(self._least, found)

    @property
    def any(self) -> bool:
        """Whether a step was made. After one inside a CUDA graph's capture always true."""
        return self._captured or self._made or (self._least is not None and not bool(self._least > 0))

    def forget(self, made: bool = False) -> None:
        """Begins anew; with ``made`` as if a step had been made since."""
        self._made, self._least = made, None

    def close(self) -> None:
        """Removes the hook from the optimizer."""
        self._hook.remove()


def found_inf(optimizer: Optimizer) -> Tensor | None:
    """What a gradient scaler tells a fused optimizer for the time of a step; above zero it changes nothing then."""
    return getattr(optimizer, "found_inf", None)


def unscaled_by(optimizer: Optimizer) -> Tensor | float:
    """What a fused optimizer divides gradients by in the step under way; 1 for any other."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else scale
