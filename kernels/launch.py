"""Launching a kernel at little cost on the host.

Triton's own launch binds names, inspects every argument and builds a key of text: tens of microseconds. Here all that
is done once, for a kernel with all its numbers; afterwards a launch hands addresses to the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ddst.ops.precision import tf32_allowed

#: Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 when they were imported).
INTERPRETED: bool = triton.knobs.runtime.interpret

# Triton compiles for addresses that are multiples of this, if those of the first launch are.
ALIGNMENT = 16


class Launch:
    """A kernel with everything settled but its tensors; call it with these.

    The kernel takes tensors, then numbers that it is not specialized on (``do_not_specialize``), then constants.

    Args:
        kernel: a ``triton.jit`` function.
        grid: number of programs along up to three axes.
        scalars: the numbers, by position.
        constants: the constants, by name; another value of one is another compiled kernel.
        warps, stages: warps per program, steps of a pipelined loop in flight.
        others: launches on the same tensors at another density, compiled with this one.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        scalars: tuple[int, ...],
        constants: Mapping[str, Any],
        warps: int,
        stages: int,
        others: Sequence[Launch] = (),
    ) -> None:
        programs = 1
        for count in grid:
            programs *= count
        if programs >= 2**31 or any(count >= 2**16 for count in grid[1:]):
            raise ValueError(f"{kernel.__name__} needs a grid of {grid} programs, more than a device can launch")
        self.kernel = kernel
        self.grid = (*grid, *[1] * (3 - len(grid)))
        self.scalars = scalars
        self.constants = dict(constants)
        # Fused multiply-adds are asked for: from 3.10 on, Triton leaves them out by default.
        self.options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        self.others = others
        ordered = [name for name in kernel.arg_names if name in self.constants]
        self._tail = (*scalars, *[self.constants[name] for name in ordered])
        self._compiled: dict[int, Any] = {}  # by device

    def __call__(self, *tensors: Any) -> None:
        """Runs the kernel on the current stream; each tensor but the last may also be a ``TensorDescriptor``."""
        device = tensors[-1].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(device, tensors)
        else:
            self._launch(device, tensors)

    def _launch(self, device: int, tensors: tuple[Any, ...]) -> None:
        arguments, addresses = [], 0
        for argument in tensors:
            if isinstance(argument, Tensor):
                argument = argument.data_ptr()
                addresses |= argument
            arguments.append(argument)
        aligned = addresses % ALIGNMENT == 0
        compiled = self._compiled.get(device)
        if compiled is not None and aligned:
            compiled[self.grid](*arguments, *self._tail)
            return
        compiled = self.kernel[self.grid](*tensors, *self.scalars, **self.constants, **self.options)
        for other in self.others:
            other.kernel.warmup(*tensors, *other.scalars, grid=other.grid, **other.constants, **other.options)
        if aligned and compiled is not None:  # the interpreter has nothing to keep
            self._compiled[device] = compiled


def native(images: Tensor) -> Tensor:
    """``[N, C, H, W]`` in channels_last memory at an aligned address: the tensor itself, or a copy."""
    if images.is_contiguous(memory_format=torch.channels_last) and images.data_ptr() % ALIGNMENT == 0:
        return images
    return images.clone(memory_format=torch.channels_last)


def native_rows(rows: Tensor) -> Tensor:
    """Contiguous memory at an aligned address: the tensor itself, or a copy."""
    if rows.is_contiguous() and rows.data_ptr() % ALIGNMENT == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def product_precision(dtype: torch.dtype, linear: bool) -> str:
    """ "tf32" for float32 where torch allows it for linear layers or convolutions, else "ieee"."""
    return "tf32" if dtype == torch.float32 and tf32_allowed(linear=linear) else "ieee"


def upcast(dtype: torch.dtype) -> bool:
    """Whether products must be made in float32: of bfloat16 in the interpreter (:func:`.tile.dot`)."""
    return INTERPRETED and dtype == torch.bfloat16
