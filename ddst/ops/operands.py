"""What the public operators check of their operands before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._arguments import check_int, check_tensor


def check_operands(input: Any, values: Any, bias: Any, topology: Any) -> None:
    """Raises TypeError unless they are tensors; sizes and dtypes are the operators' business."""
    tensors = isinstance(input, Tensor) and isinstance(values, Tensor) and isinstance(topology, Tensor)
    if not (tensors and (bias is None or isinstance(bias, Tensor))):
        for name, value in (("input", input), ("values", values), ("topology", topology), ("bias", bias)):
            if name != "bias" or value is not None:
                check_tensor(name, value)


def check_shape(weight_shape: Any) -> Sequence[int]:
    """A tuple or list of ints of at least 1."""
    if not isinstance(weight_shape, tuple | list):
        raise TypeError(f"weight_shape must be a tuple of ints, got {type(weight_shape).__name__}")
    for size in weight_shape:
        check_int("weight_shape", size, 1)
    return weight_shape
