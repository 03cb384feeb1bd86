"""Forward pass and input gradient by CUDA C++ (``csrc/cuda/conv2d_gather.cuh``): the lists the kernel walks, the calls.

A block of threads computes a tile of pixels by a *group* of output channels, one input block after another. What it
needs of an input block stands in one *record*: which granules of 16 output channels have a block at each tap, and the
blocks' slots. The input gradient is the same gather with rows and columns of the block grid exchanged; at stride s the
pixels of its s × s *phases* (position modulo s) use different taps, and each phase has records of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import topology as tp
from ..precision import tf32_allowed
from . import hopper, hopper_lists, kept_lists
from .gather_lines import HEADER, Lines, lines_of
from .gather_problem import DTYPES, Device, Window, dtype_code, library, problem_of

__all__ = ["DTYPES", "Device", "Window", "dtype_code", "problem_of"]
_TILE_PIXELS, _TILE_CHANNELS = {True: 256, False: 128}, {True: 128, False: 64}  # by large_tile, as gather_tile()


class Fused(NamedTuple):
    """What a fused half block adds to a pass (csrc/cuda/gather_fused.cuh).

    Attributes:
        norm: float32 tables: mean ``[C]``, scale and shift ``[C]`` or ``[N, C]``; None without a norm.
        activated: the forward input, in the input gradient of what is normalized or activated.
    """

    norm: tuple[Tensor, Tensor, Tensor] | None
    activated: Tensor | None
    slope: float
    upsample: int
    pool: int
    residual_upsample: int = 1


@lru_cache(maxsize=64)
def facts(device: torch.device) -> Device:
    """The facts of a CUDA device."""
    its = torch.cuda.get_device_properties(device)
    shared = its.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Device(its.multi_processor_count, shared, (its.major, its.minor))


def gather_records(
    index: tp.Index,
    weight_shape: Sequence[int],
    block: tuple[int, int],
    stride: tuple[int, int],
    *,
    input_gradient: bool,
    tile_channels: int,
) -> Tensor:
    """``[phases · groups · input blocks, ints]``: what the kernel walks, of the blocks in ``index``, on its device.

    A record is ``[n, 0, 0, 0 | masks | slots]``. Bit i of a tap's mask says that channels ``16 i … 16 i + 15`` of the
    group have a block there; masks are padded to a multiple of four. ``slots`` are the n blocks' by tap, then channel.

    Returns:
        int32. Built by operations of fixed size, without a host synchronisation. Cost: one sort of ``slots`` keys.
    """
    lines = lines_of(
        weight_shape, block, stride if input_gradient else (1, 1), input_gradient=input_gradient,
        tile_channels=tile_channels,
    )  # fmt: skip
    ints, padded = record_ints(lines)
    count, device = lines.total, index.block_row.device
    nowhere = count * ints  # one number more, which takes what would be said of free slots

    line, tap, place, free = lines.place(index)
    records = torch.zeros(nowhere + 1, dtype=torch.int32, device=device)
    bits = torch.full_like(place, (1 << lines.granules) - 1) << place * lines.granules
    records.scatter_add_(0, torch.where(free, nowhere, line * ints + HEADER + tap), bits.int())
    order = torch.argsort((line * lines.grid[2] + tap) * lines.per_group + place)
    line = line[order]
    begin = torch.searchsorted(line, torch.arange(count + 1, device=device))
    records[:nowhere:ints] = begin.diff().int()
    rank = torch.arange(line.numel(), device=device) - begin[line]
    at = torch.where(line == count, nowhere, line * ints + HEADER + padded + rank)
    records.scatter_(0, at, order.int())
    return records[:nowhere].view(count, ints)


def record_ints(lines: Lines) -> tuple[int, int]:
    """``(ints of a record, those of its masks)``."""
    padded = -(-lines.grid[2] // 4) * 4
    return HEADER + padded + -(-lines.grid[2] * lines.per_group // 4) * 4, padded


class Records(NamedTuple):
    """`gather_records` of any topology, kept (:mod:`.kept_lists`); ``phases``: of the input gradient, else (1, 1)."""

    weight_shape: tuple[int, ...]
    block: tuple[int, int]
    phases: tuple[int, int]
    input_gradient: bool
    tile_channels: int
    kind: str = "gather"  # among all that are kept

    @property
    def lines(self) -> Lines:
        return lines_of(
            self.weight_shape, self.block, self.phases, input_gradient=self.input_gradient,
            tile_channels=self.tile_channels,
        )  # fmt: skip

    def by_operators(self, topology: Tensor) -> Tensor:
        index = tp.split_topology(topology, *tp.grid(self.weight_shape, self.block)[:2])
        return gather_records(
            index, self.weight_shape, self.block, self.phases, input_gradient=self.input_gradient,
            tile_channels=self.tile_channels,
        )  # fmt: skip

    def empty(self, topology: Tensor) -> Tensor:
        lines = self.lines
        return topology.new_empty(lines.total, record_ints(lines)[0])

    def rewrite(self, topology: Tensor, records: Tensor) -> None:
        lines = self.lines
        held = topology.new_empty(lines.places)
        _launch(lines, tp.slot_count(topology, *lines.grid[:2]))(topology, held, records)


@lru_cache(maxsize=1024)
def _launch(lines: Lines, slots: int) -> Any:
    ints, padded = record_ints(lines)
    return kept_lists.kernels().gather_records_launch(
        (*lines.numbers(slots), ints, HEADER + padded), lines.input_gradient, lines.per_group, lines.granules, HEADER
    )


@lru_cache(maxsize=4096)
def refusal(
    dtype: torch.dtype,
    weight_shape: tuple[int, ...],
    block: tuple[int, int],
    window: Window,
    images: int,
    *,
    input_gradient: bool,
    large_tile: bool,
    allow_tf32: bool,
    device: Device,
    fused: bool = False,
    squares: bool = False,
) -> str:
    """Why the kernel cannot run this on the device, from the kernel's own geometry; empty if it can."""
    message = ctypes.create_string_buffer(256)
    problem = problem_of(dtype_code(dtype, allow_tf32), weight_shape, block, window, images)
    library().ddst_cuda_gather_refusal(
        problem, ctypes.c_bool(input_gradient), ctypes.c_bool(large_tile), ctypes.c_bool(fused), ctypes.c_bool(squares),
        device.shared_bytes, message, len(message),
    )  # fmt: skip
    return message.value.decode()


