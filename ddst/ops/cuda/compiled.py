"""The passes that run in CUDA C++ (``torch.ops.ddst_cuda.*``): one function for each, and what they refuse.

Arguments are checked by the caller as for every backend; index lists (:mod:`.kept_lists`) are made on the device and
without waiting for it. Scores of blocks are not among them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import _extension, backends
from ..precision import tf32_allowed
from . import gather, weight_grad
from .fused import norm_act_conv2d, norm_act_conv2d_input_grad, norm_act_conv2d_weight_grad
from .gather import conv2d, conv2d_input_grad, linear, linear_input_grad
from .gather_problem import GATHERS
from .weight_grad import conv2d_weight_grad, linear_weight_grad

__all__ = [
    "conv2d",
    "conv2d_input_grad",
    "conv2d_weight_grad",
    "linear",
    "linear_input_grad",
    "linear_weight_grad",
    "norm_act_conv2d",
    "norm_act_conv2d_input_grad",
    "norm_act_conv2d_weight_grad",
    "supports",
    "supports_all",
]

_WEIGHT_GRADS = ("conv2d_weight_grad", "linear_weight_grad", "norm_act_conv2d_weight_grad")


def supports(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    weight_shape: Sequence[int],
    block: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> tuple[bool, str]:
    """``(ok, reason)``: whether the CUDA C++ kernels run an operator, and if not why, whatever the input's size.

    Args:
        op: the operator's name, such as ``"conv2d_input_grad"``.
        device: a CUDA device.
        weight_shape: ``(C_out, C_in, kH, kW)``, of a linear layer ``(out, in)``.

    Cost: cached but for a few look-ups.

    >>> supports("conv2d_block_scores", torch.device("cuda:0"), torch.float32, (16, 16, 3, 3), (16, 16))
    (False, "conv2d_block_scores is not written in CUDA C++: use backend 'triton'")
    """
    if op not in GATHERS and op not in _WEIGHT_GRADS:
        return False, f"{op} is not written in CUDA C++: use backend 'triton'"
    if dtype not in gather.DTYPES:
        return False, f"dtype must be bfloat16, float16 or float32, got {dtype}"
    if not _extension.cuda_kernels_loaded():
        return False, "libddst_cuda.so is not loaded: it needs a CUDA torch and a build with nvcc"
    facts = gather.facts(device)
    if facts.capability < (8, 0):
        return False, f"needs compute capability 8.0, {device} has {facts.capability[0]}.{facts.capability[1]}"
    sides = (block[0], block[1])
    taps = (1, 1) if len(weight_shape) == 2 else (weight_shape[2], weight_shape[3])
    shape = (weight_shape[0], weight_shape[1], *taps)
    if op in _WEIGHT_GRADS:
        pairs = ((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]))
        geometry = weight_grad.Geometry(1, (1, 1), (1, 1), shape, sides, *pairs)
        why = weight_grad.refusal(geometry, dtype.itemsize, facts.shared_bytes)
        vector = 16 // dtype.itemsize
        if op.startswith("norm") and (shape[0] % vector or shape[1] % vector):
            why = f"channels must be multiples of {vector}, got {shape[1]} in, {shape[0]} out"
        return not why, why
    if tuple(dilation) != (1, 1):
        return False, f"dilation must be 1, got {tuple(dilation)}"
    # Any size will do: which of the tile's shapes fits depends on the kernel and its stride.
    size = (max(32, shape[2]), max(32, shape[3]))
    window = gather.Window(size, (stride[0], stride[1]), (padding[0], padding[1]))
    why = gather.refusal(
        dtype, shape, sides, window, 1, input_gradient=GATHERS[op], large_tile=False,
        allow_tf32=tf32_allowed(linear=op.startswith("linear")), device=facts,
    )  # fmt: skip
    return not why, why


def supports_all(problem: backends.Problem) -> tuple[bool, str]:
    """``(ok, reason)``: whether all three passes of a layer run here, on the current CUDA device."""
    if problem.device != "cuda":
        return False, f"runs on CUDA tensors only, got a tensor on {problem.device!r}"
    if problem.block is None:
        return False, "needs packed values: use backend 'triton'"
    shape = problem.block if problem.linear else (*problem.block, *problem.kernel)
    padding = (problem.kernel[0] // 2, problem.kernel[1] // 2)
    name = "linear" if problem.linear else "conv2d"
    device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    for op in (name, f"{name}_input_grad", f"{name}_weight_grad"):
        window = (problem.stride, padding, problem.dilation)
        ok, reason = supports(op, device, problem.dtype, shape, problem.block, *window)
        if not ok:
            return False, reason
    return True, "mma.sync on tensor cores, sums in float32; block scores run in Triton"


backends.register("cuda", supports_all)
