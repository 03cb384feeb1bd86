"""Exponential moving average of a model's weights that follows the topology of its sparse layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ddst._arguments import check_int, check_module, check_number, check_state_keys
from ddst.nn.origin import follow


class EMA:
    """``w̄ ← γ w̄ + (1 − γ) w``, on active blocks: what the model drops leaves the average, what it grows enters as 0.

    ``module`` is a copy of the model to generate images with. Its masks follow the model's at the moment they
    change (:func:`ddst.follow`), dtypes and devices before each update, so it is as sparse as the model. Buffers (batch
    norm's statistics) are copied, not averaged.

    Args:
        model: the model that is trained.
        decay: ``γ``, 0 … 1.
        start: number of first updates that copy the weights instead of averaging.
        ramp: ``ρ``, 0 … 1: the average's half-life is at most ``ρ · t`` after t updates, so that an early average does
            not drag the first weights along: ``γ_t = min(γ, 2^(−1 / (ρ t)))``. 0: γ from the start.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Cost: one read of the model's and one read and write of the average's active weights per update; memory of one copy
        of the active weights.
    Source: Wang et al., *Balanced Training for Sparse GANs* (2023): the averaged generator ("SEMA"); the ramp: the
        code of Karras et al., *Training Generative Adversarial Networks with Limited Data* (2020).

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> ema = EMA(model, decay=0.75)
    >>> _ = nn.init.constant_(model.weight, 2.0)
    >>> ema.update()
    >>> ema.module.weight.item()
    1.25
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, start: int = 0, ramp: float = 0.0) -> None:
        self.model = check_module("model", model)
        self.decay = check_number("decay", decay, 0, 1)
        self.start = check_int("start", start, 0)
        self.ramp = check_number("ramp", ramp, 0, 1)
        self.updates = 0
        self.module = copied(model).requires_grad_(False)
        self.module.eval()
        follow(self.module, model)

    @torch.no_grad()
    def update(self) -> None:
        """Takes the model's present weights into the average. Call it once per step, after every change of topology.

        Not while another thread computes with ``module``: slots that change hands and weights are written one after
        the other, see :meth:`ddst.nn.storage.PackedStorage.set_block_mask`.

        Raises:
            ValueError: the model has other layers than when the average was made.
        """
        self._check_layers()
        self._follow_moves()
        follow(self.module, self.model)  # they do already, unless one of the two has loaded a state or was copied
        decay = self._decay()
        self.updates += 1
        weights = dict(self.module.named_parameters())
        for name, weight in self.model.named_parameters():
            if weight.is_floating_point():
                weights[name].lerp_(weight, 1 - decay)
            else:
                weights[name].copy_(weight)
        self._copy_buffers()

    def _decay(self) -> float:
        if self.updates < self.start or (self.ramp and not self.updates):
            return 0.0
        return min(self.decay, 0.5 ** (1 / (self.ramp * self.updates))) if self.ramp else self.decay

    def _check_layers(self) -> None:
        names, mine = ([name for name, _ in net.named_parameters()] for net in (self.model, self.module))
        if names != mine:
            changed = next(iter(set(names) ^ set(mine)), "their order")
            raise ValueError(
                f"model has other parameters than the averaged copy ({changed}): make the EMA after ddst.sparsify or "
                "ddst.densify, and anew where layers are swapped later"
            )

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
        """Restores :meth:`state_dict`; its masks stay until the next update, which takes the model's."""
        check_state_keys(state, ("module", "updates"))
        self.module.load_state_dict(state["module"])
        self.updates = int(state["updates"])


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also after a forward pass.

    torch's spectral norm keeps its last weight in an attribute, with the graph that made it, and ``copy.deepcopy``
    alone refuses such tensors: they are copied without their graph.
    """
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf})
