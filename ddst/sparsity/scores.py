"""When the dense gradient's block scores are asked for and which backward pass they come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddst.nn import SparseLayer


class ScoreCollector:
    """Block scores of the gradient that an optimizer's last step consumed.

    While a request is open, a pre-hook of ``optimizer.step()`` takes each layer's scores, one layer at a time, in
    place of the former ones: with several steps between two topology updates (the discriminator's), those of the last
    step count. Without a request nothing is recorded and the hook does nothing. Every backward pass into a layer's
    values since the former step counts, as it does in ``.grad``; ``zero_grad()`` in between is not seen.

    Args:
        layers: by name; empty for methods that need no gradient.
        optimizer: the optimizer that steps these layers.

    Attributes:
        latest: per layer ``[R, C, kH, kW]`` (linear ``[R, C]``), the L2 norm of each block of the dense gradient with
            respect to the weight; layers that no backward pass reached are missing. With spectral norm, of the raw
            weight without σ's own dependence on it (a rank-one term).

    >>> import ddst
    >>> layer = ddst.SparseLinear(32, 32, density=0.5)
    >>> sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> collector = ScoreCollector({"layer": layer}, sgd)
    >>> collector.request()
    >>> layer(torch.randn(4, 32)).sum().backward()
    >>> sgd.step()
    >>> collector.latest["layer"].shape
    torch.Size([2, 2])
    """

    def __init__(self, layers: Mapping[str, SparseLayer], optimizer: Optimizer) -> None:
        self.layers = dict(layers)
        self.latest: dict[str, Tensor] = {}
        self._aside: dict[str, Tensor] = {}
        self.requested = False
        self._hooks = [optimizer.register_step_pre_hook(lambda *_: self._collect())]

    def set_aside_at(self, other: Optimizer) -> None:
        """Keeps apart what is recorded before a step of *another* network's optimizer.

        The backward pass of the generator's loss runs through the discriminator too, and one of the discriminator's
        loss through the generator if its images are not detached. What that recorded counts only if this optimizer's
        next step finds nothing newer (a loop that runs both backward passes before both optimizer steps), and never
        replaces scores taken at this optimizer's own step.
        """
        self._hooks.append(other.register_step_pre_hook(lambda *_: self._set_aside()))

    def request(self) -> None:
        """Makes the following backward passes record what scores need; forgets former scores."""
        self.cancel()
        self.requested = bool(self.layers)
        for layer in self.layers.values():
            layer.request_scores()

    def cancel(self) -> None:
        """Ends the request and drops the scores."""
        self.latest, self._aside, self.requested = {}, {}, False
        for layer in self.layers.values():
            if layer.scores_requested:
                layer.cancel_scores()

    @property
    def arrived(self) -> bool:
        """Whether the gradient asked for has come."""
        if self.requested and not self.latest:
            # An optimizer that runs a closure computes the gradient after its pre-hook.
            self._collect()
        return bool(self.latest)

    def _collect(self) -> None:
        if self.requested:
            taken = self._take()
            if taken or self._aside:
                self.latest, self._aside = taken or self._aside, {}

    def _set_aside(self) -> None:
        if self.requested:
            self._aside = self._take() or self._aside

    def _take(self) -> dict[str, Tensor]:
        taken = {}
        for name, layer in self.layers.items():
            if layer.scores_recorded:
                scores = layer.take_scores().detach()
                if layer.spectral_norm is not None:
                    # The layer scores the weight it computes with, W / σ; the optimizer steps W.
                    sigma = layer.spectral_norm.sigma(layer)
                    scores = scores / torch.where(sigma > 0, sigma, 1)
                taken[name] = scores
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Whether a request is open, and scores taken and not yet used."""
        return {
            "requested": self.requested,
            "latest": {name: score.clone() for name, score in self.latest.items()},
            "aside": {name: score.clone() for name, score in self._aside.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`: reopens a request that was open. Load the model first."""
        for name, score in [*state["latest"].items(), *state["aside"].items()]:
            if name not in self.layers or score.shape != self.layers[name].block_mask.shape:
                raise ValueError(f"state holds scores of a layer {name!r} of shape {tuple(score.shape)}, unknown here")
        self.cancel()
        if state["requested"]:
            self.request()
        self.latest = {name: score.clone() for name, score in state["latest"].items()}
        self._aside = {name: score.clone() for name, score in state["aside"].items()}

    def close(self) -> None:
        """Ends the request and removes the hooks from the optimizers."""
        self.cancel()
        for hook in self._hooks:
            hook.remove()
