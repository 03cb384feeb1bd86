"""Optimizer state across a change of the block mask: at slots that changed hands it begins anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ddst._arguments import check_number, check_optimizer, check_tensor, check_type
from ddst.topology import SlotChange

# Running means of squared gradients: the ones for which a start at zero makes a grown block's first step too long.
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


def check_state(optimizer: Optimizer, param: Tensor) -> None:
    """Raises unless every state tensor of ``param`` has its shape or is a scalar.

    Args:
        optimizer: any torch optimizer.
        param: ``[slots, b_out, b_in]``, a layer's ``values``.

    Raises:
        ValueError: the state is factored (Adafactor), flat over all parameters (LBFGS) or of another shape.

    >>> param = torch.nn.Parameter(torch.zeros(3, 2, 2))
    >>> check_state(torch.optim.Adam([param]), param)
    """
    if isinstance(optimizer, torch.optim.LBFGS | torch.optim.Adafactor):
        raise ValueError(
            f"optimizer is {type(optimizer).__name__}, whose state is not one number per weight: it cannot follow a "
            "change of topology. Use one whose state has the parameter's shape, such as Adam, RMSprop or SGD"
        )
    _check_shapes(optimizer, optimizer.state.get(param, {}), param.shape)


def carry_state(
    optimizer: Optimizer, param: Tensor, change: SlotChange, second_moment: Tensor | float | str | None = None
) -> None:
    """A new weight's state at slots that changed hands; nothing happens at the others.

    A new weight's state is zero, except where the optimizer itself begins otherwise: Rprop's ``step_size`` at the
    learning rate, Adagrad's ``sum`` at ``initial_accumulator_value``. Written in place while the number of slots stays.

    Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Adagrad, Adadelta, ASGD, Rprop and SGD with momentum keep such states.
    Scalars (step counters) are left alone. ``param`` itself and its gradient are the layer's
    (:meth:`ddst.nn.storage.PackedStorage.set_block_mask`); this function may be called before or after it.

    Args:
        optimizer: the optimizer that holds ``param``; without a state for it nothing happens.
        param: a layer's ``values``, ``[slots, b_out, b_in]`` before or after the change.
        change: what :meth:`~ddst.nn.storage.PackedStorage.set_block_mask` returned.
        second_moment: what the running mean of squared gradients (``exp_avg_sq``, ``max_exp_avg_sq``, ``square_avg``)
            of a grown block starts from. None: zero. A tensor with an entry for each of ``change.entered``, or a
            number: that value at each of the block's weights; negative or not finite counts as zero. ``"mean"``: the
            mean of the state over the blocks that stay.

    Raises:
        ValueError: the state is factored or flat (before anything is changed), or ``second_moment`` has a wrong shape.

    Numerics: copies, exact. Started at zero, the first step of a grown block under Adam is ``lr / √(1 − β2)``: 3.2
        times ``lr`` at β2 = 0.9, 32 times at 0.999. Its squared gradient per weight is the natural start.

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
    state = optimizer.state.get(param)
    if not state:
        return
    shape = torch.Size([change.before.numel(), *param.shape[1:]])
    _check_shapes(optimizer, state, shape)
    if isinstance(second_moment, Tensor) and second_moment.shape != change.entered.shape:
        raise ValueError(f"second_moment must have the shape ({change.grown},), got {tuple(second_moment.shape)}")
    starts = _own_starts(optimizer, param)
    for key, held in state.items():
        if not isinstance(held, Tensor) or held.shape != shape:
            continue
        new = change.apply(held)
        if key in SECOND_MOMENTS and second_moment is not None and change.grown:
            _start(new, change, second_moment)
        elif key in starts:
            new[change.fresh.to(new.device)] = starts[key]
        state[key] = new


def _check_shapes(optimizer: Optimizer, state: dict[str, Any], shape: torch.Size) -> None:
    """Raises unless every tensor of a parameter's state has this shape or is a scalar."""
    kind = type(optimizer).__name__
    for key, entry in state.items():
        tensors = [s for s in entry if isinstance(s, Tensor)] if isinstance(entry, list | tuple) else []
        if isinstance(entry, Tensor) and entry.dim() > 0 and entry.shape != shape:
            tensors = [entry]
        if tensors:
            raise ValueError(
                f"optimizer {kind} keeps a state {key!r} of shape {tuple(tensors[0].shape)} for a parameter of shape "
                f"{tuple(shape)}: a factored or flat state cannot follow a change of topology"
            )


def _own_starts(optimizer: Optimizer, param: Tensor) -> dict[str, Any]:
    """The states of a new weight that are not zero, by the settings of the parameter's group."""
    group: dict[str, Any] = next((g for g in optimizer.param_groups if any(p is param for p in g["params"])), {})
    starts = {}
    if "step_sizes" in group:  # Rprop
        starts["step_size"] = group["lr"]
    if "initial_accumulator_value" in group:  # Adagrad
        starts["sum"] = group["initial_accumulator_value"]
    return starts


def _start(state: Tensor, change: SlotChange, second_moment: Tensor | float | str) -> None:
    """Fills the grown blocks of a carried second moment, in place."""
    entered = change.entered.to(state.device)
    if isinstance(second_moment, str):
        kept = change.slot_blocks >= 0
        kept[change.entered] = False
        blocks = state[kept.to(state.device)]
        start = blocks.mean() if blocks.numel() else state.new_zeros(())
    else:
        start = torch.as_tensor(second_moment, dtype=state.dtype, device=state.device)
        start = torch.where(start.isfinite() & (start > 0), start, 0)
        if start.dim():
            start = start.view(-1, *[1] * (state.dim() - 1))
    state[entered] = start.expand_as(state[entered])
