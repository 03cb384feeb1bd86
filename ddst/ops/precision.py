"""Which dtype a block-sparse operator computes in, and which one it returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def in_compute_dtype(
    input: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[torch.dtype, tuple[Tensor, Tensor, Tensor | None]]:
    """``(result dtype, (input, values, bias) in the compute dtype)``.

    On the CPU, 16-bit floats compute in float32 and return their own dtype; elsewhere they are computed in themselves,
    with float32 sums. Under autocast all floating arguments but float64 are taken as of the autocast dtype first, as
    torch does for its own convolution.

    Raises:
        TypeError: dtypes that differ, or that no kernel computes in.
        RuntimeError: devices that differ.

    >>> dtype, (x, w, b) = in_compute_dtype(torch.ones(2).half(), torch.ones(2).half(), None)
    >>> dtype, x.dtype
    (torch.float16, torch.float32)
    """
    dtype = input.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"input must be float32, float64, float16 or bfloat16, got {dtype}")
    device = input.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        input, values = input.to(dtype), values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, tensor in (("values", values), ("bias", bias)):
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(f"{name} must be on the device of input, {input.device}, got {tensor.device}")
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} must have the dtype of input, {dtype}, got {tensor.dtype}")
    if dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(f"input must be float32, float64, float16 or bfloat16, got {dtype}")
    wide = compute_dtype(dtype, device)
    if input.dtype == wide:  # and so are the others
        return dtype, (input, values, bias)
    return dtype, (input.to(wide), values.to(wide), None if bias is None else bias.to(wide))


def compute_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype in which tensors of a floating dtype are multiplied on a type of device.

    >>> compute_dtype(torch.bfloat16, "cpu"), compute_dtype(torch.bfloat16, "cuda")
    (torch.float32, torch.bfloat16)
    """
    return torch.float32 if device == "cpu" and dtype in (torch.float16, torch.bfloat16) else dtype


def tf32_allowed(*, linear: bool) -> bool:
    """Whether torch lets float32 products be TF32 on CUDA devices: those of linear layers, or of convolutions.

    Asked of ``fp32_precision``, which follows the older ``allow_tf32``; that one raises once the new setting is used.
    """
    settings: Any = torch.backends.cuda.matmul if linear else torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return settings.fp32_precision == "tf32"
