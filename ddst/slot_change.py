"""What moves between slots when the active blocks of a packed weight change, for everything that is stored per slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._arguments import check_int, check_tensor
from .topology import check_mask, check_slots, mask_of_slots

#: Free slots beyond this share of all are given back, unless they are reserved.
IDLE_SHARE = 0.1


@dataclass(frozen=True)
class SlotChange:
    """What a new block mask does to everything stored per slot.

    Attributes:
        slot_blocks: int32 ``[slots]``, which block lies in which slot after the change.
        entered: int64, slots with a block that was not active before.
        vacated: int64, slots that held a block before and hold none now.
        dropped: number of blocks that left.
        before: int32, which block lay in which slot before the change.
        source: None where every kept block stays in its slot. Else int64 ``[slots]``, the old slot of each new one's
            block, -1 where it is new or there is none: the storage grows or shrinks.

    >>> change = SlotChange.to_mask(torch.tensor([0, 3], dtype=torch.int32), torch.tensor([[True, True], [False] * 2]))
    >>> change.slot_blocks.tolist(), change.apply(torch.tensor([5.0, 7.0])).tolist()
    ([0, 1], [5.0, 0.0])
    """

    slot_blocks: Tensor
    entered: Tensor
    vacated: Tensor
    dropped: int
    before: Tensor
    source: Tensor | None

    @staticmethod
    def to_mask(slot_blocks: Tensor, mask: Tensor, reserve: int = 0) -> SlotChange:
        """The change to a mask: a kept block keeps its slot, a grown one takes the first free slot, by rising rank.

        More blocks than slots: the storage grows to just enough. More than a tenth of the slots free, beyond
        ``reserve``: it shrinks to just enough, and blocks of the slots that go move to the first free ones.

        Args:
            slot_blocks: int32 ``[slots]``, before the change, on the CPU. mask: bool, the active blocks after it.
            reserve: number of slots that stay, free or not.
        """
        check_mask(mask, name="mask")
        check_slots(slot_blocks, mask.numel())
        check_int("reserve", reserve, 0)
        flat = mask.reshape(-1).cpu()
        old = slot_blocks.long()
        was_active = mask_of_slots(slot_blocks, (flat.numel(),))
        kept = (old >= 0) & flat[old.clamp(min=0)] if flat.numel() else torch.zeros_like(old, dtype=torch.bool)
        grown = (flat & ~was_active).nonzero()[:, 0]
        slots, count = old.numel(), int(kept.sum()) + grown.numel()
        enough = max(count, reserve)
        if count > slots or (slots > enough and slots - count > IDLE_SHARE * slots):
            slots = enough
        new = old.new_full((slots,), -1)
        stay = min(slots, old.numel())
        new[:stay] = torch.where(kept, old, -1)[:stay]
        moved = kept[stay:].nonzero()[:, 0] + stay
        source = None
        if slots != old.numel():
            source = torch.where(new >= 0, torch.arange(slots, device="cpu"), -1)
            first = (new < 0).nonzero()[: moved.numel(), 0]
            new[first], source[first] = old[moved], moved
        entered = (new < 0).nonzero()[: grown.numel(), 0]
        new[entered] = grown
        vacated = ((new < 0) & (old >= 0)).nonzero()[:, 0] if source is None else entered.new_zeros(0)
        dropped = int((old >= 0).sum()) - int(kept.sum())
        return SlotChange(new.to(torch.int32), entered, vacated, dropped, slot_blocks.clone(), source)

    @staticmethod
    def between(before: Tensor, after: Tensor) -> SlotChange:
        """The change from one map of slots to any other, where kept blocks may lie in other slots."""
        check_slots(before, name="before")
        check_slots(after, name="after")
        old, new = before.long(), after.long()
        blocks = max((int(part.max()) + 1 for part in (old, new) if part.numel()), default=0)
        slot_of = old.new_full((blocks + 1,), -1)
        active = old >= 0
        slot_of[old[active]] = active.nonzero()[:, 0]
        source = torch.where(new >= 0, slot_of[new.clamp(min=0)], -1)
        entered = ((new >= 0) & (source < 0)).nonzero()[:, 0]
        dropped = int(active.sum()) - int((source >= 0).sum())
        return SlotChange(new.to(torch.int32), entered, entered.new_zeros(0), dropped, before.clone(), source)

    @property
    def grown(self) -> int:
        """Number of blocks that entered."""
        return self.entered.numel()

    @property
    def changed(self) -> Tensor:
        """int64: slots that changed hands, where kept blocks stay in theirs."""
        return torch.cat([self.entered, self.vacated])

    @property
    def fresh(self) -> Tensor:
        """int64: slots whose entries begin anew."""
        return self.changed if self.source is None else (self.source < 0).nonzero()[:, 0]

    def apply(self, stored: Tensor) -> Tensor:
        """Carries ``[slots, …]`` over, with zeros where no block was kept: in place while the number of slots stays.

        Returns:
            ``stored`` itself, or a new tensor where the number of slots changed.

        Raises:
            ValueError: ``stored`` has not one entry for each of the slots before the change.
        """
        if check_tensor("stored", stored).shape[:1] != self.before.shape:
            raise ValueError(f"stored must have {self.before.numel()} slots first, got the shape {tuple(stored.shape)}")
        if stored.is_meta:
            return stored.new_empty(self.slot_blocks.numel(), *stored.shape[1:])
        if self.source is None:
            return stored.index_fill_(0, self.changed.to(stored.device), 0)
        carried = stored.new_zeros(self.source.numel(), *stored.shape[1:])
        kept = (self.source >= 0).nonzero()[:, 0]
        carried[kept.to(stored.device)] = stored[self.source[kept].to(stored.device)]
        return stored.copy_(carried) if carried.shape == stored.shape else carried
