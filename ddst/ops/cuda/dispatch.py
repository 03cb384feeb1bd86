"""The registered operators on CUDA devices: the argument checks, then Triton (:mod:`ddst.kernels`) or CUDA C++.

The twin of ``csrc/cpu/{conv2d,linear}.cpp``, which check and run the operators on the CPU. Triton is imported by the
first call, so that nothing on a CPU needs it. What a check concludes depends on shapes and dtypes alone: it is made
once for each combination, because a call's host time counts (a layer of a GAN computes for a few microseconds).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ... import backends
from ... import topology as tp
from ..precision import tf32_allowed
from . import compiled, preferred

AUTO, TRITON, CUDA = (backends.code(name) for name in ("auto", "triton", "cuda"))
_library = torch.library.Library("ddst", "IMPL")
Shape = tuple[int, ...]
Result = TypeVar("Result")


class Meta(NamedTuple):
    """What is checked of a tensor."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device


def _meta(tensor: Tensor) -> Meta:
    return Meta(tensor.shape, tensor.dtype, tensor.device)


def _index(op: str, topology: Tensor) -> Meta:
    """Of a topology, whose numbers kernels read one after another."""
    if not topology.is_contiguous():
        _fail(op, f"topology has the strides {list(topology.stride())}, expected a contiguous vector")
    return _meta(topology)


def _kernels(
    op: str,
    backend: int,
    first: Tensor,
    weight_shape: Sequence[int],
    block: Sequence[int],
    topology: Tensor,
    window: tuple[Shape, Shape, Shape] = ((1, 1), (0, 0), (1, 1)),
) -> Any:
    """The module whose function ``op`` runs: Triton's, or that of CUDA C++ where it is asked for or preferred."""
    asked = backend == CUDA
    if asked or (backend == AUTO and _is_cuda_preferred(op, first, weight_shape, block, topology, window[0])):
        ok, reason = compiled.supports(op, first.device, first.dtype, weight_shape, block, *window)
        if ok:
            return compiled
        if asked:
            _fail(op, f"backend cuda: {reason}")
    return importlib.import_module("ddst.kernels")


def _is_cuda_preferred(
    op: str, first: Tensor, weight_shape: Sequence[int], block: Sequence[int], topology: Tensor, stride: Shape
) -> bool:
    if not preferred.load():
        return False
    rows, cols, taps = tp.grid(weight_shape, (block[0], block[1]))
    kernel = (weight_shape[2], weight_shape[3]) if len(weight_shape) == 4 else (1, 1)
    name = torch.cuda.get_device_name(first.device)
    kind = preferred.kind(
        name, op, first.dtype, (block[0], block[1]), kernel, (stride[0], stride[1]),
        tf32=tf32_allowed(linear=op.startswith("linear")),
    )  # fmt: skip
    # Of slots, as only the device knows how many of them are active.
    density = tp.slot_count(topology, rows, cols) / (rows * cols * taps)
    return preferred.is_cuda_preferred(kind, density)[0]


def _fail(op: str, text: str) -> None:
    raise ValueError(f"ddst::{op}: {text}")


def _check_alike(op: str, tensors: dict[str, Meta | None]) -> None:
    """That all are of the dtype and on the device of the first."""
    (like, first), *others = [(name, meta) for name, meta in tensors.items() if meta is not None]
    for name, meta in others:
        if meta[1:] != first[1:]:
            _fail(op, f"{name} is {meta.dtype} on {meta.device}, expected {first.dtype} on {first.device} as {like}")


def _check_shape(op: str, name: str, meta: Meta, expected: Sequence[int | None], text: str) -> None:
    """That the shape is the expected one; None stands for any size."""
    if len(meta.shape) != len(expected) or any(e not in (None, s) for s, e in zip(meta.shape, expected, strict=True)):
        _fail(op, f"{name} has the shape {list(meta.shape)}, expected {text}")


