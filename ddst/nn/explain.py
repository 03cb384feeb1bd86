"""Which backend and kernels run a layer and why, and how near they come to what this machine can do."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._arguments import check_bool, check_tensor, check_type
from .._extension import cpu_capability
from ..backends import BACKENDS, Problem, choose, supports
from ..measure import Spread, clock_of, interleaved, peak
from ..ops.conv_transpose2d import output_size
from ..ops.cuda import preferred
from ..ops.precision import compute_dtype, tf32_allowed
from .base import SparseLayer
from .conv import SparseConvNd
from .conv_transpose import SparseConvTransposeNd

REPEATS = 7


@dataclass(frozen=True)
class Rate:
    """What a pass reaches.

    Attributes:
        seconds: median of some calls. flops: 2 × active weights × output positions × images (of a transposed
            convolution input positions), twice that for the backward pass, which has two products. bytes: input, output
            and active values, moved once by each product.
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
    """What :func:`ddst.explain` found. ``str()`` gives the text.

    Attributes:
        backend: the backend that runs.
        capability: the instruction set of its kernels ("portable", "avx2", "avx512", "neon", on a GPU for example
            "sm_90"), or "" where it has none.
        reason: why it runs.
        refused: every other backend and why it was not taken.
        forms: pass -> which kernel form the shape of the block leads to; with Triton, which configuration runs and
            whether it was measured on this device model.
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
        TypeError: not a block-sparse layer, or one that other code computes with (a packed parameter).
        RuntimeError: no backend takes this input; the message holds the reasons.

    Cost: with ``measure`` some dozen calls of the layer, and half a second for the machine's peak in the first call.

    >>> from ddst.nn import SparseLinear
    >>> found = explain(SparseLinear(32, 32, block=(16, 4)), torch.zeros(1, 32), measure=False)
    >>> found.backend, found.slow
    ('cpu', ('input gradient',))
    """
    check_type("layer", layer, SparseLayer, "a block-sparse layer")
    if not layer.runs:
        raise TypeError(
            f"layer must be a block-sparse layer with a forward pass, got a {type(layer).__name__}, whose weight other "
            "code computes with: its weight_uses say how"
        )
    check_tensor("input", input)
    check_bool("measure", measure)
    computed = compute_dtype(input.dtype, input.device.type)
    problem = layer.problem(input.device.type, computed)
    chosen = choose(layer.backend, problem)
    asked = f"backend={layer.backend!r} asked for, " if layer.backend != "auto" else ""
    refused = {}
    for name in BACKENDS:
        if name != chosen:
            ok, reason = supports(name, problem)
            if ok and name == "cuda" and layer.backend == "auto":
                reason = cuda_preference(layer, problem, input.device)
            elif ok and name != "reference":
                reason = f"backend={layer.backend!r} asked for"
            refused[name] = reason
    capability = ""
    forms: dict[str, str] = {}
    slow: tuple[str, ...] = ()
    if chosen == "cpu":
        capability = cpu_capability()
        forms, slow = kernel_forms(layer.block, pixels=_pixels(layer, input), narrow=_narrow(capability, computed))
        forms = {_pass(layer, name): form for name, form in forms.items()}
        forms, slow = {name: forms[name] for name in PASSES}, tuple(_pass(layer, name) for name in slow)
    elif chosen == "triton":
        capability = "sm_" + "".join(map(str, torch.cuda.get_device_capability(input.device)))
        forms = triton_forms(layer, input)
    rates = _rates(layer, input, computed) if measure else {}
    reason = asked + supports(chosen, problem)[1]
    return Explanation(repr(layer), chosen, capability, reason, refused, forms, slow, rates)


#: Pass -> the operator's ending.
PASSES = {"forward": "", "input gradient": "_input_grad", "weight gradient": "_weight_grad"}


def _pass(layer: SparseLayer, name: str) -> str:
    """What a layer does with a pass of its operators: a transposed convolution computes the input gradient forward."""
    swapped = {"forward": "input gradient", "input gradient": "forward"}
    return swapped.get(name, name) if layer.transposed else name


#: From so many pixels on, narrow blocks run with vectors along them (csrc/cpu/gather_pass.hpp).
MANY_PIXELS = 512


def _narrow(capability: str, dtype: torch.dtype) -> int:
    """Channels of the widest block that counts as narrow (csrc/cpu/kernels_*.cpp)."""
    if capability != "avx512":
        return 4
    return 7 if dtype == torch.float64 else 12


