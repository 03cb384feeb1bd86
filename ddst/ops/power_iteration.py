"""The fake kernel of ``ddst::power_iteration``, which :mod:`ddst.nn.spectral_norm` calls."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("ddst::power_iteration")
def _power_iteration_fake(
    values: Tensor,
    topology: Tensor,
    u: Tensor,
    v: Tensor,
    matrix_shape: list[int],
    channels: int,
    taps: int,
    iterations: int,
    transposed: int,
    parametrization: int,
    eps: float,
    noise: float,
) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)
