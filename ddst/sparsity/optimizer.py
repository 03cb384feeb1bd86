"""Optimizer state across a change of the block mask: at slots that changed hands it begins anew.

Everything is looked into, and what is to be written is made, before anything is written: :class:`StateChange` cannot
fail half way for a reason that could have been known, and can be taken back.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddst._arguments import check_number, check_optimizer, check_tensor, check_type
from ddst.slot_change import SlotChange
from ddst.sparsity.second_moment import is_second_moment, is_sum, reached_share, start_of
from ddst.sparsity.wrapped import check_nothing_hidden, optimizers_of

#: What a grown block's state starts from, see :func:`carry_state`; a mapping holds whole states by their names.
Start = Tensor | float | str | Mapping[str, Tensor] | None

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_SIMPLE = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, type(None))
_OTHERS = "Use one whose state has the parameter's shape, such as Adam, RMSprop or SGD (docs/optimizers.md lists more)"


def check_state(optimizer: Optimizer, param: Tensor) -> None:
    """Raises unless every state that the optimizer, or one inside it, keeps for ``param`` can follow a change.

    Tensors of the parameter's shape and of one element, numbers and strings can, also in dicts and lists in the state.

    Args:
        optimizer: any torch optimizer.
        param: ``[slots, b_out, b_in]``, a layer's ``values``.

    Raises:
        ValueError: the state is factored (Adafactor), flat over all parameters (LBFGS) or of another shape; lies in an
            object, a tensor subclass or outside of ``optimizer.state``; an optimizer inside cannot be followed.

    >>> param = torch.nn.Parameter(torch.zeros(3, 2, 2))
    >>> check_state(torch.optim.Adam([param]), param)
    """
    for one in optimizers_of(optimizer, [param]):
        if isinstance(one, torch.optim.LBFGS | torch.optim.Adafactor):
            raise ValueError(
                f"optimizer is {type(one).__name__}, whose state is not one number per weight: it cannot follow a "
                f"change of topology. {_OTHERS}"
            )
        list(_entries(one, one.state.get(param, {}), param, param.shape))
        check_nothing_hidden(one, param)


def carry_state(
    optimizer: Optimizer, param: Tensor, change: SlotChange, second_moment: Tensor | float | str | None = None
) -> None:
    """A new weight's state at slots that changed hands; nothing happens at the others.

    A new weight's state is zero, except where the optimizer itself begins otherwise: Rprop's ``step_size`` at the
    learning rate, Adagrad's ``sum`` at ``initial_accumulator_value``. Written in place while the number of slots stays.

    Followed is every state of the parameter's shape, whatever the optimizer, also in dicts and lists, and in the
    optimizers that ``optimizer`` holds (see :func:`~ddst.sparsity.wrapped.optimizers_of`). Scalars (step counters) are
    left alone. ``param`` itself and its gradient are the layer's
    (:meth:`ddst.nn.storage.PackedStorage.set_block_mask`); this function may be called before or after it.

    Args:
        optimizer: the optimizer that holds ``param``; without a state for it nothing happens.
        param: a layer's ``values``, ``[slots, b_out, b_in]`` before or after the change.
        change: what :meth:`~ddst.nn.storage.PackedStorage.set_block_mask` returned.
        second_moment: what the running mean of squared gradients (``exp_avg_sq``, ``max_exp_avg_sq``, ``square_avg``,
            ``exp_avg_var``, ``variance_ma``) of a grown block starts from. None: zero. A tensor with an entry for each
            of ``change.entered``, or a number: that squared gradient per weight, times ``1 − β2^t``, what the running
            mean has reached of a steady one after t steps; negative or not finite counts as zero. ``"mean"``: the mean
            of the state over the blocks that stay, which a sum of squares (MADGRAD's ``grad_sum_sq``) starts from in
            either case.

    Raises:
        ValueError: the state cannot follow (before anything is changed), or ``second_moment`` has a wrong shape.

    Numerics: copies, exact. Started at zero, the first step of a grown block under Adam is, late in training,
        ``lr / √(1 − β2)``: 3.2 times ``lr`` at β2 = 0.9, 32 times at 0.999. Its squared gradient per weight is the
        natural start.

    >>> param = torch.nn.Parameter(torch.ones(2, 1, 1))
    >>> adam = torch.optim.Adam([param])
    >>> param.grad = torch.tensor([3.0, 4.0]).view(2, 1, 1)
    >>> adam.step()
    >>> slots, mask = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([[False, True, True]])
    >>> carry_state(adam, param, SlotChange.to_mask(slots, mask))
    >>> [round(x, 4) for x in adam.state[param]["exp_avg"].flatten().tolist()]
    [0.0, 0.4]
    """
    check_optimizer("optimizer", optimizer)
    check_tensor("param", param)
    check_type("change", change, SlotChange, "what set_block_mask returned")
    if isinstance(second_moment, str) and second_moment != "mean":
        raise ValueError(f'second_moment must be a tensor, a number, "mean" or None, got {second_moment!r}')
    if not (second_moment is None or isinstance(second_moment, Tensor | str)):
        check_number("second_moment", second_moment, finite=False)
    if isinstance(second_moment, Tensor) and second_moment.shape != change.entered.shape:
        raise ValueError(f"second_moment must have the shape ({change.grown},), got {tuple(second_moment.shape)}")
    StateChange(optimizer, param, change, second_moment).commit()


class StateChange:
    """What :func:`carry_state` is about to write, made but not written.

    Raises:
        ValueError: the state cannot follow.
    """

    @torch.no_grad()
    def __init__(self, optimizer: Optimizer, param: Tensor, change: SlotChange, second_moment: Start) -> None:
        shape = torch.Size([change.before.numel(), *param.shape[1:]])
        self._writes: list[_Write] = []
        seen: set[int] = set()
        for one in optimizers_of(optimizer, [param]):
            state = one.state.get(param)
            if not state or id(state) in seen:  # an outer optimizer may show the inner one's
                continue
            seen.add(id(state))
            group: dict[str, Any] = next((g for g in one.param_groups if any(p is param for p in g["params"])), {})
            own = _own_starts(group)
            for entry in _entries(one, state, param, shape):
                write = _Write.of(entry, change)
                if isinstance(second_moment, Mapping):
                    if entry.name in second_moment and change.grown:
                        write.start(second_moment[entry.name])
                elif is_second_moment(entry.name) and second_moment is not None and change.grown:
                    near = entry.container if isinstance(entry.container, dict) else {}
                    share = reached_share({**state, **near}, group)
                    if isinstance(second_moment, str) or is_sum(entry.name):
                        write.start(_mean_of_kept(entry.held, change))
                    else:
                        write.start(start_of(second_moment, share, entry.held))
                elif entry.name in own:
                    write.restart(own[entry.name])
                self._writes.append(write)

    @torch.no_grad()
    def commit(self) -> None:
        """Writes it."""
        for write in self._writes:
            write.commit()

    @torch.no_grad()
    def undo(self) -> None:
        """Takes :meth:`commit` back, or as much of it as was done."""
        for write in self._writes:
            write.undo()


@dataclass
class _Entry:
    """One state tensor of the parameter's shape and where it lies."""

    container: Any
    key: Any
    held: Tensor
    name: str


class _Write:
    """One state tensor's new entries: rows to write in place, or a new tensor where the number of slots changes."""

    def __init__(self, entry: _Entry, change: SlotChange, new: Tensor | None) -> None:
        self.entry, self.change, self.new = entry, change, new
        held = entry.held
        if new is None:
            self.rows = change.changed.to(held.device)
            self.saved = held[self.rows]
            self.fill = torch.zeros_like(self.saved)
        elif new.shape == held.shape:  # blocks move among the same slots
            self.saved = held.clone()

    @staticmethod
    def of(entry: _Entry, change: SlotChange) -> _Write:
        return _Write(entry, change, None if change.source is None else change.apply(entry.held.clone()))

    def start(self, values: Tensor) -> None:
        """Fills what entered."""
        if self.new is None:
            self.fill[: self.change.grown] = values  # rows that entered come first
        else:
            entered = self.change.entered.to(self.new.device)
            self.new[entered] = values.to(self.new.dtype).expand_as(self.new[entered])

    def restart(self, value: Any) -> None:
        """Fills every slot that begins anew."""
        if self.new is None:
            self.fill[:] = value
        else:
            self.new[self.change.fresh.to(self.new.device)] = value

    def commit(self) -> None:
        if self.new is None:
            self.entry.held.index_copy_(0, self.rows, self.fill)
        elif self.new.shape == self.entry.held.shape:
            self.entry.held.copy_(self.new)
        else:
            self.entry.container[self.entry.key] = self.new

    def undo(self) -> None:
        if self.new is None:
            self.entry.held.index_copy_(0, self.rows, self.saved)
        elif self.new.shape == self.entry.held.shape:
            self.entry.held.copy_(self.saved)
        else:
            self.entry.container[self.entry.key] = self.entry.held


def _entries(
    optimizer: Optimizer, container: Any, param: Tensor, shape: torch.Size, path: str = ""
) -> Iterator[_Entry]:
    """The tensors of the parameter's shape in its state; raises where something in it cannot follow."""
    kind = type(optimizer).__name__
    for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
        place = f"{path}[{key!r}]" if path else repr(key)
        refusal = f"optimizer {kind} keeps a state {place} of"
        if isinstance(value, Tensor):
            if value is param or (value.dim() <= 1 and value.numel() <= 1 and type(value) in _PLAIN):
                continue
            if value.shape != shape:
                raise ValueError(
                    f"{refusal} shape {tuple(value.shape)} for a parameter of shape {tuple(shape)}: a factored or flat "
                    f"state cannot follow a change of topology. {_OTHERS}"
                )
            if type(value) not in _PLAIN or value.layout != torch.strided or value.is_quantized:
                raise ValueError(
                    f"{refusal} type {type(value).__name__}, which is no plain tensor: it cannot follow a change of "
                    f"topology. {_OTHERS}"
                )
            if isinstance(container, tuple):
                raise ValueError(f"{refusal} the parameter's shape in a tuple, which cannot be written to. {_OTHERS}")
            yield _Entry(container, key, value, str(key))
        elif isinstance(value, dict | list | tuple):
            yield from _entries(optimizer, value, param, shape, place)
        elif not isinstance(value, _SIMPLE) and not (
            isinstance(value, set | frozenset) and all(isinstance(one, _SIMPLE) for one in value)
        ):
            raise ValueError(
                f"{refusal} type {type(value).__name__}: what lies in an object cannot follow a change of topology. "
                f"{_OTHERS}"
            )


# States that do not begin at zero: their name, the value or the setting of the group that they begin at, and the
# setting that tells whose they are. At zero some of these optimizers would divide by it.
_OWN_STARTS: tuple[tuple[str, float | str, str], ...] = (
    ("step_size", "lr", "step_sizes"),  # Rprop
    ("sum", "initial_accumulator_value", "initial_accumulator_value"),  # Adagrad
    ("exp_avg", "initial_accumulator", "initial_accumulator"),  # Yogi
    ("exp_avg_sq", "initial_accumulator", "initial_accumulator"),
    ("alphak", 1e-6, "d"),  # DAdaptAdaGrad
    ("alpha_k", 1e-6, "d"),
    ("beta1_prod", 1.0, "betas"),  # Adai
    ("bg", "pbg2", "pbg2"),  # VSGD
    ("bhg", "pbhg2", "pbhg2"),
)


def _own_starts(group: dict[str, Any]) -> dict[str, Any]:
    """The states of a new weight that are not zero, by the settings of the parameter's group."""
    return {
        name: group[start] if isinstance(start, str) else start
        for name, start, setting in _OWN_STARTS
        if setting in group
    }


def _mean_of_kept(held: Tensor, change: SlotChange) -> Tensor:
    """The mean over slots whose block stays, in the order of before; zero where none does."""
    if change.source is None:
        kept = change.slot_blocks >= 0
        kept[change.entered] = False
        slots = kept.nonzero()[:, 0]
    else:
        slots = change.source[change.source >= 0]
    blocks = held[slots.to(held.device)]
    return blocks.mean() if blocks.numel() else held.new_zeros(())
