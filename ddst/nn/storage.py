"""Where a sparse layer keeps its weight: packed values in slots, the map of slots, and what is derived from it.

``values`` is the one parameter. ``slot_blocks`` says which block lies in which slot: a plain tensor on the CPU, and no
buffer: what averages buffers, casts them or sends them to other processes leaves it alone, and it survives the meta
device. It is part of the state dict. ``topology``, the vector that kernels walk, is derived from it, lies on the device
of the values and stands in no state dict. Both are rewritten in place while the number of slots stays.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from .. import index_cache
from .. import topology as tp
from ..operator_view import block_diagonal_slots, operator_shape, turned_slots
from ..slot_change import SlotChange
from . import packed_facts
from .data_parallel import is_sharded, let_go, resize_fault, whole

_log = logging.getLogger("ddst")

RESIZED = "packed values change their size"


class PackedStorage(nn.Module):
    """``W`` as packed blocks in slots that they keep for as long as they are active.

    Attributes:
        values: parameter ``[slots, b_out, b_in]``; free slots are zero. (torch's parametrizations cannot take a
            parameter of this name: they keep it in a container that has a method so called.)
        slot_blocks: int32 ``[slots]`` on the CPU, see :mod:`ddst.topology`; change it with :meth:`set_block_mask` only.
        topology: int32 vector built from it, on the device of the values.
        block: ``(b_out, b_in)``. weight_shape: shape of the dense weight.
        groups: of a grouped convolution; the weight, the mask and the slots know no blocks outside of its groups.
        op_shape: what the operators, and ``topology``, take the weight for (:func:`ddst.operator_view.operator_shape`).
        reserve: number of slots that are never given back.
        mask_version: grows by one with every change of the mask.
        storage_version: grows by one whenever the number of slots changes: then ``values`` has another shape and
            address, and what holds either (a captured graph, DistributedDataParallel) must learn of it.
    """

    values: nn.Parameter
    slot_blocks: Tensor
    topology: Tensor

    def __init__(
        self, weight_shape: Sequence[int], block: tuple[int, int], slot_blocks: Tensor, reserve: int, groups: int = 1
    ) -> None:
        super().__init__()
        self.weight_shape, self.block, self.reserve = tuple(weight_shape), block, reserve
        self.groups, self.op_shape = groups, operator_shape(weight_shape, groups)
        self._turned: dict[tuple[bool, bool, bool], Tensor] = {}
        self.mask_version = self.storage_version = 0
        self.slot_blocks = slot_blocks
        self._active_weights = self._count()

    # --- what is active ---------------------------------------------------------------------------------------------

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """Shape of the block mask."""
        return tp.mask_shape(self.weight_shape, self.block)

    @property
    def block_mask(self) -> Tensor:
        """bool ``[R, C, kH, kW]`` (linear ``[R, C]``): which blocks are active; a new tensor, beside the values."""
        mask = tp.mask_of_slots(self.slot_blocks, self.mask_shape)
        return mask if self.values.is_meta else mask.to(self.values.device)

    @property
    def slots(self) -> int:
        """Number of slots, free ones included."""
        return self.slot_blocks.numel()

    @property
    def nnz(self) -> int:
        """Number of active blocks."""
        with unset_fake_temporarily():
            return int((self.slot_blocks >= 0).sum())

    @property
    def num_blocks(self) -> int:
        """Number of blocks, active or not."""
        return math.prod(self.mask_shape)

    @property
    def density(self) -> float:
        """Active weights over all weights; parts of edge blocks that lie outside the weight are not counted."""
        return self.active_weights / math.prod(self.weight_shape)

    @property
    def active_weights(self) -> int:
        """Number of weights inside active blocks, without the parts of edge blocks that lie outside the weight."""
        return self._active_weights

    def _count(self) -> int:
        with unset_fake_temporarily():
            ranks = self.slot_blocks[self.slot_blocks >= 0].long()
            _, cols, taps = tp.grid(self.weight_shape, self.block)
            sizes = tp.block_sizes(self.weight_shape, self.block)
            return int(sizes[ranks // (cols * taps), ranks // taps % cols].sum())

    def dense_weight(self) -> Tensor:
        """``W`` with zeros at inactive blocks, differentiable; the raw weight, before any norm."""
        return tp.unpack_slots(whole(self.values), self.slot_blocks, self.weight_shape)

    def places(self) -> tuple[Tensor, Tensor]:
        """Block row and block column of each slot, on the device of the values; those of free slots lie beyond."""
        rows, cols = self.mask_shape[:2]
        index = tp.split_topology(self.topology, rows, cols * self.groups)
        row, col = index.block_row.long(), index.block_col.long()
        return row, col if self.groups == 1 else torch.where(row == rows, cols, col % cols)

    def within(self, stored: Tensor) -> Tensor:
        """``[slots, b_out, b_in]`` with zeros where edge blocks reach beyond the weight: ``nn.init`` on values fills
        these. Differentiable.
        """
        for side, place in enumerate(self.places()):
            width, size = self.block[side], self.weight_shape[side]
            if size % width:
                inside = place[:, None] * width + torch.arange(width, device=place.device) < size
                stored = torch.where(inside.unsqueeze(2 - side), stored, 0)
        return stored

    def sums(self, stored: Tensor, side: int) -> Tensor:
        """Sums of ``[slots, b_out, b_in]`` over each row of the weight (side 0) or each column (1). Differentiable."""
        parts = self.within(stored).sum(2 - side)
        total = parts.new_zeros(self.mask_shape[side] + 1, self.block[side]).index_add(0, self.places()[side], parts)
        return total[:-1].reshape(-1)[: self.weight_shape[side]]

    @torch.no_grad()
    def block_norms(self) -> Tensor:
        """L2 norm of every block, in the shape of the block mask; 0 where it is inactive.

        Parts of edge blocks outside the weight are left out: they are zero as they are made here, but whoever fills
        ``values`` as a whole (``nn.init``) fills them too. Under weight norm the blocks of the weight that the layer
        computes with, as the length of a row of ``values`` says nothing then.
        """
        norms = torch.linalg.vector_norm(self.within(self._ranked_values()), dim=(1, 2))
        ranks = self.slot_blocks.to(norms.device).long()
        return norms.new_zeros(self.num_blocks + 1).index_put_((ranks,), norms)[:-1].view(self.mask_shape)

    def _ranked_values(self) -> Tensor:
        """The packed values whose blocks are compared by their norms."""
        return self.values

    # --- changes ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_block_mask(self, mask: Tensor) -> SlotChange:
        """Makes ``mask`` the set of active blocks: kept blocks keep their values and slots, new ones are zero.

        Where the slots suffice, only the entries of slots that change hands are written, in place: ``values``, its
        gradient, their addresses and their place in autograd, optimizers, averages and graphs stay what they are. More
        blocks than slots enlarge the storage, and more than a tenth of the slots left free, beyond ``reserve``, shrinks
        it (``storage_version``); ``values`` stays the same Parameter object then, too. Optimizer state is not the
        layer's: :func:`ddst.carry_state` brings it along with what this returns.

        Not to be called while another thread computes with the layer, as with any change of a module's parameters.

        Args:
            mask: bool, shape of ``block_mask``.

        Returns:
            What changed, able to carry anything stored per slot.

        Raises:
            TypeError, ValueError: not bool, or another shape; nothing is changed.

        >>> from ddst.nn import SparseLinear
        >>> layer = SparseLinear(32, 32, density=0.25)
        >>> layer.set_block_mask(torch.ones(2, 2, dtype=torch.bool)).grown, layer.nnz
        (3, 4)
        """
        tp.check_mask(mask, self.mask_shape, "mask")
        change = SlotChange.to_mask(self.slot_blocks, mask.detach(), self.reserve)
        self.change_slots(change)
        return change

    @torch.no_grad()
    def change_slots(self, change: SlotChange) -> None:
        """Makes a change that was planned for the present slots: what :meth:`set_block_mask` does with its own."""
        self._apply_change(change)

    def _apply_change(self, change: SlotChange) -> None:
        self._check_whole()
        grad = self.values.grad
        if change.slot_blocks.shape != change.before.shape:
            let_go([self], RESIZED)
            with torch.inference_mode(False):  # a normal tensor, whatever mode the caller is in
                self._replace_values(change.apply(self.values.detach().clone()))
                self.values.grad = None if grad is None else change.apply(grad.detach())
        else:
            change.apply(self.values)
            if grad is not None:
                change.apply(grad)
        self._set_slots(change.slot_blocks)

    def _check_whole(self) -> None:
        if is_sharded(self.values):
            raise RuntimeError(
                "values are a DTensor, of which each rank holds a part (fully_shard): their blocks cannot move. Change "
                "the mask before fully_shard, or train moving masks with DistributedDataParallel"
            )

    def _adopt_slots(self, slot_blocks: Tensor) -> None:
        """Takes another map of slots, with values where a block is kept."""
        if not torch.equal(slot_blocks, self.slot_blocks):
            with torch.no_grad():
                self._apply_change(SlotChange.between(self.slot_blocks, slot_blocks))

    def _replace_values(self, values: Tensor) -> None:
        # Autograd remembers the shape of a leaf for as long as a graph that uses it lives (a kept loss, say), and would
        # reject gradients of the new shape. It forgets when the dtype changes, so the dtype changes for a moment.
        old = self.values.shape[0]
        self.values.grad = None
        other = torch.float16 if values.dtype != torch.float16 else torch.float32
        self.values.data = values.new_empty(0, dtype=other)
        self.values.data = values
        self.storage_version += 1
        _log.info("packed values of %s have %d slots, had %d", self.weight_shape, values.shape[0], old)

    def _set_slots(self, slot_blocks: Tensor) -> None:
        """Takes over a map that fits ``values``."""
        with torch.inference_mode(False):
            if slot_blocks.shape == self.slot_blocks.shape:
                self.slot_blocks.copy_(slot_blocks)
            else:
                self.slot_blocks = slot_blocks.clone()
        self._active_weights = self._count()
        self.mask_version += 1
        self._place()

    def _place(self) -> None:
        """Derives the topology, on the device of the values: in place where one of this length lies there."""
        if self.slot_blocks.is_inference():  # made or copied in inference mode: blocks may move outside of it
            with torch.inference_mode(False):
                self.slot_blocks = self.slot_blocks.clone()
        self.topology = placed_topology(
            self.slot_blocks, self.mask_shape, self.values.data, self.__dict__.get("topology"), self.groups
        )
        for (transposed, flipped, matrix), held in self.__dict__.get("_turned", {}).items():
            self._turned[transposed, flipped, matrix] = self._turned_topology(transposed, flipped, matrix, held)
        self._slots_seen = self.slot_blocks._version

    @property
    def topologies(self) -> list[Tensor]:
        """Every vector that operators have been given so far: the topology, and those of :meth:`topology_as`."""
        return [self.topology, *self._turned.values()]

    def topology_as(
        self, transposed: bool = False, flipped: bool = False, matrix: bool = False
    ) -> tuple[Tensor, tuple[int, ...]]:
        """``(topology, op_shape)`` of the weight with rows and columns exchanged, with its taps backwards, or as the
        matrix ``[rows, columns · taps]`` whose columns are in the order (block, tap, channel within the block).

        Made when it is first asked for, then kept in step with the slots.
        """
        shape = self.op_shape
        if matrix and len(shape) > 2:
            _, cols, taps = tp.grid(shape, self.block)
            shape = (shape[0], cols * taps * self.block[1])
        else:
            matrix = False
        shape = (shape[1], shape[0], *shape[2:]) if transposed else shape
        if not (transposed or flipped or matrix):
            return self.topology, shape
        key = (transposed, flipped, matrix)
        held = self._turned.get(key)
        if held is None:
            held = self._turned_topology(transposed, flipped, matrix, None)
            if not torch.compiler.is_compiling():
                self._turned[key] = held
        return held, shape

    def _turned_topology(self, transposed: bool, flipped: bool, matrix: bool, held: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():
            # torch.export without dynamo: the map is a real tensor, and what is made of it a constant of the graph.
            with _disable_current_modes():
                slots, shape = self._turned_slots(transposed, flipped, matrix)
                return placed_topology(slots, shape, slots, None).to(self.values.device)
        slots, shape = self._turned_slots(transposed, flipped, matrix)
        if torch.compiler.is_compiling():
            rows, cols, *space = shape
            return tp._topology_by_operators(slots, rows, cols, math.prod(space)).to(self.values.device)
        return placed_topology(slots, shape, self.values.data, held)

    def _turned_slots(self, transposed: bool, flipped: bool, matrix: bool) -> tuple[Tensor, tuple[int, ...]]:
        whole_shape = (self.mask_shape[0], self.mask_shape[1] * self.groups, *self.mask_shape[2:])
        slots = block_diagonal_slots(self.slot_blocks, self.mask_shape, self.groups)
        return turned_slots(slots, whole_shape, transposed, flipped, matrix)

    def use_groups(self, groups: int) -> bool:
        """Whether the weight is that of a convolution with so many groups."""
        return groups == self.groups

    def _notice_overwritten_slots(self) -> None:
        """Follows what somebody wrote into ``slot_blocks`` (it is part of the state dict), or raises.

        Averages that copy every integer entry of a state dict do so; the values are theirs to bring along.
        """
        if self._overwritten():
            self._take_overwritten_slots()

    def _overwritten(self) -> bool:
        """Whether somebody wrote into ``slot_blocks``.

        Raises:
            RuntimeError: what was written is no map of these slots.
        """
        if self.slot_blocks._version == self._slots_seen:
            return False
        fault = slots_fault(self.slot_blocks, self.slots, self.num_blocks)
        if fault:
            raise RuntimeError(f"slot_blocks was overwritten and no longer says where the blocks are: {fault}")
        return True

    def _take_overwritten_slots(self) -> None:
        self._set_slots(self.slot_blocks)

    # --- moves, copies and state dicts ------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._place()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "slot_blocks"] = self.slot_blocks
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata[prefix[:-1]][packed_facts.KEY] = packed_facts.packed_facts(self)

    def _take_slots(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], error_msgs: list[str]
    ) -> bool:
        """Takes ``slot_blocks`` out of a state dict and makes it the layer's; whether the values may be loaded."""
        slot_blocks, values = state_dict.pop(prefix + "slot_blocks", None), state_dict.get(prefix + "values")
        if values is None and slot_blocks is None:
            return True
        if values is None or slot_blocks is None:
            old = prefix + "block_mask" in state_dict
            error_msgs.append(
                f"{prefix}values and {prefix}slot_blocks go together, and only one of them is in the state dict"
                + (": it was saved by a ddst before 0.1.0, which kept blocks in another order" if old else "")
            )
            return False
        fault = packed_facts.misfit(self, values, metadata.get(packed_facts.KEY))
        if fault:
            error_msgs.append(f"{prefix}values {fault}")
            return False
        fault = slots_fault(slot_blocks, values.shape[0] if values.dim() else -1, self.num_blocks)
        if fault:
            error_msgs.append(f"{prefix}slot_blocks does not fit this layer and {prefix}values: {fault}")
            return False
        slot_blocks = slot_blocks.detach().to("cpu", torch.int32)
        if tuple(values.shape) != (slot_blocks.numel(), *self.block):
            return True  # torch's own error of the shapes
        fault = resize_fault([self], RESIZED) if slot_blocks.shape != self.slot_blocks.shape else ""
        if fault:
            error_msgs.append(f"{prefix}values: {fault}")
            return False
        self._adopt_slots(slot_blocks)
        return True


