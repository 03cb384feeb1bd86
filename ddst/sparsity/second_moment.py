"""Which states of an optimizer are running means of squared gradients, and what a grown block's starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Parts of the names under which optimizers keep a running mean of squared gradients: ``exp_avg_sq`` and
# ``max_exp_avg_sq`` of the Adam family, ``square_avg`` of RMSprop and Adadelta, ``exp_avg_var`` of AdaBelief,
# ``variance_ma`` of Ranger21.
_MEANS = ("exp_avg_sq", "square_avg", "exp_avg_var", "variance_ma")
# Sums of them, which no single gradient tells: ``grad_sum_sq`` of MADGRAD.
_SUMS = ("grad_sum_sq",)


def is_second_moment(name: str) -> bool:
    """Whether a state of this name is a running mean, or a sum, of squared gradients.

    >>> [is_second_moment(name) for name in ("max_exp_avg_sq", "exp_avg", "grad_sum_sq")]
    [True, False, True]
    """
    return any(part in name for part in (*_MEANS, *_SUMS))


def is_sum(name: str) -> bool:
    """Whether it is a sum, so that a new weight's can only start from those of other weights."""
    return any(part in name for part in _SUMS)


def reached_share(state: Mapping[Any, Any], group: Mapping[str, Any]) -> float:
    """``1 − β2^t``: what a running mean that began at zero has reached of a steady squared gradient after t steps.

    The optimizer divides by it (Adam), or all its weights lack it (RMSprop): a new weight's start must have it too.

    Args:
        state: the optimizer's, of one parameter. group: the parameter's, with ``betas``, ``alpha`` or ``rho``.

    Returns:
        1 where β2 or t is not known.

    >>> round(reached_share({"step": torch.tensor(10.0)}, {"betas": (0.0, 0.999)}), 4)
    0.01
    """
    beta, step = _decay(state, group), _steps(state, group)
    if beta is None or step is None or not 0 <= beta < 1 or step <= 0:
        return 1.0
    return 1 - beta**step


def _decay(state: Mapping[Any, Any], group: Mapping[str, Any]) -> float | None:
    betas = group.get("betas")
    if isinstance(betas, list | tuple) and len(betas) > 1:
        # Adan's middle one is for differences of gradients.
        return float(betas[2 if len(betas) > 2 and "exp_avg_diff" in state else 1])
    for name in ("beta2", "alpha", "rho"):
        if isinstance(group.get(name), float | Tensor):
            return float(group[name])
    return None


def _steps(state: Mapping[Any, Any], group: Mapping[str, Any]) -> float | None:
    for place, name in ((state, "step"), (group, "step"), (group, "k")):
        count = place.get(name)
        if isinstance(count, int | float) or (isinstance(count, Tensor) and count.numel() == 1):
            return float(count)
    return None


def start_of(second_moment: Tensor | float, share: float, like: Tensor) -> Tensor:
    """What grown blocks' entries are filled with, ``[n, 1, 1]`` or a scalar: not finite or negative counts as zero."""
    start = torch.as_tensor(second_moment, dtype=torch.float64, device="cpu") * share
    start = torch.where(start.isfinite() & (start > 0), start, 0)
    if start.dim():
        start = start.view(-1, *[1] * (like.dim() - 1))
    return start.to(like.device, like.dtype)
