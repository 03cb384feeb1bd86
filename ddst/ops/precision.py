"""Which dtype a block-sparse operator computes in, and which one it returns."""

from __future__ import annotations

import torch
from torch import Tensor


def in_compute_dtype(
    input: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[torch.dtype, tuple[Tensor, Tensor, Tensor | None]]:
    """``(result dtype, (input, values, bias) in the compute dtype)``.

    16-bit floats compute in float32 and return their own dtype. Under autocast all floating arguments but float64 are
    taken as of the autocast dtype first, as torch does for its own convolution.

    Raises:
        TypeError: dtypes that differ, or that no kernel computes in.

    >>> dtype, (x, w, b) = in_compute_dtype(torch.ones(2).half(), torch.ones(2).half(), None)
    >>> dtype, x.dtype
    (torch.float16, torch.float32)
    """
    dtype = input.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"input must be float32, float64, float16 or bfloat16, got {dtype}")
    device = input.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        input, values = input.to(dtype), values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, tensor in (("values", values), ("bias", bias)):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} must have the dtype of input, {dtype}, got {tensor.dtype}")
    if dtype in (torch.float32, torch.float64):
        return dtype, (input, values, bias)
    if dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"input must be float32, float64, float16 or bfloat16, got {dtype}")
    wide = None if bias is None else bias.float()
    return dtype, (input.float(), values.float(), wide)
