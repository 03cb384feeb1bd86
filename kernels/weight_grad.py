"""Weight gradient of block-sparse convolution and linear maps, at the active blocks only.

    grad[slot] = Σ over output pixels p of  grad_output[p, channels of the block's row]ᵀ · input[p at the block's tap]

The product of two dense matrices, sampled at blocks. What makes it fast, and the same bits at every run:

* A program owns a *group* of blocks that share an operand and together fill the rows of the tensor cores. By row, they
  share an output block row: one tile of ``grad_output`` meets input pixels gathered for several (input block, tap). By
  column, they share input block and tap: one tile of ``input`` meets several output block rows.
* The pixels are split into parts of fixed extent, whose sums are added in order by a second kernel. How many there are
  follows from sizes known on the host (shapes, number of slots, multiprocessors), never from device data. A single
  part is written as it is.

An edge block's part outside the weight is written as zeros, also where the operands hold infinities, and so are free
slots: they form groups of their own, for which a program sums over no pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddst.topology import grid, slot_count

from . import tuning
from .configs import Problem, WeightGradConfig
from .index import most_groups, weight_grad_groups
from .launch import Launch, native, native_rows, product_precision, upcast
from .tile import divide, divisor, dot, hint, inside

#: Pixels that one launch can count: int32, with room for the last part's end.
PIXEL_LIMIT = 2**31 - 2**17
#: A part has at least so many steps of the pixel loop, or filling the pipeline would cost more than it hides.
STEPS_PER_PART = 4

# Numbers that change from layer to layer and batch to batch: none of them makes a new kernel.
_SCALARS = [
    *("slots", "direct", "part", "total", "XH", "XW", "XC", "YH", "YW", "YC"),
    *("magic_h", "bits_h", "magic_w", "bits_w", "P_H", "P_W", "D_H", "D_W", "KW"),
]


@triton.jit
def pixel_sum(
    grad_output, input, out_channel, out_ok, in_channel, in_ok, shift_h, shift_w, first, end, total,
    XH, XW, XC, YH, YW, YC, magic_h, bits_h, magic_w, bits_w,
    S_H: tl.constexpr, S_W: tl.constexpr, PIXELS: tl.constexpr, SHIFTS: tl.constexpr, TRANSPOSED: tl.constexpr,
    MASK_OUT: tl.constexpr, MASK_IN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ grad_output[p, out_channel]ᵀ · input[p shifted, in_channel] over the pixels ``first … end - 1``, in float32.

    TRANSPOSED gives ``[in, out]`` instead of ``[out, in]``: the longer side belongs on the tensor cores' rows. SHIFTS:
    the shift is one per input channel, not one for all. ``end`` may lie beyond ``total``, the number of pixels.
    MASK_OUT, MASK_IN: whether ``out_ok`` and ``in_ok`` have to be asked.
    """
    if TRANSPOSED:
        acc = tl.zeros((in_channel.shape[0], out_channel.shape[0]), dtype=tl.float32)
    else:
        acc = tl.zeros((out_channel.shape[0], in_channel.shape[0]), dtype=tl.float32)
    x_at = input + ((tl.cast(shift_h, tl.int64) * XW + shift_w) * XC + in_channel)[None, :]
    y_at = grad_output + out_channel[None, :]
    for at in tl.range(first, end, PIXELS, num_stages=STAGES):
        pixel = at + tl.arange(0, PIXELS)
        line = divide(pixel, magic_w, bits_w)
        image = divide(line, magic_h, bits_h)
        live = pixel < total
        i = (line - image * YH) * S_H
        j = (pixel - line * YW) * S_W
        x_pixel = (image.to(tl.int64) * XH + i) * XW + j
        i = tl.where(live, i, -(1 << 30))
        if SHIFTS:
            x_ok = inside(i[:, None] + shift_h[None, :], j[:, None] + shift_w[None, :], XH, XW)
        else:
            x_ok = inside(i + shift_h, j + shift_w, XH, XW)[:, None]
        if MASK_IN:
            x_ok = x_ok & in_ok[None, :]
        y_ok = live[:, None]
        if MASK_OUT:
            y_ok = y_ok & out_ok[None, :]
        x = tl.load(x_at + (x_pixel * XC)[:, None], mask=x_ok, other=0.0)
        y = tl.load(y_at + (pixel.to(tl.int64) * YC)[:, None], mask=y_ok, other=0.0)
        if TRANSPOSED:
            acc = dot(tl.trans(x), y, acc, PRECISION, UPCAST)
        else:
            acc = dot(tl.trans(y), x, acc, PRECISION, UPCAST)
    return acc


