"""Adam's moments of all weights, active or not, as an optimizer has them that sees the dense gradient in every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddst import topology
from ddst.nn import SparseLayer
from ddst.sparsity.wrapped import optimizers_of

_STATES = ("exp_avg", "exp_avg_sq")


class DenseMoments:
    """``m ← β1 m + (1 − β1) g``, ``v ← β2 v + (1 − β2) g²``, g the dense gradient of a layer's weight.

    What code has that keeps weights dense, steps them by a dense gradient and multiplies a mask in afterwards, as the
    authors of *Balanced Training for Sparse GANs* do: a weight that enters there has moments of all steps before, and
    under Adam with betas (0, 0.9) its first step is 0.68 lr long. Here an inactive weight has no state; these are kept
    beside the optimizer and given to what enters.

    Args:
        layers: by name. optimizer: holds their values; Adam, AdamW or NAdam without ``amsgrad``, made for this run.

    Raises:
        ValueError: an optimizer whose moments these are not.

    Numerics: equal to the dense code's, but for weights under spectral norm, whose gradient is that of the raw weight
        without σ's own dependence on it (see :class:`~ddst.sparsity.score_collector.ScoreCollector`).
    Cost: the dense gradient in every step, one layer at a time, and two dense tensors a layer: what the method of the
        paper costs, and packed training saves. Meant for comparisons with it.
    """

    def __init__(self, layers: Mapping[str, SparseLayer], optimizer: Optimizer) -> None:
        self._layers = dict(layers)
        stepping = optimizers_of(optimizer, [layer.values for layer in layers.values()])[-1]
        self._betas: dict[str, tuple[float, float]] = {}
        for name, layer in layers.items():
            group = next(g for g in stepping.param_groups if any(p is layer.values for p in g["params"]))
            if "betas" not in group or len(group["betas"]) != 2 or group.get("amsgrad"):
                raise ValueError(
                    'grown_second_moment="dense" (and published=True) needs Adam, AdamW or NAdam without amsgrad, '
                    f"whose moments it keeps, got {type(stepping).__name__}"
                )
            self._betas[name] = (float(group["betas"][0]), float(group["betas"][1]))
        self._held: dict[str, dict[str, Tensor]] = {
            name: {state: torch.zeros(layer.weight_shape, dtype=layer.values.dtype) for state in _STATES}
            for name, layer in layers.items()
        }

    @property
    def tensors(self) -> list[Tensor]:
        """Both moments of every layer."""
        return [tensor for held in self._held.values() for tensor in held.values()]

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor]) -> None:
        """Takes the dense gradients of one step in, ``[C_out, C_in, …]`` by layer; others saw no gradient."""
        for name, gradient in gradients.items():
            beta1, beta2 = self._betas[name]
            held = self._held[name]
            for state in _STATES:
                held[state] = held[state].to(gradient.device)
            held["exp_avg"].lerp_(gradient.to(held["exp_avg"]), 1 - beta1)
            held["exp_avg_sq"].lerp_(gradient.to(held["exp_avg_sq"]).square(), 1 - beta2)

    def of_blocks(self, name: str, blocks: Tensor) -> dict[str, Tensor]:
        """Both moments of some blocks of a layer, ``[n, b_out, b_in]``, by the names of Adam's states."""
        block = self._layers[name].block
        return {
            state: topology.as_blocks(held, block).reshape(-1, *block)[blocks.to(held.device).long()]
            for state, held in self._held[name].items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Both moments of every layer, dense."""
        return {name: {state: tensor.clone() for state, tensor in held.items()} for name, held in self._held.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        for name, held in self._held.items():
            for key in _STATES:
                held[key] = state[name][key].clone()
