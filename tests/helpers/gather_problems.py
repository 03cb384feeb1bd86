"""Convolutions for the gather kernels on the emulator: tensors, blocks in random slots, results in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddst import topology as tp
from ddst.ops.cuda import compiled, gather
from helpers.slots import scatter

BLOCKS = [(16, 16), (32, 32), (64, 64), (32, 16), (64, 16)]
WINDOWS = [  # kernel, stride, padding
    ((1, 1), (1, 1), (0, 0)),
    ((3, 3), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1)),
    ((4, 4), (2, 2), (1, 1)),
    ((1, 1), (2, 2), (0, 0)),
    ((2, 3), (1, 2), (3, 4)),
]
SM90 = gather.Device(132, 227 * 1024, (9, 0))
TINY = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-10}  # float32: operands are rounded


class Problem:
    """A convolution's tensors, its blocks in random slots with NaN in free ones; weight and results in float64."""

    def __init__(self, dtype, images, size, shape, block, window, density=0.4, seed=0) -> None:
        g = torch.Generator().manual_seed(seed)
        kernel, self.stride, self.padding = window
        self.shape, self.block, self.dtype = (*shape, *kernel), block, dtype
        self.mask = torch.rand(tp.mask_shape(self.shape, block), generator=g) < density
        self.slots = scatter(self.mask, free=4, seed=seed)
        self.topology = self.slots.topology
        packed = tp.pack(torch.empty(self.shape).uniform_(-1, 1, generator=g), self.mask, block)
        self.values = self.slots.spread(packed).to(dtype)
        self.x = torch.empty(images, shape[1], *size).uniform_(-1, 1, generator=g).to(dtype)
        self.bias = torch.empty(shape[0]).uniform_(-1, 1, generator=g).to(dtype)
        out = [(size[i] + 2 * self.padding[i] - kernel[i]) // self.stride[i] + 1 for i in (0, 1)]
        self.gy = torch.empty(images, shape[0], *out).uniform_(-1, 1, generator=g).to(dtype)

    @property
    def weight(self) -> Tensor:
        return tp.unpack(self.values[self.slots.of_block].double(), self.mask, self.shape)

    def y(self, x: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        x, weight = self.x.double() if x is None else x, self.weight if weight is None else weight
        return F.conv2d(x, weight, None, self.stride, self.padding)

    def gx(self, gy: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        gy, weight = self.gy.double() if gy is None else gy, self.weight if weight is None else weight
        return torch.nn.grad.conv2d_input(self.x.shape, weight, gy, self.stride, self.padding)

    def check(self, *, forward: bool = True, input_gradient: bool = True) -> None:
        """The passes. The error allowed is what rounding of result, operands (TF32) and float32 sums explain."""
        args = (self.stride, self.padding, (1, 1), True)
        if forward:
            y = compiled.conv2d(self.x, self.values, self.bias, self.topology, self.shape, *args)
            close(y, self.y() + self.bias.double()[:, None, None], self.y(self.x.double().abs(), self.weight.abs()) + 1)
        if input_gradient:
            gx = compiled.conv2d_input_grad(self.gy, self.values, self.topology, self.shape, self.x.shape[2:], *args)
            close(gx, self.gx(), self.gx(self.gy.double().abs(), self.weight.abs()))


def close(got: Tensor, want: Tensor, magnitude: Tensor) -> None:
    relative = magnitude if got.dtype == torch.float32 else want.abs()
    assert got.shape == want.shape
    assert bool(((got.double() - want).abs() <= relative * TINY[got.dtype] + magnitude * 2.0**-20).all())
