"""A dense convolution of few output channels behind a chain that waits: to the image, at the end of a generator."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...topology import as_blocks, build_topology, mask_shape
from .plan import convolve
from .value import Deferred


class Readable(Protocol):
    """A ``nn.Conv2d`` of stride and groups 1, zeros around, whose class has ``reads_deferred = True``."""

    in_channels: int
    out_channels: int
    weight: nn.Parameter


def block_of(out_channels: int, in_channels: int) -> tuple[int, int]:
    """Blocks of narrow rows, which the CPU's kernels compute with vectors along pixels."""
    return min(4, out_channels), min(32, in_channels)


_FULL: dict[tuple[int, ...], Tensor] = {}


def full_topology(shape: tuple[int, ...]) -> Tensor:
    """The topology of a dense weight ``[C_out, C_in, kH, kW]``, all blocks active; made once for each shape."""
    if shape not in _FULL:
        block = block_of(shape[0], shape[1])
        _FULL[shape] = build_topology(torch.ones(mask_shape(shape, block), dtype=torch.bool, device="cpu"))
    return _FULL[shape]


class Packed:
    """The convolution as the fused operator takes it: all blocks active, packed anew at every call.

    The weight is small, and libraries compute few output channels no faster than the block-sparse kernels do.
    """

    plan = None
    backend = "auto"
    scores_requested = False
    _record = 0

    def __init__(self, layer: Any) -> None:
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.padding_mode = layer.padding, layer.padding_mode
        self.weight, self.bias = layer.weight, layer.bias
        self.op_shape = tuple(layer.weight.shape)
        self.topology = full_topology(self.op_shape)

    def effective_values(self) -> Tensor:
        block = block_of(self.out_channels, self.in_channels)
        return as_blocks(self.weight, block).reshape(-1, *block)

    def _input_images(self, input: Tensor) -> Tensor:
        return input

    def _plane_padding(self, padding: Any, *_: Any) -> tuple[Any, tuple[int, int]]:
        return padding, (0, 0)


def convolve_dense(layer: Readable, input: Deferred) -> Any:
    """The layer's output with what waits in front of it fused; on devices by its own code: then None."""
    if input.device.type != "cpu":
        return None
    packed: Any = Packed(layer)
    return convolve(packed, input)
