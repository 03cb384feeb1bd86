"""What a copy of a sparse layer knows of the layer it was copied from, whose blocks may move.

An average that is kept by anyone's code is a deep copy into which the model's parameters are averaged. Where a slot has
changed hands in the model since, that would average two different blocks. Either the copy follows
(:func:`ddst.follow`): then its slots change hands at the same moment. Or, when it computes, it notices that its values
were written after blocks had moved, and says so. A follower that was pickled has lost its model: it computes, and says
so once it is written to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..slot_change import SlotChange

if TYPE_CHECKING:
    from .base import SparseLayer

_REMEDY = "Call ddst.follow(average, model) right after making the average, or use ddst.EMA"

_copies: weakref.WeakKeyDictionary[SparseLayer, weakref.WeakSet[SparseLayer]] = weakref.WeakKeyDictionary()


class Origin:
    """The layer that a copy was made of, until it is found to live its own life.

    A gradient that reaches the copy's values, or a mask given to it, makes it a model of its own, which may be written
    to as it likes. A copy that nobody writes to is a snapshot, and stays what it is.
    """

    def __init__(self, origin: SparseLayer | None, copy: SparseLayer, follows: bool = False) -> None:
        self.of: Callable[[], SparseLayer | None] = _nobody if origin is None else weakref.ref(origin)
        self.follows = follows
        self._written: int | None = None
        self._watched = follows  # a follower stays one, whatever is done to its values
        if origin is not None:
            _copies.setdefault(origin, weakref.WeakSet()).add(copy)

    @staticmethod
    def lost(copy: SparseLayer) -> Origin:
        """Of a follower that was pickled: which model it was an average of is not known any more."""
        origin = Origin(None, copy)
        origin._written = _fingerprint(copy.values)
        return origin

    @property
    def is_lost(self) -> bool:
        """Whether the copy was pickled when it followed, or follows a layer: pickled, it has lost it."""
        return self.follows or self.of is _nobody

    @staticmethod
    def tell_copies(origin: SparseLayer, change: SlotChange) -> None:
        """Slots of ``origin`` have changed hands: followers change theirs likewise, other copies remember it."""
        if torch.equal(change.before, change.slot_blocks):
            return
        for copy in list(_copies.get(origin, ())):
            known = copy._origin
            if known is None or known.of() is not origin:
                _copies[origin].discard(copy)
            elif known.follows:
                bring(copy, origin, change)
            elif known._written is None:
                known._written = _fingerprint(copy.values)

    def forget(self) -> None:
        """What was written so far is of no matter: the copy is given a state that fits its slots."""
        self._written = None

    def check(self, copy: SparseLayer) -> None:
        """Raises RuntimeError if the copy was averaged with its origin over a change of the mask. Before a forward."""
        if not self._intact(copy):
            if self.of is _nobody:
                raise RuntimeError(
                    "this average of a sparse layer was pickled and then written to, and nobody knows whether blocks "
                    "of its model had moved meanwhile. Call ddst.follow(average, model) right after loading it"
                )
            raise RuntimeError(
                "this copy of a sparse layer was written to after blocks of the layer it was copied from had moved, so "
                f"it holds averages of different blocks. {_REMEDY}"
            )
        # Not what torch.func.functional_call puts in their place.
        own = isinstance(copy.values, nn.Parameter)
        if not self._watched and own and copy.values.requires_grad and copy.values.is_leaf:
            self._watched = True
            self_of = weakref.ref(copy)

            def has_gradient(_: Tensor) -> None:
                layer = self_of()
                if layer is not None and layer._origin is self:
                    layer._origin = None

            copy.values.register_post_accumulate_grad_hook(has_gradient)

    def _intact(self, copy: SparseLayer) -> bool:
        return self._written is None or _fingerprint(copy.values) == self._written

    @contextmanager
    def converted(self, copy: SparseLayer) -> Iterator[None]:
        """Around a change of device or dtype: the same values, though not the same bits."""
        intact = self._written is not None and self._intact(copy)
        yield
        if intact:
            self._written = _fingerprint(copy.values)

    def check_map(self, copy: SparseLayer) -> None:
        """Raises RuntimeError unless a map of slots that was written over the copy's is its origin's.

        An average of all entries of a state dict, integers too, gives a map of no layer.
        """
        origin = self.of()
        if origin is not None and not torch.equal(copy.slot_blocks, origin.slot_blocks):
            raise RuntimeError(
                "slot_blocks of a copy of a sparse layer was overwritten with something else than slot_blocks of the "
                f"layer it was copied from: it says where blocks are and takes part in no average. {_REMEDY}"
            )


def _nobody() -> None:
    """The layer that a lost follower was copied from."""


def check_followers(layer: SparseLayer) -> None:
    """Raises RuntimeError if a map that was written over the layer's is not that of the averages that follow it.

    They may have been updated since it was written, so bringing them along now could come too late.
    """
    if any(not torch.equal(copy.slot_blocks, layer.slot_blocks) for copy in followers_of(layer)):
        raise RuntimeError(
            "slot_blocks was overwritten in place with other slots, and averages follow this layer, which were not "
            "told: load_state_dict and set_block_mask tell them. Or call ddst.follow(average, model) right after "
            "writing, before the average is updated"
        )


def followers_of(layer: SparseLayer) -> list[SparseLayer]:
    """The averages whose slots change hands with the layer's (:func:`follow`), and those that follow them."""
    found: list[SparseLayer] = []
    for copy in list(_copies.get(layer, ())):
        if copy._origin is not None and copy._origin.follows and copy._origin.of() is layer:
            found += [copy, *followers_of(copy)]
    return found


