"""What a GAN's training loop may get wrong: two optimizers exchanged, steps in the wrong order."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddst._arguments import check_optimizer
from ddst.sparsity.wrapped import optimizers_of


class StepOrder:
    """Sees when ``fake_scores`` were computed after the generator's last step and not before it.

    By the numbers that autograd gives to its nodes in the order they are made: scores without a graph tell nothing.
    One call may be right so, where a gradient scaler skipped the step; with a step in between, a second is not.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._stepped = False
        self._last = -1
        self._late = 0
        self._hook = optimizers_of(optimizer)[-1].register_step_post_hook(lambda *_: self._note())

    def _note(self) -> None:
        self._stepped, self._last = True, torch._C._autograd._get_sequence_nr()

    def check(self, fake_scores: Tensor) -> None:
        """Raises RuntimeError at the second late call in a row."""
        node = fake_scores.grad_fn
        number = -1 if node is None else node._sequence_nr()
        # Nodes of another thread are counted apart.
        late = self._stepped and self._last <= number < torch._C._autograd._get_sequence_nr()
        self._late, self._stepped = self._late + 1 if late else 0, False
        if self._late > 1:
            raise RuntimeError(
                "fake_scores were computed after the last opt_g.step(): call DDST.step() after opt_g.step(), with the "
                "fake_scores of the generator's loss from before it. Otherwise G has not moved in between and alpha, "
                "what a step of G gains, is 0 for ever"
            )

    def close(self) -> None:
        """Removes the hook from the optimizer."""
        self._hook.remove()


def check_optimizers(generator: nn.Module, discriminator: nn.Module, opt_g: Optimizer, opt_d: Optimizer) -> None:
    """Raises unless they are optimizers, and not exchanged."""
    held = [
        {id(p) for group in check_optimizer(name, optimizer).param_groups for p in group["params"]}
        for name, optimizer in (("opt_g", opt_g), ("opt_d", opt_d))
    ]
    own = [{id(p) for p in network.parameters()} for network in (generator, discriminator)]
    for i, name in enumerate(("opt_g", "opt_d")):
        if own[i] and not own[i] & held[i] and own[i] & held[1 - i]:
            network, other = (("generator", "opt_d"), ("discriminator", "opt_g"))[i]
            raise ValueError(
                f"{name} must hold the {network}'s parameters, which {other} holds: are the two exchanged?"
            )
