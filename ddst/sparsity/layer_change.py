"""Changes of several layers and of their optimizer state at once: all of them, or none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddst.nn import SparseLayer
from ddst.nn.origin import followers_of
from ddst.slot_change import SlotChange
from ddst.sparsity.optimizer import Start, StateChange


class LayerChange:
    """A layer's new mask with what it does to the optimizer's state, checked and made but not written.

    Args:
        layer: the layer. mask: bool, the blocks that are to be active.

    Attributes:
        change: what it does to the slots.
    """

    def __init__(self, layer: SparseLayer, mask: Tensor) -> None:
        self._layer = layer
        self.change = SlotChange.to_mask(layer.slot_blocks, mask, layer.reserve)
        self._state: StateChange | None = None
        self._saved: list[_Saved] = []

    def prepare_state(self, optimizer: Optimizer, second_moment: Start) -> None:
        """Makes the optimizer's new state; raises ValueError where it cannot follow."""
        self._state = StateChange(optimizer, self._layer.values, self.change, second_moment)

    def commit(self) -> None:
        """Changes the layer, the averages that follow it and the state."""
        for layer in (self._layer, *followers_of(self._layer)):
            self._saved.append(_Saved(layer, self.change))
        self._layer.change_slots(self.change)
        if self._state is not None:
            self._state.commit()

    def undo(self) -> None:
        """Takes :meth:`commit` back, or as much of it as was done."""
        if self._state is not None and self._saved:
            self._state.undo()
        for saved in self._saved:
            saved.restore()
        self._saved = []

    def forget(self) -> None:
        """Lets go of what :meth:`undo` would need."""
        self._saved, self._state = [], None


def commit_together(changes: Sequence[LayerChange]) -> None:
    """Commits all of them; if one raises, takes back what was done and raises that."""
    try:
        # Those that need new memory first: there is something that can fail.
        for change in sorted(changes, key=lambda c: c.change.source is None):
            change.commit()
    except BaseException:
        for change in changes:
            change.undo()
        raise
    for change in changes:
        change.forget()


class _Saved:
    """What a change of slots overwrites in one layer: the rows that change hands, or all where the storage changes."""

    @torch.no_grad()
    def __init__(self, layer: SparseLayer, change: SlotChange) -> None:
        self._layer = layer
        self._slot_blocks = layer.slot_blocks.clone()
        in_place = change.source is None and torch.equal(change.before, layer.slot_blocks)
        self._rows = change.changed.to(layer.values.device) if in_place else None
        values, gradient = layer.values.detach(), layer.values.grad
        self._values = values[self._rows] if self._rows is not None else values
        self._gradient = gradient
        self._gradient_rows = None if gradient is None or self._rows is None else gradient.detach()[self._rows]
        held = [] if layer.norm is None else [*layer.norm.parameters(), *layer.norm.buffers()]
        self._norm = [(tensor, tensor.detach().clone()) for tensor in held]

    @torch.no_grad()
    def restore(self) -> None:
        layer = self._layer
        if self._rows is not None:
            layer.values[self._rows] = self._values
            if self._gradient is not None and self._gradient_rows is not None:
                self._gradient.detach()[self._rows] = self._gradient_rows
        elif layer.values.shape != self._values.shape:
            layer._replace_values(self._values)
            layer.values.grad = self._gradient
        layer._set_slots(self._slot_blocks)
        for tensor, saved in self._norm:
            tensor.copy_(saved)
