"""The tensors and the programs of one case: packed, and every baseline, for each of the three passes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ddst import topology
from ddst.benchmarks.registry import SKEW, Case, Layer, layer_of

PASSES = ("forward", "dgrad", "wgrad")
LAYOUTS = ("nchw", "channels_last")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
Work = Callable[[], Tensor]


@dataclass(frozen=True)
class Problem:
    """One case: tensors, and the programs of every pass."""

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
    def make(cls, case: Case, channels_last: bool = True) -> Problem:
        """Random tensors from a fixed seed; the packed side's activations are NHWC if `channels_last`."""
        layer, dtype = layer_of(case.layer), getattr(torch, case.dtype)
        generator = torch.Generator().manual_seed(0)
        mask = mask_of(case, generator)
        values = topology.pack(torch.randn(layer.weight_shape, generator=generator), mask, case.block)
        weight = topology.unpack(values, mask, layer.weight_shape).contiguous()
        image, out = layer.sides(layer.size, 1), layer.sides(layer.out_size, 1)
        if layer.op == "linear":
            image = out = []
        x = torch.randn([case.batch, layer.in_channels, *image], generator=generator)
        gy = torch.randn([case.batch, layer.out_channels, *out], generator=generator)
        topo = topology.build_topology(mask).to(case.device)
        weight, x, gy, values = (t.to(case.device, dtype) for t in (weight, x, gy, values))
        return cls(layer, mask.to(case.device), values, topo, weight, x, gy, case.block, channels_last)

    @property
    def density(self) -> float:
        """Active blocks over all blocks."""
        return float(self.mask.double().mean())

    def flops(self, dense: bool = False) -> float:
        """2 × useful multiply-adds of a pass of the packed (or the dense) layer: taps inside the image, no zeros."""
        layer = self.layer
        if dense:
            taps = math.prod(layer.weight_shape[2:])
            weights = torch.full([taps], float(layer.in_channels * layer.out_channels))
        else:
            sizes = topology.block_sizes(layer.weight_shape, self.block).double()
            per_tap = self.mask.cpu().reshape(*self.mask.shape[:2], -1).double()
            weights = (per_tap * sizes[:, :, None]).sum((0, 1))
        return float(2 * self.input.shape[0] * (weights.double() * _tap_pixels(layer).double()).sum())

    def bytes(self) -> float:
        """Bytes a packed pass cannot avoid to move: input, output (or their gradients), active values, each once."""
        return float(sum(t.numel() * t.element_size() for t in (self.input, self.grad_output, self.values)))

    def packed(self) -> list[Work]:
        """The packed operators: forward, input gradient, weight gradient."""
        return [_call(name, args) for name, args in self.packed_calls()]

    def packed_calls(self) -> list[tuple[str, list[object]]]:
        """Name and arguments of the registered operator of every pass."""
        shape, block, values, topo = self.layer.weight_shape, list(self.block), self.values, self.topology
        x, gy = _laid_out(self.input, self.channels_last), _laid_out(self.grad_output, self.channels_last)
        if self.layer.op == "linear":
            return [
                ("linear", [x, values, None, topo, shape]),
                ("linear_input_grad", [gy, values, topo, shape]),
                ("linear_weight_grad", [gy, x, topo, shape, block]),
            ]
        window, last = self._window(), self.channels_last
        # A transposed convolution is the input gradient of the convolution that has the roles swapped.
        image, small = (gy, x) if self.layer.transposed else (x, gy)
        gather: tuple[str, list[object]] = ("conv2d", [image, values, None, topo, shape, *window, last])
        size = list(image.shape[2:])
        spread: tuple[str, list[object]] = (
            "conv2d_input_grad", [small, values, topo, shape, size, *window, last],
        )  # fmt: skip
        first, second = (spread, gather) if self.layer.transposed else (gather, spread)
        return [first, second, ("conv2d_weight_grad", [small, image, topo, shape, block, *window])]

    def _window(self) -> list[list[int]]:
        """Stride, padding and dilation, as torch and the operators take them."""
        layer = self.layer
        return [layer.sides(layer.stride, 1), layer.sides(layer.padding, 0), layer.sides(layer.dilation, 1)]

    def converted(self) -> list[Work]:
        """The packed convolution on channels_last copies of NCHW tensors: two layout changes a pass, made by torch."""
        calls = replace(self, channels_last=True).packed_calls()

        def nhwc(tensor: Tensor) -> Tensor:
            return tensor.contiguous(memory_format=torch.channels_last)

        def nchw(tensor: Tensor) -> Tensor:
            return tensor.contiguous()

        x, gy = self.input, self.grad_output
        small, image = (x, gy) if self.layer.transposed else (gy, x)
        forward, dgrad, wgrad = (getattr(torch.ops.ddst, name).default for name, _ in calls)
        return [
            lambda: nchw(forward(nhwc(x), *calls[0][1][1:])),
            lambda: nchw(dgrad(nhwc(gy), *calls[1][1][1:])),
            lambda: wgrad(nhwc(small), nhwc(image), *calls[2][1][2:]),
        ]

    def dense(self, channels_last: bool, dtype: torch.dtype | None = None) -> list[Work]:
        """Dense torch on the same tensors in one layout: forward, input gradient, weight gradient."""
        dtype = dtype or self.input.dtype
        x, gy, weight = (_laid_out(t.to(dtype), channels_last) for t in (self.input, self.grad_output, self.weight))
        return self._dense_on(x, gy, lambda: weight)

    def masked(self, channels_last: bool) -> list[Work]:
        """Dense × mask: the weight is multiplied by a mask in the forward pass, its gradient after the backward."""
        raw = _laid_out(self.weight, channels_last)
        ones = torch.ones_like(self.values)
        mask = _laid_out(topology.unpack(ones, self.mask, self.layer.weight_shape).contiguous(), channels_last)
        x, gy = _laid_out(self.input, channels_last), _laid_out(self.grad_output, channels_last)
        forward, _, wgrad = self._dense_on(x, gy, lambda: raw * mask)
        dgrad = self._dense_on(x, gy, lambda: raw)[1]  # reads the product that the forward pass made
        return [forward, dgrad, lambda: wgrad() * mask]

    def _dense_on(self, x: Tensor, gy: Tensor, weight: Callable[[], Tensor]) -> list[Work]:
        if self.layer.op == "linear":
            return [lambda: F.linear(x, weight()), lambda: gy @ weight(), lambda: gy.t() @ x]
        shaped, transposed = weight(), self.layer.transposed
        settings = (*self._window(), transposed, [0, 0], 1)

        def backward(index: int, w: Tensor) -> Tensor:
            wanted = [index == 0, index == 1, False]
            return torch.ops.aten.convolution_backward(gy, x, w, None, *settings, wanted)[index]

        return [
            lambda: torch.convolution(x, weight(), None, *settings),
            lambda: backward(0, weight()),
            lambda: backward(1, shaped),  # reads the weight's shape only
        ]

    def torch_sparse(self, layout: str) -> list[Work]:
        """torch's own sparse matrices, "bsr" or "csr", for a linear layer.

        In their favour: W and Wᵀ are both stored, converted beforehand. The weight gradient is the sampled product for
        CSR; torch has none for BSR, nor non-square blocks on the CPU: such calls raise RuntimeError.
        """
        x, gy = self.input, self.grad_output
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse (CSR|BSR) tensor support is in beta")
            if layout == "csr":
                w, wt = self.weight.to_sparse_csr(), self.weight.t().to_sparse_csr()
            else:
                w, wt = self.weight.to_sparse_bsr(self.block), self.weight.t().to_sparse_bsr(self.block[::-1])
        return [
            lambda: (w @ x.t()).t(),
            lambda: (wt @ gy.t()).t(),
            lambda: torch.sparse.sampled_addmm(w, gy.t(), x, beta=0.0),
        ]

    def expected(self) -> list[Tensor]:
        """The three results of dense torch in float64; the weight gradient packed."""
        y, gx, gw = (work() for work in self.dense(False, torch.float64))
        return [y, gx, topology.pack(gw, self.mask, self.block)]

    def error(self, pass_: int, result: Tensor, expected: Tensor) -> float:
        """Largest difference over the largest expected entry. A weight gradient may come packed, dense or sparse."""
        if pass_ == 2 and result.layout != torch.strided:
            result = result.to_dense()
        if pass_ == 2 and result.dim() != 3:
            result = topology.pack(result, self.mask, self.block)
        if result.shape != expected.shape:
            return math.inf
        error = (result.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
        return float(error) if math.isfinite(float(error)) else math.inf

    def wrong(self, pass_: int, result: Tensor, expected: Tensor) -> str | None:
        """What is wrong with a result, or None."""
        error = self.error(pass_, result, expected)
        return None if error < TOLERANCE[self.input.dtype] else f"{PASSES[pass_]} (error {error:.1e})"


def mask_of(case: Case, generator: torch.Generator) -> Tensor:
    """The mask of a case."""
    shape = layer_of(case.layer).weight_shape
    nnz = max(1, round(case.density * math.prod(topology.mask_shape(shape, case.block))))
    make = skewed_mask if case.mask == "skewed" else topology.random_mask
    return make(shape, case.block, nnz, generator)


def skewed_mask(weight_shape: list[int], block: tuple[int, int], nnz: int, generator: torch.Generator) -> Tensor:
    """A mask whose block rows have from 1 to :data:`SKEW` shares of the blocks, in random order of rows.

    Rows that are full pass what they cannot hold on to the others, so that at high densities the skew shrinks.

    >>> mask = skewed_mask([64, 64], (16, 16), 5, torch.Generator().manual_seed(0))
    >>> sorted(mask.sum(1).tolist())
    [1, 1, 1, 2]
    """
    shape = topology.mask_shape(weight_shape, block)
    rows, width = shape[0], math.prod(shape[1:])
    shares = torch.linspace(1.0, SKEW, rows, dtype=torch.float64)[torch.randperm(rows, generator=generator)]
    low, high = 0.0, float(width)  # the factor at which the cut shares hold nnz blocks
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (shares * middle).clamp(max=width).sum() < nnz else (low, middle)
    exact = (shares * high).clamp(max=width)
    counts = exact.floor().long()
    order = (exact - counts).argsort(descending=True)
    counts[order[: nnz - int(counts.sum())]] += 1
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        mask[row, torch.randperm(width, generator=generator)[:count]] = True
    return mask.view(shape)


def _tap_pixels(layer: Layer) -> Tensor:
    """For every tap, the output pixels whose input pixel lies inside the image."""
    if layer.op == "linear":
        return torch.ones(1)
    # Of a transposed convolution: the input pixels whose output pixel lies inside.
    small, large = (layer.size, layer.out_size) if layer.transposed else (layer.out_size, layer.size)
    source = torch.arange(small) * layer.stride - layer.padding
    taps = source[None, :] + torch.arange(layer.kernel)[:, None] * layer.dilation
    inside = ((taps >= 0) & (taps < large)).sum(1)
    return inside if layer.dims == 1 else (inside[:, None] * inside[None, :]).flatten()


def _call(name: str, arguments: list[object]) -> Work:
    operator = getattr(torch.ops.ddst, name).default
    return lambda: operator(*arguments)


def _laid_out(tensor: Tensor, channels_last: bool) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last and tensor.dim() == 4 else tensor
