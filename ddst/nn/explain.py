"""Which backend and kernels run a layer and why, and how near they come to what this machine can do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import BACKENDS, Problem, choose, supports
from ..measure import Spread, clock_of, interleaved, peak
from .base import SparseLayer
from .conv2d import SparseConv2d

REPEATS = 7


@dataclass(frozen=True)
class Rate:
    """What a pass reaches.

    Attributes:
        seconds: median of some calls. flops: 2 × active weights × output positions × images, twice that for the
            backward pass, which has two products. bytes: input, output and active values, moved once by each product.
        peak_share: of the measured peak of arithmetic. bandwidth_share: of the measured bandwidth of memory; above 1
            where caches serve.
    """

    seconds: float
    flops: float
    bytes: float
    peak_share: float
    bandwidth_share: float

    def __str__(self) -> str:
        return (
            f"{1e3 * self.seconds:.3f} ms, {self.flops / self.seconds / 1e9:.1f} GFLOP/s "
            f"({100 * self.peak_share:.0f} % of the measured peak), {self.bytes / self.seconds / 1e9:.1f} GB/s "
            f"({100 * self.bandwidth_share:.0f} % of the measured bandwidth)"
        )


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. ``str()`` gives the text.

    Attributes:
        backend: the backend that runs.
        capability: the instruction set of its kernels ("portable", "avx2", "avx512"), or "" where it has none.
        reason: why it runs.
        refused: every other backend and why it was not taken.
        forms: pass -> which kernel form the shape of the block leads to.
        slow: the passes for which the block's shape is a slow one.
        rates: "forward" and "backward" -> what they reach; empty without ``measure``.
    """

    layer: str
    backend: str
    capability: str
    reason: str
    refused: dict[str, str]
    forms: dict[str, str] = field(default_factory=dict)
    slow: tuple[str, ...] = ()
    rates: dict[str, Rate] = field(default_factory=dict)

    def __str__(self) -> str:
        kernel = f" ({self.capability} kernels)" if self.capability else ""
        lines = [self.layer, f"  runs on {self.backend}{kernel}: {self.reason}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        lines += [f"  {name}{' (slow)' * (name in self.slow)}: {form}" for name, form in self.forms.items()]
        lines += [f"  {name} reaches {rate}" for name, rate in self.rates.items()]
        return "\n".join(lines)


def explain(layer: SparseLayer, input: Tensor, *, measure: bool = True) -> Explanation:
    """``explain(layer, x)``: what ``layer(x)`` runs on, in which kernel form, why, and how fast that is.

    Args:
        layer: a block-sparse layer; it is not changed, no hook of it runs.
        input: what it would be called with.
        measure: also time forward and backward pass, and compare with what the machine was measured to reach
            (:func:`ddst.measure.peak`).

    Raises:
        TypeError: not a block-sparse layer.
        RuntimeError: no backend takes this input; the message holds the reasons.

    Cost: with ``measure`` some dozen calls of the layer, and half a second for the machine's peak in the first call.

    >>> from ddst.nn import SparseLinear
    >>> found = explain(SparseLinear(32, 32, block=(16, 4)), torch.zeros(1, 32), measure=False)
    >>> found.backend, found.slow
    ('cpu', ('input gradient',))
    """
    if not isinstance(layer, SparseLayer):
        raise TypeError(f"layer must be a block-sparse layer, got {type(layer).__name__}")
    computed = torch.float64 if input.dtype == torch.float64 else torch.float32
    chosen = choose(layer.backend, input.to(computed), layer.values)
    problem = Problem(input.device.type, computed, layer.block)
    asked = f"backend={layer.backend!r} asked for, " if layer.backend != "auto" else ""
    refused = {}
    for name in BACKENDS:
        if name != chosen:
            ok, reason = supports(name, problem)
            refused[name] = reason if not ok or name == "reference" else f"backend={layer.backend!r} asked for"
    capability = torch.ops.ddst.cpu_capability() if chosen == "cpu" else ""
    forms, slow = kernel_forms(layer.block, pixels=_pixels(layer, input)) if chosen == "cpu" else ({}, ())
    rates = _rates(layer, input, computed) if measure else {}
    reason = asked + supports(chosen, problem)[1]
    return Explanation(repr(layer), chosen, capability, reason, refused, forms, slow, rates)


#: Blocks of at most so many channels run with vectors along pixels where there are so many (csrc/cpu/gather_pass.hpp).
NARROW, MANY_PIXELS = 4, 512


def kernel_forms(block: tuple[int, int], *, pixels: tuple[int, int] = (0, 0)) -> tuple[dict[str, str], tuple[str, ...]]:
    """``(pass -> form, slow passes)`` of the CPU kernels for a block ``(b_out, b_in)``.

    Forward pass and input gradient keep a tile of pixels × channels of one block side in registers, the vectors along
    the channels, or for narrow sides at stride 1 along the pixels; the weight gradient lays them along whichever side
    divides evenly.

    Args:
        block: the block. pixels: of output and input, over all images; zeros at a stride above 1.

    >>> kernel_forms((16, 16))[0]["forward"]
    'vectors along the 16 output channels of a block'
    """
    sides = {"forward": (block[0], "output", pixels[0]), "input gradient": (block[1], "input", pixels[1])}
    forms = {name: _form(*side) for name, side in sides.items()}
    over = (block[1], "input") if block[1] % 8 == 0 else (block[0], "output")
    forms["weight gradient"] = _form(*over)
    slow = [name for name, (side, _, count) in sides.items() if side % 8 and not _over_pixels(side, count)]
    return forms, (*slow, *["weight gradient"] * (over[0] % 8 > 0))


def _over_pixels(side: int, pixels: int) -> bool:
    return side <= NARROW and pixels >= MANY_PIXELS


def _form(side: int, which: str, pixels: int = 0) -> str:
    if side % 8 == 0:
        return f"vectors along the {side} {which} channels of a block"
    if _over_pixels(side, pixels):
        return f"vectors along the pixels, as {side} {which} channel{'s' * (side > 1)} of a block do not fill one"
    if side < 8:
        return f"narrow form, {side} {which} channel{'s' * (side > 1)} of a block do not fill a vector"
    return f"vectors along the {side} {which} channels of a block, no multiple of 8: the last is partly empty"


def _pixels(layer: SparseLayer, input: Tensor) -> tuple[int, int]:
    """Pixels of output and input of a layer at stride 1, over all images; zeros at other strides."""
    if not isinstance(layer, SparseConv2d):
        return (input.numel() // input.shape[-1],) * 2
    if tuple(layer.stride) != (1, 1):
        return 0, 0
    input = input if input.dim() == 4 else input[None]
    with torch.no_grad():
        shape = F.conv2d(
            torch.empty(input.shape[0], 1, *input.shape[2:], device="meta"),
            torch.empty(1, 1, *layer.kernel_size, device="meta"),
            padding=layer.padding,
            dilation=layer.dilation,
        ).shape
    return shape.numel(), input.numel() // input.shape[1]


def _rates(layer: SparseLayer, input: Tensor, computed: torch.dtype) -> dict[str, Rate]:
    # A copy: it has no request for scores that the backward passes would feed, and eval mode stops power iterations.
    twin = copy.deepcopy(layer).eval()
    x = input.detach().requires_grad_()
    device = input.device.type
    with torch.enable_grad():
        y = twin._compute(x)
        wanted, gradient = [x, twin.values.requires_grad_()], torch.ones_like(y)
        y = twin._compute(x)

        def forward() -> None:
            with torch.no_grad():
                twin._compute(x)

        def backward() -> None:
            torch.autograd.grad(y, wanted, gradient, retain_graph=True)

        works: dict[str, Callable[[], Any]] = {"forward": forward, "backward": backward}
        samples = interleaved(list(works.values()), REPEATS, clock_of(device), least_seconds=1e-3)
    best = peak(device, computed)
    rates = {}
    for products, (name, times) in enumerate(zip(works, samples, strict=True), start=1):
        seconds = max(Spread.of(times).median, 1e-9)
        flops = products * 2.0 * layer.active_weights * (y.numel() / layer.weight_shape[0])
        moved = float(products * sum(t.numel() * t.element_size() for t in (x, y, twin.values)))
        rates[name] = Rate(seconds, flops, moved, flops / seconds / best.flops, moved / seconds / best.bandwidth)
    return rates
