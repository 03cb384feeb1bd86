"""Forward pass and input gradient of the fused half block: the kernels of :mod:`.gather` with more on both ends.

Forward: the pixels that a step loads are normalized, activated and, at half the coordinates, upsampled on the way to
the product; sums of four pixels are pooled before they are written, with bias, residual and the tile's moments.

Input gradient: what is loaded is the pooled gradient at half the coordinates; sums of four pixels, which are one pixel
before upsampling, meet the activation's derivative there, and the sums that the norm's own gradient needs are taken.

Neither the activated, nor the upsampled, nor the unpooled map ever lies in memory.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import gather, tuning
from .configs import GatherConfig, Problem
from .gather import ids_at, phase_of, places, weights
from .index import RowLists, tap_bits
from .launch import Launch, product_precision, upcast
from .moments import partial_moments, store_moments
from .prologue import (
    Tables,
    activated,
    factors,
    kind_for_tiles,
    leaky,
    means,
    row_of_sample,
    square_sums,
    squares,
)
from .tile import channel_block, dot, hint, inside, shift, tap

# Numbers that change from layer to layer and batch to batch: none of them makes a new kernel.
_SCALARS = ["programs", "across", "images", "XH", "XW", "XC", "YH", "YW", "YC", "P_H", "P_W", "D_H", "D_W"]


@triton.jit
def entries_sum(
    x, values, mean, scale, offset, entries, ids, start, end, n, i0, j0, live,
    XH, XW, XC, first_h, first_w, D_H, D_W,
    BN: tl.constexpr, BK: tl.constexpr, FUSE: tl.constexpr, DGRAD: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr,
    BITS: tl.constexpr, UP: tl.constexpr, NORM: tl.constexpr, SLOPE: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sum over entries, FUSE blocks per step, for the pixels (i0, j0) of images n, where they are live.

    UP = 2: the source is half of the image that taps and bounds belong to. NORM, SLOPE: what becomes of it on the way.
    """
    lane = tl.arange(0, FUSE * BK)
    place = lane // BK
    k = lane % BK
    i0 = tl.where(live, i0, -(1 << 30))  # outside under every tap
    xp = x + (n.to(tl.int64) * (XH * XW) * XC)[:, None]
    acc = tl.zeros((i0.shape[0], BN), dtype=tl.float32)
    if FUSE == 1:
        wp = places(values, BN, BK, 1, DGRAD)
        entry_ahead = tl.load(entries + start)
        id_ahead = ids_at(ids + start, 1)
    else:
        o = tl.arange(0, BN)
        wp = values + (k[:, None] * BN + o[None, :] if DGRAD else o[:, None] * BK + k[None, :])
        entry_ahead = tl.load(entries + start + place, mask=start + place < end, other=0)
        id_ahead = tl.load(ids + start + place, mask=start + place < end, other=0)
    for p in tl.range(start, end, FUSE, num_stages=STAGES):
        entry = entry_ahead
        block = id_ahead
        if FUSE == 1:
            entry_ahead = tl.load(entries + p + 1)
            id_ahead = ids_at(ids + p + 1, 1)
        else:
            q = p + place
            present = q < end
            entry_ahead = tl.load(entries + q + FUSE, mask=q + FUSE < end, other=0)
            id_ahead = tl.load(ids + q + FUSE, mask=q + FUSE < end, other=0)
        kh, kw = tap(entry, BITS)
        dh, dw = shift(kh, kw, first_h, first_w, DGRAD, S_H, S_W, D_H, D_W)
        channel = channel_block(entry, BITS) * BK + k
        if FUSE == 1:
            have = channel < XC
            i = i0[:, None] + dh
            j = j0[:, None] + dw
        else:
            have = present & (channel < XC)
            i = i0[:, None] + dh[None, :]
            j = j0[:, None] + dw[None, :]
        ok = inside(i, j, XH * UP, XW * UP)
        if RAGGED or FUSE > 1:
            ok = ok & have[None, :]
        if UP == 2:
            i = i >> 1
            j = j >> 1
        xt = tl.load(xp + ((i * XW + j) * XC + channel[None, :]), mask=ok, other=0.0)
        if NORM > 0 or SLOPE != 1.0:
            s, t = factors(n, channel, have, live, XC, scale, offset, NORM)
            xt = activated(xt, ok, means(channel, have, mean, NORM), s, t, NORM, SLOPE)
        if FUSE == 1:
            wt = weights(wp, block, BN, BK, 1, DGRAD)
        else:
            at = block.to(tl.int64) * (BN * BK)
            if DGRAD:
                wt = tl.load(wp + at[:, None], mask=present[:, None], other=0.0)
            else:
                wt = tl.trans(tl.load(wp + at[None, :], mask=present[None, :], other=0.0))
        acc = dot(xt, wt, acc, PRECISION, UPCAST)
    return acc


