"""Weight gradient of the fused half block: :mod:`.weight_grad`, which says all else, with the input normalized,
activated and upsampled on its way, and the pooled gradient read at half the coordinates.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .configs import Problem, WeightGradConfig
from .gather_norm import Fusion
from .index import most_groups, weight_grad_groups
from .launch import Launch, product_precision, upcast
from .prologue import Tables, activated, factors, kind_for_tiles, means, row_of_sample
from .tile import divide, divisor, dot, hint, inside
from .weight_grad import Plan, add_parts, multiprocessors, split_pixels

# Numbers that change from layer to layer and batch to batch: none of them makes a new kernel.
_SCALARS = [
    *("slots", "direct", "part", "total", "image0", "XH", "XW", "XC", "YH", "YW", "YC"),
    *("magic_h", "bits_h", "magic_w", "bits_w", "P_H", "P_W", "D_H", "D_W", "KW"),
]


@triton.jit
def pixel_sum(
    grad_output, input, mean, scale, offset, out_channel, out_ok, in_channel, in_ok, shift_h, shift_w, first, end,
    total, image0, XH, XW, XC, YH, YW, YC, magic_h, bits_h, magic_w, bits_w,
    S_H: tl.constexpr, S_W: tl.constexpr, UP: tl.constexpr, POOL: tl.constexpr, NORM: tl.constexpr, SLOPE: tl.constexpr,
    PIXELS: tl.constexpr, TRANSPOSED: tl.constexpr, MASK_OUT: tl.constexpr, MASK_IN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ grad_output[p / POOL, out_channel]ᵀ · act(norm(input))[p shifted / UP, in_channel] over ``first … end - 1``.

    p counts the pixels of POOL · YH × POOL · YW. TRANSPOSED gives ``[in, out]``. ``shift`` is one for each input
    channel, ``[1, channels]``, or one for all. ``image0``: which sample the first image is.
    """
    if TRANSPOSED:
        acc = tl.zeros((in_channel.shape[0], out_channel.shape[0]), dtype=tl.float32)
    else:
        acc = tl.zeros((out_channel.shape[0], in_channel.shape[0]), dtype=tl.float32)
    m = means(in_channel, in_ok, mean, NORM)
    if NORM < 2:
        s, t = factors(in_channel, in_channel, in_ok, in_ok, XC, scale, offset, NORM)
    for at in tl.range(first, end, PIXELS, num_stages=STAGES):
        pixel = at + tl.arange(0, PIXELS)
        line = divide(pixel, magic_w, bits_w)
        image = divide(line, magic_h, bits_h)
        live = pixel < total
        i = line - image * (YH * POOL)
        j = pixel - line * (YW * POOL)
        y_pixel = (image.to(tl.int64) * YH + i // POOL) * YW + j // POOL
        i = tl.where(live, i * S_H, -(1 << 30))
        i = i[:, None] + shift_h
        j = (j * S_W)[:, None] + shift_w
        x_ok = inside(i, j, XH * UP, XW * UP)
        if MASK_IN:
            x_ok = x_ok & in_ok[None, :]
        if UP == 2:
            i = i >> 1
            j = j >> 1
        base = (image.to(tl.int64) * (XH * XW) * XC)[:, None]
        x = tl.load(input + base + ((i * XW + j) * XC + in_channel[None, :]), mask=x_ok, other=0.0)
        if NORM > 0 or SLOPE != 1.0:
            if NORM >= 2:  # else they are the same at every step
                sample = image0 + divide(divide(tl.cast(at, tl.int32), magic_w, bits_w), magic_h, bits_h)
                scales = row_of_sample(scale, sample, XC, NORM)
                offsets = row_of_sample(offset, sample, XC, NORM)
                s, t = factors(image0 + image, in_channel, in_ok, live, XC, scales, offsets, NORM)
            x = activated(x, x_ok, m, s, t, NORM, SLOPE)
        y_ok = live[:, None]
        if MASK_OUT:
            y_ok = y_ok & out_ok[None, :]
        y = tl.load(grad_output + out_channel[None, :] + (y_pixel * YC)[:, None], mask=y_ok, other=0.0)
        if TRANSPOSED:
            acc = dot(tl.trans(x), y, acc, PRECISION, UPCAST)
        else:
            acc = dot(tl.trans(y), x, acc, PRECISION, UPCAST)
    if POOL == 2:
        acc = acc * 0.25
    return acc


@triton.jit(do_not_specialize=_SCALARS)
def weight_grad_norm_kernel(
    grad_output, input, mean, scale, offset, grad, partial, bounds, ids, row, col, tap,
    slots, direct, part, total, image0, XH, XW, XC, YH, YW, YC, magic_h, bits_h, magic_w, bits_w,
    P_H, P_W, D_H, D_W, KW,
    B_OUT: tl.constexpr, B_IN: tl.constexpr, GROUP: tl.constexpr, BY_ROW: tl.constexpr, PIXELS: tl.constexpr,
    S_H: tl.constexpr, S_W: tl.constexpr, X_MULTIPLE: tl.constexpr, Y_MULTIPLE: tl.constexpr, UP: tl.constexpr,
    POOL: tl.constexpr, NORM: tl.constexpr, SLOPE: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, STAGES: tl.constexpr,
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
        tap_of = tl.load(tap + own)[None, :]
    else:
        shared = tl.load(col + lead) * B_IN
        busy = (start < end) & (shared < XC)
        out_channel = tl.load(row + own) * B_OUT + lane % B_OUT
        in_channel = shared + tl.arange(0, B_IN)
        tap_of = tl.load(tap + lead)
    in_ok = in_channel < XC
    out_ok = out_channel < YC
    split = tl.program_id(1)
    first = split * part
    last = tl.where(busy, tl.minimum(first + part, total), first)
    acc = pixel_sum(
        grad_output, input, mean, scale, offset, out_channel, out_ok if BY_ROW else out_ok & present,
        in_channel, in_ok & present if BY_ROW else in_ok, tap_of // KW * D_H - P_H, tap_of % KW * D_W - P_W,
        first, last, total, image0, XH, XW, XC, YH, YW, YC, magic_h, bits_h, magic_w, bits_w, S_H, S_W, UP,
        POOL, NORM, SLOPE, PIXELS, BY_ROW, RAGGED or (GROUP > 1 and not BY_ROW), RAGGED or (GROUP > 1 and BY_ROW),
        PRECISION, UPCAST, STAGES,
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


def config_of(problem: Problem, device: str) -> WeightGradConfig:
    """What runs a problem: as tuned; blocks of 64 × 64 by row, as by column they spill registers."""
    chosen = tuning.choose(problem, device)
    assert isinstance(chosen, WeightGradConfig)
    return replace(chosen, by="row", group=1) if min(problem.block) == 64 else chosen


@tuning.remember
def plan(problem: Problem, fusion: Fusion, config: WeightGradConfig | None, precision: str, device: int) -> Plan:
    """As :func:`.weight_grad.plan`. The problem is that of the convolution itself, before pooling."""
    config = config or config_of(problem, tuning.device_name(device))
    up, pool = fusion.upsample, fusion.pool
    out_channels, in_channels = problem.weight_shape[:2]
    input_size = [side // up for side in problem.input_size]
    pooled = [side // pool for side in problem.output_size]
    height, width = (side * pool for side in pooled)
    if max(math.prod(input_size) * in_channels, problem.images * in_channels) >= 2**31:
        raise ValueError(
            f"the Triton kernels need images of less than 2**31 elements, got {(in_channels, *input_size)}"
        )
    rows, cols, taps = problem.grid
    runs = rows if config.by == "row" else cols * taps
    groups = most_groups(problem.blocks, runs, config.group)
    parts = split_pixels(problem.images, height * width, groups, config.pixels, multiprocessors(device), config.waves)
    splits = sum(p.splits for p in parts)
    constants = {
        "B_OUT": problem.block[0], "B_IN": problem.block[1], "GROUP": config.group, "BY_ROW": config.by == "row",
        "PIXELS": config.pixels, "S_H": problem.stride[0], "S_W": problem.stride[1],
        "X_MULTIPLE": math.gcd(in_channels, 16), "Y_MULTIPLE": math.gcd(out_channels, 16), "UP": up, "POOL": pool,
        "NORM": kind_for_tiles(fusion.norm, height * width, config.pixels), "SLOPE": fusion.slope,
        "RAGGED": out_channels % problem.block[0] != 0 or in_channels % problem.block[1] != 0,
        "PRECISION": precision, "UPCAST": upcast(problem.dtype), "STAGES": config.stages,
    }  # fmt: skip
    sizes = (*input_size, in_channels, *pooled, out_channels, *divisor(height), *divisor(width))
    window = (*problem.padding, *problem.dilation, problem.weight_shape[3])
    launches = [
        Launch(
            weight_grad_norm_kernel, (groups, p.splits),
            (problem.blocks, int(splits == 1), p.length, p.count * height * width, p.first, *sizes, *window),
            constants, config.warps, config.stages,
        )
        for p in parts
    ]  # fmt: skip
    adding = None if splits == 1 else add_parts(problem, splits)
    return Plan(config.by, config.group, parts, launches, 0 if splits == 1 else splits, adding)


def weight_grad(
    problem: Problem,
    fusion: Fusion,
    grad_output: Tensor,
    input: Tensor,
    norm: Tables,
    topology: Tensor,
    config: WeightGradConfig | None = None,
) -> Tensor:
    """``[slots, b_out, b_in]``; operands in native memory."""
    grad = input.new_empty(problem.blocks, *problem.block)
    if problem.blocks == 0:
        return grad
    if grad_output.numel() == 0:
        return grad.zero_()
    launched = plan(problem, fusion, config, product_precision(problem.dtype, False), input.get_device())
    groups = weight_grad_groups(topology, problem.weight_shape, problem.block, launched.by, launched.group)
    partial = torch.empty(launched.stored, *grad.shape, dtype=torch.float32, device=grad.device)
    done = 0
    for part, launch in zip(launched.parts, launched.launches, strict=True):
        images = slice(part.first, part.first + part.count)
        launch(grad_output[images], input[images], *norm[1:], grad, partial[done:], *groups)
        done += part.splits
    if launched.add_parts:
        launched.add_parts(partial, grad)
    return grad