def _check_weight(
    op: str, backend: int, weight_shape: Shape, block: Shape, values: Meta | None, topology: Meta | None, like: Meta
) -> None:
    """That block, values and topology can be of this weight.

    The topology's entries are believed: reading them would wait for the device.
    """
    if len(block) != 2 or min(block) < 1:
        _fail(op, f"block is {list(block)}, expected two ints of at least 1")
    if topology is not None:
        rows, cols, _ = tp.grid(weight_shape, (block[0], block[1]))
        slots, rest = divmod(topology.shape[0] - rows - cols - 2, 5) if len(topology.shape) == 1 else (-1, 0)
        if topology.dtype != torch.int32 or topology.device != like.device or slots < 0 or rest:
            _fail(
                op,
                f"topology is {topology.dtype} of the shape {list(topology.shape)} on {topology.device}, expected an "
                f"int32 vector of {rows + cols + 2} + 5 · slots entries on {like.device}",
            )
        if values is not None and values.shape[0] != slots:
            _fail(op, f"values has {values.shape[0]} slots, expected {slots} as in topology")
    if backend not in (AUTO, TRITON, CUDA):
        codes = ", ".join(f"{code} ({backends.name_of(code)})" for code in (AUTO, TRITON, CUDA))
        _fail(op, f"backend is {backend}, expected one of {codes} for CUDA tensors")
    if backend != CUDA:  # whose answer depends on settings of torch: it is asked at every call
        ok, reason = backends.supports("triton", backends.Problem("cuda", like.dtype, (block[0], block[1])))
        if not ok:
            _fail(op, f"backend triton: {reason}")


