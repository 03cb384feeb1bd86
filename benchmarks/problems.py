"""The layers that the benchmarks measure, and the tensors and programs of one of them, packed and dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ddst import topology

PASSES = ("forward", "dgrad", "wgrad")
Work = Callable[[], Tensor]


@dataclass(frozen=True)
class Layer:
    """A layer by name: a convolution over images of size x size with 'same' padding, or a linear layer (size 0)."""

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    size: int
    stride: int = 1

    @property
    def is_linear(self) -> bool:
        """Whether this is a linear layer."""
        return self.size == 0

    @property
    def weight_shape(self) -> list[int]:
        """Shape of the dense weight."""
        shape = [self.out_channels, self.in_channels]
        return shape if self.is_linear else [*shape, self.kernel, self.kernel]

    @property
    def padding(self) -> int:
        """Padding on each side."""
        return self.kernel // 2

    @property
    def out_pixels(self) -> int:
        """Output pixels of one image."""
        out = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        return 1 if self.is_linear else out * out


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("conv3x3-256-8", 256, 256, 3, 8),
        Layer("conv3x3-256-16", 256, 256, 3, 16),
        Layer("conv3x3-256-32", 256, 256, 3, 32),
        Layer("conv3x3-128-8", 128, 128, 3, 8),
        Layer("conv3x3-128-16", 128, 128, 3, 16),
        Layer("conv3x3-128-32", 128, 128, 3, 32),
        Layer("conv3x3-256-4", 256, 256, 3, 4),
        Layer("conv4x4s2-128-32", 128, 256, 4, 32, 2),
        Layer("conv1x1-256-32", 256, 256, 1, 32),
        Layer("linear-1024", 1024, 1024, 1, 0),
        Layer("linear-128-4096", 128, 4096, 1, 0),
    )
}


@dataclass(frozen=True)
class Problem:
    """One layer at one density: tensors, and the programs of every pass."""

    layer: Layer
    mask: Tensor
    values: Tensor
    topology: Tensor
    weight: Tensor
    input: Tensor
    grad_output: Tensor
    block: tuple[int, int]
    channels_last: bool

    @classmethod
    def make(cls, layer: Layer, density: float, batch: int, block: tuple[int, int], channels_last: bool) -> Problem:
        """Random tensors from a fixed seed; the packed side's activations are NHWC if `channels_last`."""
        generator = torch.Generator().manual_seed(0)
        blocks = 1
        for size in topology.mask_shape(layer.weight_shape, block):
            blocks *= size
        mask = topology.random_mask(layer.weight_shape, block, max(1, round(density * blocks)), generator)
        values = topology.pack(torch.randn(layer.weight_shape, generator=generator), mask, block)
        weight = topology.unpack(values, mask, layer.weight_shape)
        if layer.is_linear:
            x = torch.randn(batch, layer.in_channels, generator=generator)
            gy = torch.randn(batch, layer.out_channels, generator=generator)
        else:
            out = (layer.size + 2 * layer.padding - layer.kernel) // layer.stride + 1
            x = torch.randn(batch, layer.in_channels, layer.size, layer.size, generator=generator)
            gy = torch.randn(batch, layer.out_channels, out, out, generator=generator)
        return cls(layer, mask, values, topology.build_topology(mask), weight, x, gy, block, channels_last)

    def multiply_adds(self) -> float:
        """Multiply-adds of one pass of the packed layer (taps that fall outside the image included)."""
        return float(self.input.shape[0] * self.layer.out_pixels * self.values.numel())

    def dense_multiply_adds(self) -> float:
        """Multiply-adds of one pass of the dense layer."""
        return float(self.input.shape[0] * self.layer.out_pixels * self.weight.numel())

    def packed(self) -> list[Work]:
        """The packed operators: forward, input gradient, weight gradient."""
        ops, shape, block = torch.ops.ddst, self.layer.weight_shape, list(self.block)
        values, topo = self.values, self.topology
        x, gy = _laid_out(self.input, self.channels_last), _laid_out(self.grad_output, self.channels_last)
        if self.layer.is_linear:
            return [
                lambda: ops.linear(x, values, None, topo, shape),
                lambda: ops.linear_input_grad(gy, values, topo, shape),
                lambda: ops.linear_weight_grad(gy, x, topo, shape, block),
            ]
        window = ([self.layer.stride] * 2, [self.layer.padding] * 2, [1, 1])
        size, last = list(x.shape[2:]), self.channels_last
        return [
            lambda: ops.conv2d(x, values, None, topo, shape, *window, last),
            lambda: ops.conv2d_input_grad(gy, values, topo, shape, size, *window, last),
            lambda: ops.conv2d_weight_grad(gy, x, topo, shape, block, *window),
        ]

    def dense(self, channels_last: bool, dtype: torch.dtype = torch.float32) -> list[Work]:
        """Dense torch on the same tensors in one layout: forward, input gradient, weight gradient."""
        x, gy, weight = (_laid_out(t.to(dtype), channels_last) for t in (self.input, self.grad_output, self.weight))
        if self.layer.is_linear:
            return [lambda: F.linear(x, weight), lambda: gy @ weight, lambda: gy.t() @ x]
        stride, padding = [self.layer.stride] * 2, [self.layer.padding] * 2

        def backward(index: int) -> Tensor:
            wanted = [index == 0, index == 1, False]
            return torch.ops.aten.convolution_backward(
                gy, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
            )[index]

        return [
            lambda: F.conv2d(x, weight, None, stride, padding),
            lambda: backward(0),
            lambda: backward(1),
        ]

    def wrong_passes(self, tolerance: float = 1e-4) -> list[str]:
        """Names of the passes whose packed result differs from the dense one in float64."""
        wrong = []
        for name, packed, dense in zip(PASSES, self.packed(), self.dense(False, torch.float64), strict=True):
            expected = dense()
            if name == "wgrad":
                expected = topology.pack(expected, self.mask, self.block)
            error = (packed().double() - expected).abs().max() / expected.abs().max()
            if not error < tolerance:
                wrong.append(f"{name} (error {error:.1e})")
        return wrong


def _laid_out(tensor: Tensor, channels_last: bool) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last and tensor.dim() == 4 else tensor