@lru_cache(maxsize=4096)
def _large_tile(
    dtype: torch.dtype,
    weight_shape: tuple[int, ...],
    block: tuple[int, int],
    window: Window,
    images: int,
    pixels: int,
    input_gradient: bool,
    allow_tf32: bool,
    device: Device,
    fused: bool = False,
    squares: bool = False,
) -> bool:
    """Whether to take the large tile: where it fits and occupies three of four multiprocessors; unmeasured."""
    channels = weight_shape[1] if input_gradient else weight_shape[0]
    tiles = pixels // _TILE_PIXELS[True] * -(-channels // _TILE_CHANNELS[True])
    if channels <= _TILE_CHANNELS[False] or 4 * tiles < 3 * device.multiprocessors:
        return False
    return not refusal(
        dtype, weight_shape, block, window, images,
        input_gradient=input_gradient, large_tile=True, allow_tf32=allow_tf32, device=device, fused=fused,
        squares=squares,
    )  # fmt: skip


def _dense(tensor: Tensor) -> Tensor:
    """The tensor in dense memory that begins at a multiple of 16 bytes, copied only where it is not."""
    dense = tensor.contiguous()
    return dense if dense.data_ptr() % 16 == 0 else dense.clone()


def _dense_channels_last(tensor: Tensor) -> Tensor:
    return _dense(tensor.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _gather(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    topology: Tensor,
    weight_shape: Sequence[int],
    window: Window,
    output_size: tuple[int, int],
    channels_last: bool,
    *,
    input_gradient: bool,
    relu: bool,
    linear: bool,
    fused: Fused | None = None,
) -> Tensor:
    """``output_size``: of the result before its squares are summed, where ``fused`` sums them."""
    shape, block, images = tuple(weight_shape), (values.shape[1], values.shape[2]), input.shape[0]
    channels, pixels = shape[1 if input_gradient else 0], images * output_size[0] * output_size[1]
    half = fused or Fused(None, None, 1.0, 1, 1)
    squares = (half.upsample if input_gradient else half.pool) == 2
    if pixels == 0:
        output = input.new_empty(images, *(side // (1 + squares) for side in output_size), channels)
    else:
        device, allow_tf32 = facts(input.device), tf32_allowed(linear=linear)
        form = hopper.form_of(
            input.dtype, shape, block, window, images, values.shape[0], input_gradient=input_gradient, device=device,
            fused=fused is not None, squares=squares, halved=(half.pool if input_gradient else half.upsample) == 2,
        )  # fmt: skip
        if form is not None:
            output = _hopper_gather(
                input, values, bias, residual, topology, shape, window, form, fused,
                input_gradient=input_gradient, relu=relu,
            ).permute(0, 3, 1, 2)  # fmt: skip
            return output if channels_last else output.contiguous()
        large = _large_tile(
            input.dtype, shape, block, window, images, pixels, input_gradient, allow_tf32, device, fused is not None,
            squares,
        )  # fmt: skip
        tile = _TILE_CHANNELS[large]
        phases = window.stride if input_gradient else (1, 1)
        records = kept_lists.kept(topology, Records(shape, block, phases, input_gradient, tile))
        output = torch.ops.ddst_cuda.conv2d_gather(
            _dense_channels_last(input), _dense(values), records.view(-1),
            None if bias is None else _dense(bias), None if residual is None else _dense_channels_last(residual),
            list(shape), list(window.input_size), list(window.stride), list(window.padding),
            input_gradient, relu, large, allow_tf32, fused is not None, *(half.norm or (None, None, None)),
            half.activated, half.slope, half.upsample, half.pool, half.residual_upsample,
        )  # fmt: skip
    output = output.permute(0, 3, 1, 2)
    return output if channels_last else output.contiguous()


def _hopper_gather(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    topology: Tensor,
    shape: tuple[int, ...],
    window: Window,
    form: hopper.Form,
    fused: Fused | None,
    *,
    input_gradient: bool,
    relu: bool,
) -> Tensor:
    """The same by the kernel for sm_90a; ``[N, H, W, C]``."""
    half = fused or Fused(None, None, 1.0, 1, 1)
    block = (values.shape[1], values.shape[2])
    phases = window.stride if input_gradient else (1, 1)
    listing = hopper_lists.RecordsAndOrder(shape, block, phases, input_gradient, form.granules)
    records, order = kept_lists.kept(topology, listing)
    return torch.ops.ddst_cuda.hopper_gather(
        _dense_channels_last(input), _dense(values), records.view(-1), order,
        None if bias is None else _dense(bias), None if residual is None else _dense_channels_last(residual),
        list(shape), list(window.input_size), list(window.stride), list(window.padding), input_gradient, relu,
        *form, fused is not None, *(half.norm or (None, None, None)), half.activated, half.slope,
        half.upsample, half.pool, half.residual_upsample,
    )  # fmt: skip


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
    *,
    relu: bool = False,
    residual: Tensor | None = None,
    linear: bool = False,
) -> Tensor:
    """``y = act(bias[o] + residual + Σ_{active blocks} W[o, c, t] · x[n, c, p · stride - padding + t])``.

    Args:
        input: ``[N, C_in, H, W]`` on a CUDA device; bfloat16, float16 or float32. Other memory than channels_last is
            copied.
        values: packed weight ``[slots, b_out, b_in]`` with sides of 16, 32 or 64; bias: ``[C_out]`` or None.
        topology: int32 vector (:mod:`ddst.topology`).
        stride: 1 or 2; dilation: 1 only; kernels of at most 16 taps.
        channels_last: memory format of the result. residual: of the result's shape, added before the ReLU.
        linear: whether it stands for a linear layer, for which torch has a setting of its own as to TF32.

    Returns:
        ``[N, C_out, H_out, W_out]`` in the input's dtype.

    Raises:
        ValueError: an argument does not fit; `ddst.ops.cuda.compiled.supports` tells beforehand.

    Numerics: sums in float32, in an order that depends on shapes and mask alone: the same call, the same bits. float32
    is multiplied in TF32 where torch allows it (`ddst.ops.precision`), else in full precision as three products of TF32
    ("3xTF32", csrc/cuda/tf32x3.cuh): relative error of a product below 2⁻²⁰, sums rounded; infinities and NaN as in
    float32, but above 3.4·10³⁸ (the largest TF32 number) a number may count as infinite. It takes three times as long
    as TF32 where multiplication is the limit.
    """
    _check_dilation(dilation)
    window = Window((input.shape[2], input.shape[3]), (stride[0], stride[1]), (padding[0], padding[1]))
    out = [(window.input_size[i] + 2 * padding[i] - weight_shape[2 + i]) // stride[i] + 1 for i in (0, 1)]
    return _gather(
        input, values, bias, residual, topology, weight_shape, window, (out[0], out[1]), channels_last,
        input_gradient=False, relu=relu, linear=linear,
    )  # fmt: skip


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
    *,
    linear: bool = False,
) -> Tensor:
    """``∂L/∂x[n, c, q] = Σ_{active blocks, p · stride - padding + t = q} W[o, c, t] · grad_output[n, o, p]``.

    Arguments and numerics as for `conv2d`; ``input_size`` is the input's ``(H, W)``.
    """
    _check_dilation(dilation)
    window = Window((input_size[0], input_size[1]), (stride[0], stride[1]), (padding[0], padding[1]))
    return _gather(
        grad_output, values, None, None, topology, weight_shape, window, window.input_size, channels_last,
        input_gradient=True, relu=False, linear=linear,
    )  # fmt: skip


def linear(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: Sequence[int],
    *,
    relu: bool = False,
) -> Tensor:
    """`conv2d` of a linear layer, a 1 × 1 convolution of ``B`` images of one pixel: ``[B, in]`` to ``[B, out]``."""
    pixels, shape, one = input[:, :, None, None], (*weight_shape, 1, 1), (1, 1)
    return conv2d(pixels, values, bias, topology, shape, one, (0, 0), one, True, relu=relu, linear=True)[:, :, 0, 0]


def linear_input_grad(grad_output: Tensor, values: Tensor, topology: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """`conv2d_input_grad` of a linear layer: ``[B, out]`` to ``[B, in]``."""
    pixels, shape, one = grad_output[:, :, None, None], (*weight_shape, 1, 1), (1, 1)
    return conv2d_input_grad(pixels, values, topology, shape, one, one, (0, 0), one, True, linear=True)[:, :, 0, 0]


def _check_dilation(dilation: Sequence[int]) -> None:
    if tuple(dilation) != (1, 1):
        raise ValueError(f"dilation must be 1 in the CUDA C++ kernels, got {tuple(dilation)}: use backend 'triton'")