def _check_conv2d_window(
    op: str, weight_shape: Shape, input_size: Shape, stride: Shape, padding: Shape, dilation: Shape
) -> Shape:
    """The output's height and width."""
    if len(weight_shape) != 4:
        _fail(op, f"weight_shape is {list(weight_shape)}, expected [C_out, C_in, kH, kW]")
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            _fail(op, f"{name} is {list(pair)}, expected two ints of at least {least}")
    if len(input_size) != 2 or min(input_size) < 1:
        _fail(op, f"input_size is {list(input_size)}, expected two ints of at least 1")
    room = [input_size[i] + 2 * padding[i] - dilation[i] * (weight_shape[2 + i] - 1) - 1 for i in (0, 1)]
    if min(room) < 0:
        _fail(
            op,
            f"input of {input_size[0]} x {input_size[1]} pixels with padding {list(padding)} is smaller than the "
            f"kernel of {weight_shape[2]} x {weight_shape[3]} with dilation {list(dilation)}",
        )
    return (room[0] // stride[0] + 1, room[1] // stride[1] + 1)


@lru_cache(maxsize=4096)
def _check_conv2d(
    op: str,
    backend: int,
    weight_shape: Shape,
    block: Shape,
    window: tuple[Shape, Shape, Shape],
    input_size: Shape | None = None,
    *,
    input: Meta | None = None,
    grad_output: Meta | None = None,
    values: Meta | None = None,
    bias: Meta | None = None,
    topology: Meta | None = None,
) -> None:
    if values is not None and len(values.shape) != 3:
        _fail(op, f"values has the shape {list(values.shape)}, expected [slots, b_out, b_in]")
    _check_alike(op, {"input": input, "grad_output": grad_output, "values": values, "bias": bias})
    if input is not None:
        _check_shape(op, "input", input, (None, weight_shape[1], None, None), f"[N, {weight_shape[1]}, H, W]")
        input_size = input.shape[2:]
    assert input_size is not None
    out = _check_conv2d_window(op, weight_shape, input_size, *window)
    if grad_output is not None:
        batch = None if input is None else input.shape[0]
        text = f"[{'N' if batch is None else batch}, {weight_shape[0]}, {out[0]}, {out[1]}]"
        _check_shape(op, "grad_output", grad_output, (batch, weight_shape[0], *out), text)
    if bias is not None:
        _check_shape(op, "bias", bias, (weight_shape[0],), f"[{weight_shape[0]}]")
    like = input or grad_output
    assert like is not None
    _check_weight(op, backend, weight_shape, block, values, topology, like)


@lru_cache(maxsize=4096)
def _check_linear(
    op: str,
    backend: int,
    weight_shape: Shape,
    block: Shape,
    *,
    input: Meta | None = None,
    grad_output: Meta | None = None,
    values: Meta | None = None,
    bias: Meta | None = None,
    topology: Meta | None = None,
) -> None:
    if len(weight_shape) != 2:
        _fail(op, f"weight_shape is {list(weight_shape)}, expected [C_out, C_in]")
    if values is not None and len(values.shape) != 3:
        _fail(op, f"values has the shape {list(values.shape)}, expected [slots, b_out, b_in]")
    _check_alike(op, {"input": input, "grad_output": grad_output, "values": values, "bias": bias})
    if input is not None:
        _check_shape(op, "input", input, (None, weight_shape[1]), f"[B, {weight_shape[1]}]")
    if grad_output is not None:
        batch = None if input is None else input.shape[0]
        text = f"[{'B' if batch is None else batch}, {weight_shape[0]}]"
        _check_shape(op, "grad_output", grad_output, (batch, weight_shape[0]), text)
    if bias is not None:
        _check_shape(op, "bias", bias, (weight_shape[0],), f"[{weight_shape[0]}]")
    like = input or grad_output
    assert like is not None
    _check_weight(op, backend, weight_shape, block, values, topology, like)


@lru_cache(maxsize=1024)  # asked at every call of an operator
def supports_triton(problem: backends.Problem) -> tuple[bool, str]:
    """``(ok, reason)``: whether the Triton kernels run a problem."""
    if problem.device != "cuda":
        return False, f"runs on CUDA tensors only, got a tensor on {problem.device!r}"
    if importlib.util.find_spec("triton") is None:
        return False, "needs the package triton, which is not installed: pip install 'ddst[gpu]'"
    kernels = importlib.import_module("ddst.kernels")  # imports triton
    return kernels.supports(problem.dtype, problem.block)


backends.register("triton", supports_triton)


def _serves(op: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Registers a function for CUDA tensors; the device of its first argument is the current one while it runs."""

    def register(kernel: Callable[..., Result]) -> Callable[..., Result]:
        @wraps(kernel)
        def on_its_device(first: Tensor, *arguments: Any, **named: Any) -> Result:
            if first.device.index == torch.cuda.current_device():
                return kernel(first, *arguments, **named)
            with torch.cuda.device(first.device):
                return kernel(first, *arguments, **named)

        _library.impl(op, on_its_device, "CUDA")
        return kernel

    return register


@_serves("conv2d")
def conv2d(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    backend: int = AUTO,
    record: int = 0,
) -> Tensor:
    """``ddst::conv2d`` on a CUDA device."""
    window = (tuple(stride), tuple(padding), tuple(dilation))
    _check_conv2d(
        "conv2d", backend, tuple(weight_shape), tuple(values.shape[1:]), window,
        input=_meta(input), values=_meta(values), bias=None if bias is None else _meta(bias),
        topology=_index("conv2d", topology),
    )  # fmt: skip
    kernels = _kernels("conv2d", backend, input, weight_shape, values.shape[1:], topology, window)
    return kernels.conv2d(input, values, bias, topology, weight_shape, *window, channels_last)


@_serves("conv2d_input_grad")
def conv2d_input_grad(
    grad_output: Tensor,
    values: Tensor,
    topology: Tensor,
    weight_shape: Sequence[int],
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    backend: int = AUTO,
    record: int = 0,
) -> Tensor:
    """``ddst::conv2d_input_grad`` on a CUDA device."""
    window = (tuple(stride), tuple(padding), tuple(dilation))
    _check_conv2d(
        "conv2d_input_grad", backend, tuple(weight_shape), tuple(values.shape[1:]), window, tuple(input_size),
        grad_output=_meta(grad_output), values=_meta(values), topology=_index("conv2d_input_grad", topology),
    )  # fmt: skip
    kernels = _kernels("conv2d_input_grad", backend, grad_output, weight_shape, values.shape[1:], topology, window)
    return kernels.conv2d_input_grad(grad_output, values, topology, weight_shape, input_size, *window, channels_last)


@_serves("conv2d_weight_grad")
def conv2d_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    topology: Tensor,
    weight_shape: Sequence[int],
    block: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: int = AUTO,
) -> Tensor:
    """``ddst::conv2d_weight_grad`` on a CUDA device."""
    window = (tuple(stride), tuple(padding), tuple(dilation))
    _check_conv2d(
        "conv2d_weight_grad", backend, tuple(weight_shape), tuple(block), window,
        input=_meta(input), grad_output=_meta(grad_output), topology=_index("conv2d_weight_grad", topology),
    )  # fmt: skip
    kernels = _kernels("conv2d_weight_grad", backend, input, weight_shape, block, topology, window)
    return kernels.conv2d_weight_grad(grad_output, input, topology, weight_shape, block, *window)


@_serves("conv2d_block_scores")
def conv2d_block_scores(
    grad_output: Tensor,
    input: Tensor,
    weight_shape: Sequence[int],
    block: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``ddst::conv2d_block_scores`` on a CUDA device."""
    window = (tuple(stride), tuple(padding), tuple(dilation))
    _check_conv2d(
        "conv2d_block_scores", AUTO, tuple(weight_shape), tuple(block), window,
        input=_meta(input), grad_output=_meta(grad_output),
    )  # fmt: skip
    kernels = importlib.import_module("ddst.kernels")
    return kernels.conv2d_block_scores(grad_output, input, weight_shape, block, *window)


@_serves("linear")
def linear(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: Sequence[int],
    backend: int = AUTO,
    record: int = 0,
) -> Tensor:
    """``ddst::linear`` on a CUDA device."""
    _check_linear(
        "linear", backend, tuple(weight_shape), tuple(values.shape[1:]),
        input=_meta(input), values=_meta(values), bias=None if bias is None else _meta(bias),
        topology=_index("linear", topology),
    )  # fmt: skip
    kernels = _kernels("linear", backend, input, weight_shape, values.shape[1:], topology)
    return kernels.linear(input, values, bias, topology, weight_shape)


@_serves("linear_input_grad")
def linear_input_grad(
    grad_output: Tensor,
    values: Tensor,
    topology: Tensor,
    weight_shape: Sequence[int],
    backend: int = AUTO,
    record: int = 0,
) -> Tensor:
    """``ddst::linear_input_grad`` on a CUDA device."""
    _check_linear(
        "linear_input_grad", backend, tuple(weight_shape), tuple(values.shape[1:]),
        grad_output=_meta(grad_output), values=_meta(values), topology=_index("linear_input_grad", topology),
    )  # fmt: skip
    kernels = _kernels("linear_input_grad", backend, grad_output, weight_shape, values.shape[1:], topology)
    return kernels.linear_input_grad(grad_output, values, topology, weight_shape)


@_serves("linear_weight_grad")
def linear_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    topology: Tensor,
    weight_shape: Sequence[int],
    block: Sequence[int],
    backend: int = AUTO,
) -> Tensor:
    """``ddst::linear_weight_grad`` on a CUDA device."""
    _check_linear(
        "linear_weight_grad", backend, tuple(weight_shape), tuple(block),
        input=_meta(input), grad_output=_meta(grad_output), topology=_index("linear_weight_grad", topology),
    )  # fmt: skip
    kernels = _kernels("linear_weight_grad", backend, input, weight_shape, block, topology)
    return kernels.linear_weight_grad(grad_output, input, topology, weight_shape, block)


@_serves("linear_block_scores")
def linear_block_scores(
    grad_output: Tensor, input: Tensor, weight_shape: Sequence[int], block: Sequence[int]
) -> Tensor:
    """``ddst::linear_block_scores`` on a CUDA device."""
    _check_linear(
        "linear_block_scores", AUTO, tuple(weight_shape), tuple(block),
        input=_meta(input), grad_output=_meta(grad_output),
    )  # fmt: skip
    kernels = importlib.import_module("ddst.kernels")
    return kernels.linear_block_scores(grad_output, input, weight_shape, block)
