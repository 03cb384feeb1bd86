"""Exponential moving average of a model's weights that follows the topology of its sparse layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ddst.nn.origin import follow


class EMA:
    """``w̄ ← γ w̄ + (1 − γ) w``, on active blocks: what the model drops leaves the average, what it grows enters as 0.

    :attr:`module` is a copy of the model to generate images with. Its masks follow the model's when they change
    (:func:`ddst.follow`), dtypes and devices before each update, so it is as sparse as the model. Buffers (batch norm's
    statistics) are copied, not averaged.

    Args:
        model: the model that is trained.
        decay: ``γ``, 0 … 1.
        start: number of first updates that copy the weights instead of averaging.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Cost: one read of the model's and one read and write of the average's active weights per update; memory of one copy
        of the active weights.
    Source: Wang et al., *Balanced Training for Sparse GANs* (2023): the averaged generator ("SEMA").

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> ema = EMA(model, decay=0.75)
    >>> _ = nn.init.constant_(model.weight, 2.0)
    >>> ema.update()
    >>> ema.module.weight.item()
    1.25
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, start: int = 0) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be from 0 to 1, got {decay}")
        if start < 0:
            raise ValueError(f"start must not be negative, got {start}")
        self.model = model
        self.decay = decay
        self.start = start
        self.updates = 0
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.module.eval()
        follow(self.module, model)

    @torch.no_grad()
    def update(self) -> None:
        """Takes the model's present weights into the average. Call it once per step, after every change of topology."""
        self._follow_moves()
        follow(self.module, self.model)  # they do already, unless one of the two has loaded a state or was copied
        decay = self.decay if self.updates >= self.start else 0.0
        self.updates += 1
        weights = dict(self.module.named_parameters())
        for name, weight in self.model.named_parameters():
            if weight.is_floating_point():
                weights[name].lerp_(weight, 1 - decay)
            else:
                weights[name].copy_(weight)
        self._copy_buffers()

    def _follow_moves(self) -> None:
        for module, shadow in zip(self.model.modules(), self.module.modules(), strict=True):
            for name, weight in module._parameters.items():
                mine = shadow._parameters[name]
                if weight is not None and mine is not None:
                    mine.data = mine.data.to(weight.device, weight.dtype)
            for name, buffer in module._buffers.items():
                held = shadow._buffers[name]
                if buffer is not None and held is not None:
                    shadow._buffers[name] = held.to(buffer.device, buffer.dtype)

    def _copy_buffers(self) -> None:
        buffers = dict(self.module.named_buffers())
        for name, buffer in self.model.named_buffers():
            if buffers[name].shape == buffer.shape:
                buffers[name].copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights (packed, with their masks) and the number of updates."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`; the masks become the state's, until the next update the model's."""
        self.module.load_state_dict(state["module"])
        self.updates = int(state["updates"])
