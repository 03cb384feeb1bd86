"""Modules as other people write them: each holds its weight as a plain parameter and computes in its own way."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddst.nn import PackedParameter


class EqualConv(nn.Module):
    """Of the StyleGANs: the weight is scaled whenever it is used."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel, kernel))
        self.bias = nn.Parameter(torch.randn(c_out))
        self.scale = 1 / math.sqrt(c_in * kernel**2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.weight.shape[-1] // 2)


class EqualLinear(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in))
        self.bias = nn.Parameter(torch.randn(c_out))
        self.scale = 1 / math.sqrt(c_in)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class EqualNet(nn.Module):
    """Three convolutions, the first too narrow for blocks of 16, and two linear layers, the last torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = EqualConv(3, 32), EqualConv(32, 32), EqualConv(32, 64)
        self.mapping, self.last = EqualLinear(64, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third):
            x = F.leaky_relu(layer(x), 0.2)
        return self.last(F.leaky_relu(self.mapping(x.mean((2, 3))), 0.2))


class Holding(nn.Module):
    """A model around a module, which ``sparsify`` would not take by itself if it is a layer of torch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def packed_of(module: Any, name: str = "weight") -> PackedParameter:
    packed = module.get_submodule(f"packed_{name}")
    assert isinstance(packed, PackedParameter)
    return packed