def kernel_forms(
    block: tuple[int, int], *, pixels: tuple[int, int] = (0, 0), narrow: int = 4
) -> tuple[dict[str, str], tuple[str, ...]]:
    """``(pass -> form, slow passes)`` of the CPU kernels for a block ``(b_out, b_in)``.

    Forward pass and input gradient keep a tile of pixels × channels of one block side in registers, the vectors along
    the channels, or for narrow sides at stride 1 along the pixels; the weight gradient lays them along whichever side
    divides evenly.

    Args:
        block: the block. pixels: of output and input, over all images; zeros at a stride above 1.
        narrow: channels of the widest side that is narrow.

    >>> kernel_forms((16, 16))[0]["forward"]
    'vectors along the 16 output channels of a block'
    """
    sides = {"forward": (block[0], "output", pixels[0]), "input gradient": (block[1], "input", pixels[1])}
    over_pixels = {name: side <= narrow and count >= MANY_PIXELS for name, (side, _, count) in sides.items()}
    forms = {name: _form(side, which, over_pixels[name]) for name, (side, which, _) in sides.items()}
    over = (block[1], "input") if block[1] % 8 == 0 else (block[0], "output")
    forms["weight gradient"] = _form(*over)
    slow = [name for name, (side, _, _) in sides.items() if side % 8 and not over_pixels[name]]
    return forms, (*slow, *["weight gradient"] * (over[0] % 8 > 0))


def _form(side: int, which: str, over_pixels: bool = False) -> str:
    if over_pixels:
        return f"vectors along the pixels, as {side} {which} channel{'s' * (side > 1)} of a block do not fill one"
    if side % 8 == 0:
        return f"vectors along the {side} {which} channels of a block"
    if side < 8:
        return f"narrow form, {side} {which} channel{'s' * (side > 1)} of a block do not fill a vector"
    return f"vectors along the {side} {which} channels of a block, no multiple of 8: the last is partly empty"


def cuda_preference(layer: SparseLayer, problem: Problem, device: torch.device) -> str:
    """Of every pass, whether a kept measurement says that "auto" runs it in CUDA C++."""
    found: dict[str, str] = {}
    for name in PASSES:
        suffix = PASSES[_pass(layer, name)]
        kind = preferred.kind(
            torch.cuda.get_device_name(device),
            ("linear" if problem.linear else "conv2d") + suffix,
            problem.dtype,
            layer.block,
            problem.kernel,
            problem.stride,
            tf32=tf32_allowed(linear=problem.linear),
        )
        found[name] = preferred.is_cuda_preferred(kind, layer.slots / (layer.num_blocks * layer.groups))[1]
    return "; ".join(f"{name}: {reason}" for name, reason in found.items())


def triton_forms(layer: SparseLayer, input: Tensor) -> dict[str, str]:
    """``pass -> configuration`` of the Triton kernels that ``layer(input)`` and its backward pass run."""
    configs, tuning = (importlib.import_module(f"ddst.kernels.{name}") for name in ("configs", "tuning"))
    dtype, device = compute_dtype(input.dtype, "cuda"), tuning.device_name(input.get_device())
    sizes = _sizes(layer, input)
    forms = {}
    for name in PASSES:
        op = PASSES[_pass(layer, name)].removeprefix("_") or "forward"
        shape = (*layer.op_shape, 1, 1)[:4]
        linear = len(layer.op_shape) == 2
        problem = configs.Problem(op, linear, dtype, layer.block, shape, *sizes, layer.slots)
        measured = tuning.table_of(device).fastest(problem) is not None
        why = f"fastest measured on {device}" if measured else f"the default: not measured on {device}"
        forms[name] = f"{tuning.choose(problem, device)}, {why}"
    return forms


def _sizes(layer: SparseLayer, input: Tensor) -> tuple[Any, ...]:
    """Stride, padding, dilation, number of images, input size and output size of what an operator computes.

    That of a transposed layer computes a convolution of its output.
    """
    if not isinstance(layer, SparseConvNd):
        return (1, 1), (0, 0), (1, 1), input.numel() // input.shape[-1], (1, 1), (1, 1)
    x = layer._images(input)
    images = x.shape[0] if x.dim() == 4 else 1
    stride, dilation = layer._plane(layer.stride, 1), layer._plane(layer.dilation, 1)
    kernel = layer.op_shape[2:]
    padding, extra = layer._plane_padding(layer.padding, layer.kernel_size, layer.stride, layer.dilation)
    if isinstance(layer, SparseConvTransposeNd):
        more = layer._plane(layer.output_padding, 0)
        larger = output_size(x.shape[-2:], kernel, stride, padding, more, dilation)
        return stride, padding, dilation, images, tuple(larger), tuple(x.shape[-2:])
    if layer.padding_mode != "zeros":
        extra, padding = (2 * padding[0] + extra[0], 2 * padding[1] + extra[1]), (0, 0)
    size = (x.shape[-2] + extra[0], x.shape[-1] + extra[1])
    out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    return stride, padding, dilation, images, size, tuple(out)


def _pixels(layer: SparseLayer, input: Tensor) -> tuple[int, int]:
    """Pixels of output and input of its convolution at stride 1, over all images; zeros at other strides."""
    stride, _, _, images, size, out = _sizes(layer, input)
    if tuple(stride) != (1, 1):
        return 0, 0
    return images * out[0] * out[1], images * size[0] * size[1]


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
        positions = (x if layer.transposed else y).numel() / layer.op_shape[0]
        flops = products * 2.0 * layer.active_weights * positions
        moved = float(products * sum(t.numel() * t.element_size() for t in (x, y, twin.values)))
        rates[name] = Rate(seconds, flops, moved, flops / seconds / best.flops, moved / seconds / best.bandwidth)
    return rates