def bring(copy: SparseLayer, layer: SparseLayer, change: SlotChange | None = None) -> None:
    """Gives a copy the slots of a layer: of blocks that it does not have its values are let go, new ones are zero.

    Args:
        change: what has just changed in the layer, if anything.
    """
    if torch.equal(copy.slot_blocks, layer.slot_blocks):
        return
    if change is None or not torch.equal(copy.slot_blocks, change.before):
        change = SlotChange.between(copy.slot_blocks, layer.slot_blocks)
    copy._follow_change(change)


def follow(average: nn.Module, model: nn.Module) -> None:
    """Makes the sparse layers of an average follow those of the model it averages, from now on.

    Whenever blocks of the model move, the same slots of the average change hands at the same moment: what the model
    dropped leaves the average, what it grew enters with the value 0. So an average that somebody else's code keeps, by
    ``lerp`` over parameters, by :class:`torch.optim.swa_utils.AveragedModel` and its like, averages every block with
    itself. Call it once, after making the average; ``ddst.EMA`` does so itself.

    Blocks of the average that the model does not have at the moment of the call are let go, and blocks that only the
    model has enter with 0. So call it again for an average that was pickled (``torch.save(average)``), which does not
    know its model any more: as it is, it computes what it computed, and once it is updated it raises.

    Args:
        average: a copy of the model, or a module that holds one (``AveragedModel``, timm's ``ModelEmaV3``).
        model: the model that is trained.

    Raises:
        TypeError: an argument is no module.
        ValueError: the two have not the same sparse layers.
        RuntimeError: ``slot_blocks`` of a layer was overwritten and says where no blocks are.

    >>> import copy, ddst
    >>> model = ddst.SparseLinear(32, 32, density=0.25)
    >>> average = copy.deepcopy(model)
    >>> follow(average, model)
    >>> _ = model.set_block_mask(~model.block_mask)
    >>> bool((average.block_mask == model.block_mask).all())
    True
    """
    from .base import SparseLayer

    for name, value in (("average", average), ("model", model)):
        if not isinstance(value, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")
    own = [layer for layer in model.modules() if isinstance(layer, SparseLayer)]
    mine = {id(layer) for layer in own}
    theirs = [layer for layer in average.modules() if isinstance(layer, SparseLayer) and id(layer) not in mine]
    if [(x.weight_shape, x.block) for x in own] != [(x.weight_shape, x.block) for x in theirs]:
        raise ValueError(
            f"average must be a copy of model, with the same sparse layers: it has {len(theirs)} of its own, the model "
            f"{len(own)}, or they differ in shape"
        )
    for layer in (*own, *theirs):
        layer._overwritten()
    for layer, copy in zip(own, theirs, strict=True):
        bring(copy, layer)
        copy._origin = Origin(layer, copy, follows=True)


def _fingerprint(values: Tensor) -> int | None:
    """A number that changes with the entries. (torch's version counter does not see what is written to ``.data``.)"""
    if values.is_meta or isinstance(values, FakeTensor):
        return None
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return int(values.detach().view(whole).sum(dtype=torch.int64))
