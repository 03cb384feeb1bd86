"""What the gather kernels are asked: a convolution, a device; as the library of CUDA C++ kernels takes it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ... import _extension

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Operators that gather -> whether they are input gradients.
GATHERS = {"conv2d": False, "linear": False, "conv2d_input_grad": True, "linear_input_grad": True}
GATHERS |= {"norm_act_conv2d": False, "norm_act_conv2d_input_grad": True}


class Window(NamedTuple):
    """Where a convolution's taps lie."""

    input_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


class Device(NamedTuple):
    """Facts of a CUDA device: multiprocessors, bytes of shared memory that a CTA may have, compute capability."""

    multiprocessors: int
    shared_bytes: int
    capability: tuple[int, int]


def dtype_code(dtype: torch.dtype, allow_tf32: bool) -> int:
    """``DDST_CUDA_…`` of csrc/cuda/ddst_cuda.h.

    >>> dtype_code(torch.bfloat16, True), dtype_code(torch.float32, True), dtype_code(torch.float32, False)
    (0, 2, 3)
    """
    return DTYPES.index(dtype) + (dtype == torch.float32 and not allow_tf32)


def problem_of(
    dtype: int, weight_shape: Sequence[int], block: Sequence[int], window: Window, images: int
) -> ctypes.Array[ctypes.c_int32]:
    """``ddst_cuda_conv2d_problem`` of csrc/cuda/ddst_cuda.h, whose fields are 32-bit ints only."""
    (height, width), stride, padding = window
    out = [(window.input_size[i] + 2 * padding[i] - weight_shape[2 + i]) // stride[i] + 1 for i in (0, 1)]
    fields = (
        images, height, width, weight_shape[1], *out, weight_shape[0], *weight_shape[2:], *stride, *padding, *block,
        dtype,
    )  # fmt: skip
    return (ctypes.c_int32 * len(fields))(*fields)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The library of CUDA C++ kernels, for its functions that are no operators: an operator has no string to give."""
    return ctypes.CDLL(str(_extension.CUDA_LIBRARY))
