"""Fused halves of residual blocks for the tests of device kernels: their tensors, and everything right in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ddst import backends
from ddst.ops.norm_act_conv2d import composed
from helpers.problems import Case, ConvProblem, lay_out

CONV = ConvProblem(batch=3, channels=(40, 24), size=(4, 5), block=(16, 16), slots="scattered")


@dataclass(frozen=True)
class HalfBlock:
    """norm: "none", "channel" or "sample"; residual: 0 none, 1 of the output's size, 2 of half its sides."""

    conv: ConvProblem = CONV
    norm: str = "channel"
    batch_stats: bool = True
    affine: bool = True
    slope: float = 0.0
    upsample: int = 1
    pool: int = 1
    residual: int = 0

    def __str__(self) -> str:
        plain = HalfBlock()
        names = [n for n in self.__dataclass_fields__ if n != "conv" and getattr(self, n) != getattr(plain, n)]
        parts = [f"{n}={getattr(self, n)}" for n in names]
        return ",".join([*parts, *([] if self.conv == plain.conv else [str(self.conv)])]) or "default"

    def build(self, dtype: torch.dtype = torch.float32, mean: float = 0.0, seed: int = 0) -> Built:
        """Tensors of channels that differ in mean and spread, about ``mean``."""
        case = self.conv.build(dtype, seed=seed)
        g = torch.Generator().manual_seed(seed + 1)
        n, c = case.x.shape[:2]
        wide = torch.promote_types(dtype, torch.float32)
        x = case.x.to(wide) * torch.linspace(0.5, 2, c)[:, None, None] + torch.linspace(-1, 1, c)[:, None, None] + mean
        x = lay_out(x.to(dtype), self.conv.layout)
        mean_, var, gamma, beta = None, None, None, None
        if self.norm != "none":
            var, mean_ = torch.var_mean(x.to(torch.float64), (0, 2, 3), correction=0)
            if not self.batch_stats:
                var, mean_ = var * 1.5, mean_ + 0.25
            var, mean_ = var.to(wide), mean_.to(wide)
            shape = (n, c) if self.norm == "sample" else (c,)
            if self.affine:
                gamma, beta = (torch.randn(shape, generator=g, dtype=wide) for _ in range(2))
                gamma.view(-1)[:2] = torch.tensor([0.0, -1.0], dtype=wide)
        explicit = self.conv.explicit()
        assert explicit is not None
        convolved = replace(self.conv, size=tuple(side * self.upsample for side in self.conv.size)).output_size
        size = [side // self.pool for side in convolved]
        residual = None
        if self.residual:
            assert all(side % self.residual == 0 for side in size), size
            shape = (n, self.conv.channels[1], *(side // self.residual for side in size))
            residual = torch.randn(shape, generator=g, dtype=wide).to(dtype)
        grad = lay_out(
            torch.randn(n, self.conv.channels[1], *size, generator=g, dtype=wide).to(dtype), self.conv.grad_layout
        )
        return Built(self, replace(case, x=x, grad=grad), residual, (mean_, var, gamma, beta), explicit)


@dataclass(frozen=True)
class Built:
    """The tensors of a half block, and the arguments of the operators."""

    block: HalfBlock
    case: Case
    residual: Tensor | None
    norm: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    window: Any

    @property
    def _weight(self) -> tuple[Tensor, list[int]]:
        return self.case.topology, list(self.case.weight_shape)

    @property
    def _window(self) -> list[list[int]]:
        return [list(pair) for pair in self.window]

    @property
    def _prologue(self) -> tuple[float, float, int, int]:
        return 1e-5, self.block.slope, self.block.upsample, self.block.pool

    def forward_arguments(self, moments: bool = True, channels_last: bool = True) -> tuple[Any, ...]:
        """Of ``ddst::norm_act_conv2d`` up to backend, without batch_stats as the kernels take them."""
        case, rest = self.case, (max(1, self.block.residual), moments, channels_last)
        return (
            case.x, case.values, case.bias, self.residual, *self.norm, *self._weight, *self._window, *self._prologue,
            *rest,
        )  # fmt: skip

    def input_grad_arguments(self) -> tuple[Any, ...]:
        case = self.case
        return (
            case.grad, case.x, case.values, *self.norm, *self._weight, *self._window, *self._prologue,
            self.block.batch_stats,
        )  # fmt: skip

    def weight_grad_arguments(self) -> tuple[Any, ...]:
        block = [list(self.case.block)]
        return (
            self.case.grad, self.case.x, *self.norm, *self._weight, *block, *self._window, *self._prologue,
        )  # fmt: skip

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """In float64: output, moments, and the gradients of input, values, bias, gamma and beta (where they are)."""
        case = self.case
        leaves = {
            "input": case.x,
            "values": case.values,
            "bias": case.bias,
            "gamma": self.norm[2],
            "beta": self.norm[3],
        }
        wide = {k: t.detach().double().requires_grad_() for k, t in leaves.items() if t is not None}
        mean, var = (None if t is None else t.double() for t in self.norm[:2])
        y = composed(
            wide["input"], wide["values"], wide.get("bias"), None if self.residual is None else self.residual.double(),
            mean, var, wide.get("gamma"), wide.get("beta"), *self._weight, *self._window, *self._prologue,
            max(1, self.block.residual), self.block.batch_stats, backends.code("reference"), 0,
        )  # fmt: skip
        grads = torch.autograd.grad(y, list(wide.values()), case.grad.double())
        found = torch.var_mean(y.detach(), (0, 2, 3), correction=0)[::-1]
        return {"output": y.detach(), "moments": torch.stack(found)} | dict(zip(wide, grads, strict=True))
