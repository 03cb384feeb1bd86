"""Fused halves of residual blocks for the check of correctness: what they return, and what is right in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddst import backends, topology
from ddst.benchmarks.gpu import calls
from ddst.benchmarks.gpu.problems import FREE, in_slots, scattered, slots_by_block
from ddst.benchmarks.gpu.timing import without_cudnn
from ddst.ops import Norm, norm_act_conv2d
from ddst.ops.norm_act_conv2d import composed


@dataclass(frozen=True)
class Half:
    """norm: "none", "channel" or "sample"; residual: 0 none, 1 of the output's size, 2 of half its sides."""

    name: str
    norm: str
    batch_stats: bool = True
    slope: float = 0.0
    upsample: int = 1
    pool: int = 1
    residual: int = 0
    batch: int = 5
    size: tuple[int, int] = (8, 8)
    stride: int = 1

    def __str__(self) -> str:
        return self.name

    def run(
        self, backend: str, device: str, block: tuple[int, int], dtype: torch.dtype
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Output, moments and gradients of a backend, and the same in float64.

        Raises:
            RefusedError: the backend does not do it.
        """
        out, into = 2 * block[0], 3 * block[1]
        shape = (out, into, 3, 3)
        window = ((self.stride,) * 2, (1, 1), (1, 1))
        self._refuse(backend, device, block, dtype, shape, window)
        g = torch.Generator().manual_seed(0)
        mask = torch.rand(topology.mask_shape(shape, block), generator=g) < 0.4
        slots = scattered(mask, int(mask.sum()) + FREE, g)
        values = in_slots(torch.randn(int(mask.sum()), *block, generator=g), slots)
        index = topology.topology_of_slots(slots, mask.shape).to(device)
        x = torch.randn(self.batch, into, *self.size, generator=g) + torch.linspace(-1, 1, into)[:, None, None]
        sides = [((side * self.upsample - 1) // self.stride + 1) // self.pool for side in self.size]
        grad = torch.randn(self.batch, out, *sides, generator=g)
        bias = torch.randn(out, generator=g)
        x, values, bias, grad = (t.to(device=device, dtype=dtype) for t in (x, values, bias, grad))
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        residual = None
        if self.residual:
            small = [side // self.residual for side in sides]
            residual = torch.randn(self.batch, out, *small, generator=g).to(device=device, dtype=dtype)
        leaves = {"input": x, "values": values, "bias": bias}
        mean = var = None
        if self.norm != "none":
            var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
            if not self.batch_stats:
                var, mean = var * 1.5, mean + 0.25
            var, mean = var.float(), mean.float()
            affine = (self.batch, into) if self.norm == "sample" else (into,)
            leaves |= {name: torch.randn(affine, generator=g).to(device) for name in ("gamma", "beta")}

        own = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
        norm = (
            None if mean is None or var is None else Norm(mean, var, own["gamma"], own["beta"], 1e-5, self.batch_stats)
        )
        with torch.enable_grad():
            y, moments = norm_act_conv2d(
                own["input"], own["values"], own["bias"], index, shape, *window, norm=norm, negative_slope=self.slope,
                upsample=self.upsample, pool=self.pool, residual=residual, residual_upsample=max(1, self.residual),
                moments=True, backend=backend,
            )  # fmt: skip
            grads = torch.autograd.grad(y, list(own.values()), grad)
        assert moments is not None
        results = {"output": y.detach(), "mean": moments[0], "variance": moments[1]}
        results |= dict(zip(own, grads, strict=True))

        wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
        with torch.enable_grad(), without_cudnn():
            y = composed(
                wide["input"], wide["values"], wide["bias"], None if residual is None else residual.double(),
                None if mean is None else mean.double(), None if var is None else var.double(), wide.get("gamma"),
                wide.get("beta"), index, list(shape), *(list(pair) for pair in window), 1e-5, self.slope, self.upsample,
                self.pool, max(1, self.residual), self.batch_stats, backends.code("reference"), 0,
            )  # fmt: skip
            grads = torch.autograd.grad(y, list(wide.values()), grad.double())
        right_var, right_mean = torch.var_mean(y.detach(), (0, 2, 3), correction=0)
        expected = {"output": y.detach(), "mean": right_mean, "variance": right_var}
        expected |= dict(zip(wide, grads, strict=True))
        active = slots_by_block(slots).to(device)
        for found in (results, expected):
            found["values"] = found["values"][active]
        return results, expected

    def _refuse(
        self,
        backend: str,
        device: str,
        block: tuple[int, int],
        dtype: torch.dtype,
        shape: tuple[int, ...],
        window: tuple[tuple[int, int], ...],
    ) -> None:
        if not torch._C._dispatch_has_kernel_for_dispatch_key("ddst::norm_act_conv2d", device.upper()):
            raise calls.RefusedError(f"there is no fused half block on {device!r}")
        if backend != "cuda":
            return
        from ddst.ops.cuda import compiled

        for op in ("norm_act_conv2d", "norm_act_conv2d_input_grad", "norm_act_conv2d_weight_grad"):
            yes, reason = compiled.supports(op, torch.device(device, 0), dtype, shape, block, *window)
            if not yes:
                raise calls.RefusedError(reason)


#: The halves of the blocks of networks, tiles of one sample and of several, phases of a stride.
HALVES = (
    Half("batch norm, residual", "channel", residual=1),
    Half("conditional norm, upsampled", "sample", slope=0.2, upsample=2, residual=2),
    Half("conditional norm of small images", "sample", size=(4, 4), batch=9),
    Half("ReLU, pooled", "none", pool=2, residual=1, size=(9, 8)),
    Half("running statistics, stride 2", "channel", batch_stats=False, stride=2, size=(11, 8)),
)