@triton.jit(do_not_specialize=_SCALARS)
def forward_kernel(
    x, values, y, bias, residual, mean, scale, offset, partial, ptr, entries, ids, order,
    programs, across, images, XH, XW, XC, YH, YW, YC, P_H, P_W, D_H, D_W,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FUSE: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr,
    BITS: tl.constexpr, X_MULTIPLE: tl.constexpr, Y_MULTIPLE: tl.constexpr, RAGGED: tl.constexpr, NORM: tl.constexpr,
    SLOPE: tl.constexpr, UP: tl.constexpr, POOL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    MOMENTS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A row, BM consecutive pixels before pooling. x is ``[images, XH, XW, XC]``, y the pooled [images, YH, YW, YC].

    RESIDUAL: 0 none, 1 of y's size, 2 of half its sides. MOMENTS: ``partial`` gets those of y's pixels, by tile.
    """
    XC = hint(XC, X_MULTIPLE)
    YC = hint(YC, Y_MULTIPLE)
    row = tl.load(order + tl.program_id(0) % programs)
    tile = tl.program_id(0) // programs
    total = images * YH * YW
    n, i, j, live = squares(tile * BM, BM, YH, YW, total, POOL)
    first_image = tile * BM // (YH * YW * (POOL * POOL))
    scale = row_of_sample(scale, first_image, XC, NORM)
    offset = row_of_sample(offset, first_image, XC, NORM)
    acc = entries_sum(
        x, values, mean, scale, offset, entries, ids, tl.load(ptr + row), tl.load(ptr + row + 1), n, i * S_H, j * S_W,
        live, XH, XW, XC, -P_H, -P_W, D_H, D_W, BN, BK, FUSE, False, S_H, S_W, BITS, UP, NORM, SLOPE, RAGGED, PRECISION,
        UPCAST, STAGES)  # fmt: skip
    acc = square_sums(acc, POOL)
    if POOL == 2:
        acc = acc * 0.25
    n, i, j, live = squares(tile * (BM // (POOL * POOL)), BM // (POOL * POOL), YH, YW, total, 1)
    c = row * BN + tl.arange(0, BN)
    mask = live[:, None] & (c < YC)[None, :]
    if BIAS:
        acc += tl.load(bias + c, mask=c < YC, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL > 0:
        at = ((n.to(tl.int64) * (YH // RESIDUAL) + i // RESIDUAL) * (YW // RESIDUAL) + j // RESIDUAL) * YC
        acc += tl.load(residual + at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    result = acc.to(y.dtype.element_ty)
    at = ((n.to(tl.int64) * YH + i) * YW + j) * YC
    tl.store(y + at[:, None] + c[None, :], result, mask=mask)
    if MOMENTS:
        store_moments(result.to(tl.float32), live, partial, tile, c, YC)


@triton.jit(do_not_specialize=_SCALARS)
def input_grad_kernel(
    x, values, y, input, mean, scale, offset, partial, ptr, entries, ids, order,
    programs, across, images, XH, XW, XC, YH, YW, YC, P_H, P_W, D_H, D_W,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FUSE: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr,
    BITS: tl.constexpr, X_MULTIPLE: tl.constexpr, Y_MULTIPLE: tl.constexpr, RAGGED: tl.constexpr, NORM: tl.constexpr,
    SLOPE: tl.constexpr, UP: tl.constexpr, POOL: tl.constexpr, SUMS: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A row, BM consecutive pixels of its phase before they are summed by UP². y is like input, [images, YH, YW, YC].

    x: the gradient, ``[images, XH, XW, XC]``, pooled where POOL is 2. SUMS: ``partial`` gets Σ grad_z and
    Σ grad_z · (input − mean), by tile and phase. SCALED: y is scale · grad_z instead of grad_z.
    """
    XC = hint(XC, X_MULTIPLE)
    YC = hint(YC, Y_MULTIPLE)
    row = tl.load(order + tl.program_id(0) % programs)
    tile = tl.program_id(0) // programs
    start = tl.load(ptr + row)
    end = tl.load(ptr + row + 1)
    ph, pw, height, width, first_h, first_w = phase_of(row // across, P_H, P_W, YH, YW, True, S_H, S_W)
    total = images * height * width
    height = tl.maximum(height, 1)
    width = tl.maximum(width, 1)
    end = tl.where(tile * (BM // (UP * UP)) < total, end, start)  # tiles are counted for the largest phase
    n, i, j, live = squares(tile * BM, BM, height, width, total, UP)
    acc = entries_sum(
        x, values, mean, scale, offset, entries, ids, start, end, n, i, j, live, XH, XW, XC,
        first_h, first_w, D_H, D_W, BN, BK, FUSE, True, S_H, S_W, BITS, POOL, 0, 1.0, RAGGED, PRECISION, UPCAST,
        STAGES)  # fmt: skip
    grad = square_sums(acc, UP)
    if POOL == 2:
        grad = grad * 0.25
    n, i, j, live = squares(tile * (BM // (UP * UP)), BM // (UP * UP), height, width, total, 1)
    c = row % across * BN + tl.arange(0, BN)
    have = c < YC
    mask = live[:, None] & have[None, :]
    at = ((n.to(tl.int64) * YH + i * S_H + ph) * YW + j * S_W + pw) * YC
    if NORM > 0 or SLOPE != 1.0:
        away = tl.load(input + at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        away = away - means(c, have, mean, NORM)
        first_image = tile * BM // (height * width * (UP * UP))
        scale = row_of_sample(scale, first_image, YC, NORM)
        offset = row_of_sample(offset, first_image, YC, NORM)
        s, t = factors(n, c, have, live, YC, scale, offset, NORM)
        grad = leaky(away * s + t, grad, SLOPE)
        if SUMS:
            part = partial + (tl.cast(tile, tl.int64) * (S_H * S_W) + row // across) * 2 * YC + c
            grad = tl.where(mask, grad, 0.0)
            tl.store(part, tl.sum(grad, axis=0), mask=have)
            tl.store(part + YC, tl.sum(grad * away, axis=0), mask=have)
        if SCALED:
            grad = grad * s
    tl.store(y + at[:, None] + c[None, :], grad.to(y.dtype.element_ty), mask=mask)


class Fusion(NamedTuple):
    """What is fused: a norm's kind (:class:`.prologue.Tables`), the activation's slope, and the sizes' factors.

    residual, moments: of the forward pass; sums, scaled: of the input gradient.
    """

    norm: int
    slope: float
    upsample: int
    pool: int
    bias: bool = False
    residual: int = 0
    moments: bool = False
    sums: bool = False
    scaled: bool = False


def config_of(problem: Problem, fusion: Fusion, device: str) -> GatherConfig:
    """What runs a problem: the tuned choice, or the first of the others, that has one row per program, no box, and 64
    pixels where a row has more than 16 channels: pixels on their way through registers need room.

    How many steps are in flight decides whether the compiler spills the rest (``python -m ddst.kernels.compile``).
    """
    forward, wide = problem.op == "forward", problem.dtype.itemsize == 4
    side = problem.block[0 if forward else 1]
    listed = (tuning.choose(problem, device), *tuning.candidates_for(problem))
    found = next(
        c
        for c in listed
        if isinstance(c, GatherConfig)
        and c.box is None
        and c.rows == 1
        and (c.pixels == 64 or side == 16 or (side == 32 and not forward))
    )
    if forward and not wide and side == 16:
        return replace(found, stages=4)
    if forward and wide and min(problem.block) == 64:
        return replace(found, stages=4 if fusion.upsample == 1 else 1)
    return found


@tuning.remember
def plan(problem: Problem, fusion: Fusion, config: GatherConfig | None, precision: str, device: int = -1) -> Launch:
    """A launch. The problem is that of the convolution itself, over the upsampled input, before pooling."""
    config = config or config_of(problem, fusion, tuning.device_name(device))
    dgrad = problem.op == "input_grad"
    c_out, c_in, *kernel = problem.weight_shape
    # Of the input and the output in memory, and by what the sides of the convolution's own are larger.
    stored = [(problem.images, c_in, *(side // fusion.upsample for side in problem.input_size)),
              (problem.images, c_out, *(side // fusion.pool for side in problem.output_size))]  # fmt: skip
    whole = [(problem.images, c_in, *problem.input_size), (problem.images, c_out, *problem.output_size)]
    bn, bk = problem.block
    square = fusion.pool
    if dgrad:
        stored, bn, bk, square = stored[::-1], bk, bn, fusion.upsample
    source, result = stored
    reach = [p + d * (k - 1) for p, d, k in zip(problem.padding, problem.dilation, kernel, strict=True)]
    gather._check_size(whole[0], whole[1], kernel, max(reach), bk)
    images, channels, height, width = result
    stride = problem.stride if dgrad else (1, 1)
    if dgrad:
        height, width = -(-height // stride[0]), -(-width // stride[1])
    # Pixels of a phase are not those of an image.
    pixels = height * width * square**2 if math.prod(stride) == 1 else 1
    norm = kind_for_tiles(fusion.norm, pixels, config.pixels)
    across = -(-channels // bn)
    programs = across * math.prod(stride)
    constants = {
        "BM": config.pixels, "BN": bn, "BK": bk, "FUSE": config.fuse, "S_H": problem.stride[0],
        "S_W": problem.stride[1], "BITS": tap_bits(kernel), "Y_MULTIPLE": math.gcd(channels, 16),
        "X_MULTIPLE": math.gcd(source[1], 16 if config.copy == 16 else config.copy // problem.dtype.itemsize),
        "RAGGED": source[1] % bk != 0, "NORM": norm, "SLOPE": fusion.slope, "UP": fusion.upsample,
        "POOL": fusion.pool, "PRECISION": precision, "UPCAST": upcast(problem.dtype), "STAGES": config.stages,
    }  # fmt: skip
    if dgrad:
        constants |= {"SUMS": fusion.sums, "SCALED": fusion.scaled}
    else:
        constants |= {"BIAS": fusion.bias, "RESIDUAL": fusion.residual, "MOMENTS": fusion.moments}
    tiles = -(-images * height * width * square**2 // config.pixels)
    sizes = (*source[2:], source[1], *result[2:], channels)
    scalars = (programs, across, images, *sizes, *problem.padding, *problem.dilation)
    kernel_function = input_grad_kernel if dgrad else forward_kernel
    return Launch(kernel_function, (programs * tiles,), scalars, constants, config.warps, config.stages)


def pixels_of_tile(launch: Launch) -> int:
    """Pixels of the result that a program writes."""
    side = launch.constants["UP" if launch.kernel is input_grad_kernel else "POOL"]
    return launch.constants["BM"] // side**2


def tiles_of(launch: Launch) -> int:
    """Tiles of pixels of a launch, of one phase."""
    return launch.grid[0] // launch.scalars[0]


def forward(
    problem: Problem,
    fusion: Fusion,
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Tables,
    lists: RowLists,
    output: Tensor,
    config: GatherConfig | None = None,
) -> tuple[Tensor, int]:
    """Fills ``output``, which like input and residual is in native memory.

    Returns:
        The moments of its tiles (:func:`.moments.merged`), and how many pixels each has.
    """
    launch = plan(problem, fusion, config, product_precision(problem.dtype, False), input.get_device())
    partial = partial_moments(input, tiles_of(launch) if fusion.moments else 0, output.shape[1])
    launch(
        input, values, output, values if bias is None else bias, input if residual is None else residual, *norm[1:],
        partial, *lists,
    )  # fmt: skip
    return partial, pixels_of_tile(launch)


def input_grad(
    problem: Problem,
    fusion: Fusion,
    grad_output: Tensor,
    input: Tensor,
    values: Tensor,
    norm: Tables,
    lists: RowLists,
    grad: Tensor,
    config: GatherConfig | None = None,
) -> tuple[Tensor, int]:
    """Fills ``grad`` with grad_z, or with that times the norm's scale; all in native memory.

    Returns:
        ``[tiles, phases, 2, C_in]``: Σ grad_z and Σ grad_z · (input − mean) of every tile; how many pixels each has.
    """
    launch = plan(problem, fusion, config, product_precision(problem.dtype, False), input.get_device())
    phases = math.prod(problem.stride)
    partial = partial_moments(input, tiles_of(launch) * phases if fusion.sums else 0, input.shape[1])
    launch(grad_output, values, grad, input, *norm[1:], partial, *lists)
    return partial.view(-1, phases, 2, input.shape[1]), pixels_of_tile(launch)