def placed_topology(
    slot_blocks: Tensor, shape: Sequence[int], values: Tensor, held: Tensor | None, groups: int = 1
) -> Tensor:
    """The topology vector of slots beside the values: ``held``, rewritten in place, where it has the length and device.

    Args:
        slot_blocks: int32 ``[slots]`` on the CPU. shape: of the block mask. values: what the vector is for.
        held: the vector so far, if any.
        groups: the vector is that of the block-diagonal weight of so many groups.
    """
    whole_shape = (shape[0], shape[1] * groups, *shape[2:])
    if values.is_meta or isinstance(values, FakeTensor):
        return values.new_empty(whole_shape[0] + whole_shape[1] + 2 + 5 * slot_blocks.numel(), dtype=torch.int32)
    with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
        vector = tp.topology_of_slots(block_diagonal_slots(slot_blocks, shape, groups), whole_shape)
        if held is None or held.is_inference() or held.device != values.device or held.shape != vector.shape:
            return vector.to(values.device)
        # Out of pinned memory the host does not wait for what the device has still to do.
        held.copy_(vector.pin_memory() if held.is_cuda else vector, non_blocking=True)
        index_cache.refresh(held)
        return held


def slots_fault(slot_blocks: Any, slots: int, blocks: int) -> str:
    """What is wrong with a map of so many slots over so many blocks, or ""."""
    if not isinstance(slot_blocks, Tensor) or slot_blocks.dtype not in (torch.int32, torch.int64):
        got = slot_blocks.dtype if isinstance(slot_blocks, Tensor) else type(slot_blocks).__name__
        return f"expected an int32 tensor, got {got}"
    if slot_blocks.layout != torch.strided:
        return f"expected a dense tensor, got one of layout {slot_blocks.layout}"
    if tuple(slot_blocks.shape) != (slots,):
        return f"expected one entry for each of {slots} slots, got the shape {tuple(slot_blocks.shape)}"
    ranks = slot_blocks[slot_blocks >= 0]
    if bool((slot_blocks < -1).any()) or bool((ranks >= blocks).any()):
        return f"expected entries from -1 to {blocks - 1}, got {int(slot_blocks.min())} to {int(slot_blocks.max())}"
    if ranks.unique().numel() != ranks.numel():
        return "a block lies in two slots"
    return ""