@triton.jit(do_not_specialize=_SCALARS)
def weight_grad_kernel(
    grad_output, input, grad, partial, bounds, ids, row, col, tap,
    slots, direct, part, total, XH, XW, XC, YH, YW, YC, magic_h, bits_h, magic_w, bits_w, P_H, P_W, D_H, D_W, KW,
    B_OUT: tl.constexpr, B_IN: tl.constexpr, GROUP: tl.constexpr, BY_ROW: tl.constexpr, PIXELS: tl.constexpr,
    S_H: tl.constexpr, S_W: tl.constexpr, X_MULTIPLE: tl.constexpr, Y_MULTIPLE: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (g, s): the blocks of group g, summed over the s-th part of the pixels."""
    SIDE: tl.constexpr = B_IN if BY_ROW else B_OUT
    XC = hint(XC, X_MULTIPLE)
    YC = hint(YC, Y_MULTIPLE)
    start = tl.load(bounds + 2 * tl.program_id(0))
    end = tl.load(bounds + 2 * tl.program_id(0) + 1)
    lane = tl.arange(0, GROUP * SIDE)
    at = start + lane // SIDE
    present = at < end
    lead = tl.load(ids + start)  # an empty group starts at an entry that is there
    own = tl.load(ids + at, mask=present, other=0)
    if BY_ROW:
        shared = tl.load(row + lead) * B_OUT
        busy = (start < end) & (shared < YC)  # free slots lie in the row, and column, after the last
        out_channel = shared + tl.arange(0, B_OUT)
        in_channel = tl.load(col + own) * B_IN + lane % B_IN
    else:
        shared = tl.load(col + lead) * B_IN
        busy = (start < end) & (shared < XC)
        out_channel = tl.load(row + own) * B_OUT + lane % B_OUT
        in_channel = shared + tl.arange(0, B_IN)
    tap_of = tl.load(tap + (own if BY_ROW and GROUP > 1 else lead))
    in_ok = in_channel < XC
    out_ok = out_channel < YC
    split = tl.program_id(1)
    first = split * part
    last = tl.where(busy, tl.minimum(first + part, total), first)
    acc = pixel_sum(
        grad_output, input, out_channel, out_ok if BY_ROW else out_ok & present,
        in_channel, in_ok & present if BY_ROW else in_ok,
        tap_of // KW * D_H - P_H, tap_of % KW * D_W - P_W, first, last, total,
        XH, XW, XC, YH, YW, YC, magic_h, bits_h, magic_w, bits_w,
        S_H, S_W, PIXELS, BY_ROW and GROUP > 1, BY_ROW,
        RAGGED or (GROUP > 1 and not BY_ROW), RAGGED or (GROUP > 1 and BY_ROW), PRECISION, UPCAST, STAGES,
    )  # fmt: skip
    block = own.to(tl.int64) * (B_OUT * B_IN)
    if BY_ROW:
        to = (block + lane % B_IN)[:, None] + (tl.arange(0, B_OUT) * B_IN)[None, :]
        in_weight = in_ok[:, None] & out_ok[None, :]
    else:
        to = (block + lane % B_OUT * B_IN)[:, None] + tl.arange(0, B_IN)[None, :]
        in_weight = out_ok[:, None] & in_ok[None, :]
    if RAGGED:  # an infinity times a masked zero is no zero
        acc = tl.where(in_weight, acc, 0.0)
    if direct:
        tl.store(grad + to, acc.to(grad.dtype.element_ty), mask=present[:, None])
    else:
        tl.store(partial + tl.cast(split, tl.int64) * slots * (B_OUT * B_IN) + to, acc, mask=present[:, None])


@triton.jit(do_not_specialize=["size", "parts"])
def add_parts_kernel(partial, grad, size, parts, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """``grad = partial[0] + partial[1] + …``, AT_ONCE parts at a time, always in the same order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in tl.range(0, parts, AT_ONCE):
        number = first + tl.arange(0, AT_ONCE)
        ok = (number < parts)[:, None] & (at < size)[None, :]
        acc += tl.sum(tl.load(partial + number.to(tl.int64)[:, None] * size + at[None, :], mask=ok, other=0.0), axis=0)
    tl.store(grad + at, acc.to(grad.dtype.element_ty), mask=at < size)


class Part(NamedTuple):
    """Images that one launch serves, and how their pixels are split.

    Attributes:
        first, count: the images.
        splits: number of parts.
        length: pixels per part, a multiple of the step's.
    """

    first: int
    count: int
    splits: int
    length: int


def number_of_parts(programs: int, processors: int, waves: int) -> int:
    """How many parts the pixels are split into, at most ``waves`` programs per multiprocessor where there are fewer.

    All programs take equally long, so the device is done when the multiprocessor with the most of them is. Of the
    larger half of the possible numbers, the largest is taken that wastes hardly more than the best.

    >>> number_of_parts(programs=14, processors=132, waves=4)  # 518 programs: 4 on most multiprocessors, never 5
    37
    """

    def used(parts: int) -> float:
        return programs * parts / (processors * -(-programs * parts // processors))

    most = max(1, waves * processors // programs)
    counts = range(-(-most // 2), most + 1)
    best = max(map(used, counts))
    return max(count for count in counts if used(count) >= 0.95 * best)


def split_pixels(images: int, size: int, programs: int, step: int, processors: int, waves: int) -> list[Part]:
    """How ``images`` of ``size`` pixels are divided among launches and, within one, among programs.

    Args:
        programs: programs that a launch has per part.
        step: pixels per step of the loop.
        processors, waves: of the device, see :func:`number_of_parts`.

    Raises:
        ValueError: an image with more pixels than one launch counts.

    >>> split_pixels(images=64, size=1024, programs=70, step=64, processors=132, waves=4)
    [Part(first=0, count=64, splits=7, length=9408)]
    """
    most = PIXEL_LIMIT // size
    if most == 0:
        raise ValueError(f"grad_output must have less than {PIXEL_LIMIT} pixels per image, got {size}")
    wanted = number_of_parts(programs, processors, waves)
    parts = []
    for first in range(0, images, most):
        count = min(most, images - first)
        splits = max(1, min(wanted, count * size // (STEPS_PER_PART * step)))
        length = -(-count * size // (splits * step)) * step
        parts.append(Part(first, count, -(-count * size // length), length))
    return parts


class Plan(NamedTuple):
    """What a problem's launches are, settled but for the tensors.

    Attributes:
        by, group: how blocks are grouped.
        parts: images and number of parts of each launch.
        launches: one per entry of ``parts``.
        stored: number of sums that are stored to be added; 0 where there is a single one.
        add_parts: adds them.
    """

    by: str
    group: int
    parts: list[Part]
    launches: list[Launch]
    stored: int
    add_parts: Launch | None


@functools.cache
def multiprocessors(device: int) -> int:
    """Of a CUDA device; few for the CPU, where the interpreter runs one program after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 4


@tuning.remember
def plan(problem: Problem, config: WeightGradConfig | None, precision: str, device: int) -> Plan:
    """The launches of a problem with products of a precision on a device, -1 for the CPU; config None: as tuned."""
    if config is None:
        chosen = tuning.choose(problem, tuning.device_name(device))
        assert isinstance(chosen, WeightGradConfig)
        config = chosen
    height, width = problem.output_size
    out_channels, in_channels = problem.weight_shape[:2]
    rows, cols, taps = problem.grid
    runs = rows if config.by == "row" else cols * taps
    groups = most_groups(problem.blocks, runs, config.group)
    parts = split_pixels(problem.images, height * width, groups, config.pixels, multiprocessors(device), config.waves)
    splits = sum(p.splits for p in parts)
    constants = {
        "B_OUT": problem.block[0],
        "B_IN": problem.block[1],
        "GROUP": config.group,
        "BY_ROW": config.by == "row",
        "PIXELS": config.pixels,
        "S_H": problem.stride[0],
        "S_W": problem.stride[1],
        "X_MULTIPLE": math.gcd(in_channels, 16),
        "Y_MULTIPLE": math.gcd(out_channels, 16),
        "RAGGED": out_channels % problem.block[0] != 0 or in_channels % problem.block[1] != 0,
        "PRECISION": precision,
        "UPCAST": upcast(problem.dtype),
        "STAGES": config.stages,
    }
    sizes = (*problem.input_size, in_channels, height, width, out_channels, *divisor(height), *divisor(width))
    launches = [
        Launch(
            weight_grad_kernel,
            (groups, p.splits),
            (problem.blocks, int(splits == 1), p.length, p.count * height * width, *sizes, *problem.padding,
             *problem.dilation, problem.weight_shape[3]),
            constants,
            config.warps,
            config.stages,
        )
        for p in parts
    ]  # fmt: skip
    if splits == 1:
        return Plan(config.by, config.group, parts, launches, 0, None)
    return Plan(config.by, config.group, parts, launches, splits, add_parts(problem, splits))


def add_parts(problem: Problem, splits: int) -> Launch:
    """The launch that adds ``splits`` parts of a problem's gradient."""
    size = problem.blocks * problem.block[0] * problem.block[1]
    return Launch(add_parts_kernel, (-(-size // 256),), (size, splits), {"BLOCK": 256, "AT_ONCE": 8}, 4, 1)


def _weight_grad(
    grad_output: Tensor, input: Tensor, topology: Tensor, problem: Problem, config: WeightGradConfig | None
) -> Tensor:
    """The gradient from operands whose memory is ``[pixels, channels]``."""
    grad = input.new_empty(problem.blocks, *problem.block)
    if problem.blocks == 0:
        return grad
    if grad_output.numel() == 0:
        return grad.zero_()
    launched = plan(problem, config, product_precision(problem.dtype, problem.linear), input.get_device())
    groups = weight_grad_groups(topology, problem.weight_shape, problem.block, launched.by, launched.group)
    partial = torch.empty(launched.stored, *grad.shape, dtype=torch.float32, device=grad.device)
    if len(launched.launches) == 1:
        launched.launches[0](grad_output, input, grad, partial, *groups)
    else:
        done = 0
        for part, launch in zip(launched.parts, launched.launches, strict=True):
            images = slice(part.first, part.first + part.count)
            launch(grad_output[images], input[images], grad, partial[done:], *groups)
            done += part.splits
    if launched.add_parts:
        launched.add_parts(partial, grad)
    return grad


def _slots(topology: Tensor, weight_shape: Sequence[int], block: tuple[int, int]) -> int:
    rows, cols, _ = grid(weight_shape, block)
    return slot_count(topology, rows, cols)


def conv2d_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    topology: Tensor,
    weight_shape: Sequence[int],
    block: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    config: WeightGradConfig | None = None,
) -> Tensor:
    """``grad[slot] = ∂⟨grad_output, conv2d(input, W)⟩ / ∂W[block in the slot]``.

    Args:
        grad_output: ``[N, C_out, H_out, W_out]``; input: ``[N, C_in, H, W]``; float32, float16 or bfloat16.
            channels_last memory is read as it is, anything else copied.
        topology, weight_shape, block: of the packed weight (:mod:`ddst.topology`).
        config: None for the tuned choice.

    Returns:
        ``[slots, b_out, b_in]`` in the dtype of the input; zero outside the weight and in free slots.

    Numerics: products as :func:`.launch.product_precision` says, summed in float32, rounded once; the same bits at
    every run on a device of the same model.
    """
    sides, shape = (block[0], block[1]), (weight_shape[0], weight_shape[1], weight_shape[2], weight_shape[3])
    problem = Problem(
        "weight_grad", False, input.dtype, sides, shape, (stride[0], stride[1]), (padding[0], padding[1]),
        (dilation[0], dilation[1]), input.shape[0], (input.shape[2], input.shape[3]),
        (grad_output.shape[2], grad_output.shape[3]), _slots(topology, weight_shape, sides),
    )  # fmt: skip
    return _weight_grad(native(grad_output), native(input), topology, problem, config)


def linear_weight_grad(
    grad_output: Tensor,
    input: Tensor,
    topology: Tensor,
    weight_shape: Sequence[int],
    block: Sequence[int],
    *,
    config: WeightGradConfig | None = None,
) -> Tensor:
    """``grad[slot] = (grad_outputᵀ · input)[its block]``, of ``[B, out]`` and ``[B, in]``; see the convolution's."""
    sides, one = (block[0], block[1]), (1, 1)
    problem = Problem(
        "weight_grad", True, input.dtype, sides, (weight_shape[0], weight_shape[1], 1, 1), one, (0, 0), one,
        input.shape[0], one, one, _slots(topology, weight_shape, sides),
    )  # fmt: skip
    return _weight_grad(native_rows(grad_output), native_rows(input), topology, problem, config)
