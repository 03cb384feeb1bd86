"""Forward pass and input gradient of block-sparse convolution and linear, one family of kernels.

``result[pixel, channels of a row] = Σ_entries source[pixel + shift(tap), channels of the entry's block] · block``

Pixels are the M of the products, a block's channels N and K. A program computes a tile of pixels of one *row* of
:mod:`.index`: an output block in the forward pass, an input block of one phase in the input gradient. A row's list of
entries names, for each active block, the channels it reads and its tap, and beside it the slot of ``values`` in which
the block lies; the tap shifts all pixels of the tile alike, so that a step loads one tile of pixels and one block. A
row without entries gives exact zeros.

With ROWS > 1 a program computes as many neighbouring rows and walks the union of their entries: a step loads one tile
of pixels and the blocks of all of them, side by side, zeros for a row that has none there. Each sum is added in the
order in which a program of its own adds it; but a pixel that is not finite reaches all rows of the program, as in a
dense layer.

The next entry and slot are carried through the loop: loaded in the step that needs them, they would cost the pipeline a
stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .configs import GatherConfig, Problem, gather_fits
from .index import RowLists, forward_lists, input_grad_lists, max_channel_blocks, tap_bits
from .launch import Launch, product_precision, upcast
from .tile import channel_block, dot, hint, inside, pixels, shift, tap

# Numbers that change from layer to layer and batch to batch: none of them makes a new kernel.
_SCALARS = ["programs", "across", "images", "XH", "XW", "XC", "YH", "YW", "YC", "P_H", "P_W", "D_H", "D_W"]
_SCALARS += ["tiles_h", "tiles_w"]


@triton.jit
def phase_of(phase, P_H, P_W, YH, YW, DGRAD: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr):
    """(row and column of its first pixel, its height and width, shift of tap 0) of a phase; forward has only one."""
    if DGRAD:
        ph = phase // S_W
        pw = phase % S_W
        return ph, pw, (YH - ph + S_H - 1) // S_H, (YW - pw + S_W - 1) // S_W, ph + P_H, pw + P_W
    else:
        return 0, 0, YH, YW, -P_H, -P_W


@triton.jit
def finish(acc, y, bias, n, i, j, live, c, YH, YW, YC, BIAS: tl.constexpr, RELU: tl.constexpr):
    """Adds the bias, applies the ReLU, writes channels c of pixels (n, i, j)."""
    if BIAS:
        acc += tl.load(bias + c, mask=c < YC, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0.0, 0.0, acc)  # a NaN stays
    at = ((n.to(tl.int64) * YH + i) * YW + j) * YC
    tl.store(y + at[:, None] + c[None, :], acc.to(y.dtype.element_ty), mask=live[:, None] & (c < YC)[None, :])


@triton.jit
def ids_at(at, ROWS: tl.constexpr):
    """The slots of the blocks at a position, one for each row; -1 where a row has none."""
    if ROWS == 1:
        return (tl.load(at),)
    elif ROWS == 2:
        return tl.load(at), tl.load(at + 1)
    else:
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def places(values, BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, DGRAD: tl.constexpr):
    """Where slot 0 lies, once for each row: ``[K, N]`` in the input gradient, else ``[N, K]``."""
    k = tl.arange(0, BK)
    o = tl.arange(0, ROWS * BN)
    if ROWS > 1:
        o = o % BN
    if DGRAD:
        return values + k[:, None] * BN + o[None, :]  # the block is [b_out = K, b_in = N]
    else:
        return values + o[:, None] * BK + k[None, :]  # the block is [b_out = N, b_in = K]


@triton.jit
def weights(places, block, BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, DGRAD: tl.constexpr):
    """The blocks in these slots side by side, ``[K, N]``."""
    if ROWS == 1:
        loaded = tl.load(places + tl.cast(block[0], tl.int64) * (BN * BK))
    else:
        row = tl.arange(0, ROWS * BN) // BN
        id = tl.where(row == 0, block[0], block[1])
        for other in tl.static_range(2, ROWS):
            id = tl.where(row == other, block[other], id)
        id = tl.expand_dims(id, 0 if DGRAD else 1)
        loaded = tl.load(places + id.to(tl.int64) * (BN * BK), mask=id >= 0, other=0.0)
    return loaded if DGRAD else tl.trans(loaded)


@triton.jit
def block_by_block(
    acc, xp, values, entries, ids, start, end, i0, j0, XH, XW, XC, first_h, first_w, D_H, D_W,
    BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, DGRAD: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr,
    TAPS: tl.constexpr, TAPS_W: tl.constexpr, BITS: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sum over entries, one per step. TAPS > 0 keeps whether tap t is inside at a pixel as bit t."""
    k = tl.arange(0, BK)
    xp = xp + k[None, :]
    wp = places(values, BN, BK, ROWS, DGRAD)
    bits = tl.zeros((i0.shape[0],), dtype=tl.int32)
    for t in tl.static_range(TAPS):
        dh, dw = shift(t // TAPS_W, t % TAPS_W, first_h, first_w, DGRAD, S_H, S_W, D_H, D_W)
        bits |= inside(i0 + dh, j0 + dw, XH, XW).to(tl.int32) << t
    entry_ahead = tl.load(entries + start)
    ahead = ids_at(ids + start * ROWS, ROWS)
    for p in tl.range(start, end, num_stages=STAGES):
        entry = entry_ahead
        entry_ahead = tl.load(entries + p + 1)
        block = ahead
        ahead = ids_at(ids + p * ROWS + ROWS, ROWS)
        kh, kw = tap(entry, BITS)
        dh, dw = shift(kh, kw, first_h, first_w, DGRAD, S_H, S_W, D_H, D_W)
        if TAPS > 0:
            ok = (((bits >> (kh * TAPS_W + kw)) & 1) != 0)[:, None]
        else:
            ok = inside(i0 + dh, j0 + dw, XH, XW)[:, None]
        channel = channel_block(entry, BITS) * BK
        if RAGGED:
            ok = ok & (channel + k < XC)[None, :]
        xt = tl.load(xp + ((dh * XW + dw) * XC + channel), mask=ok, other=0.0)
        acc = dot(xt, weights(wp, block, BN, BK, ROWS, DGRAD), acc, PRECISION, UPCAST)
    return acc


@triton.jit
def several_blocks(
    acc, xp, values, entries, ids, start, end, i0, j0, XH, XW, XC, first_h, first_w, D_H, D_W,
    BN: tl.constexpr, BK: tl.constexpr, FUSE: tl.constexpr, DGRAD: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr,
    BITS: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sum over entries, FUSE blocks per step in one product of depth FUSE · BK: lane k belongs to block k // BK."""
    lane = tl.arange(0, FUSE * BK)
    place = lane // BK
    k = lane % BK
    o = tl.arange(0, BN)
    xp = xp + k[None, :]
    if DGRAD:
        wp = values + k[:, None] * BN + o[None, :]
    else:
        wp = values + o[:, None] * BK + k[None, :]
    entry_ahead = tl.load(entries + start + place, mask=start + place < end, other=0)
    id_ahead = tl.load(ids + start + place, mask=start + place < end, other=0)
    for p in tl.range(start, end, FUSE, num_stages=STAGES):
        q = p + place
        entry = entry_ahead
        entry_ahead = tl.load(entries + q + FUSE, mask=q + FUSE < end, other=0)
        block = id_ahead
        id_ahead = tl.load(ids + q + FUSE, mask=q + FUSE < end, other=0)
        present = q < end
        kh, kw = tap(entry, BITS)
        dh, dw = shift(kh, kw, first_h, first_w, DGRAD, S_H, S_W, D_H, D_W)
        channel = channel_block(entry, BITS) * BK
        have = present & (channel + k < XC) if RAGGED else present
        ok = inside(i0[:, None] + dh[None, :], j0[:, None] + dw[None, :], XH, XW) & have[None, :]
        xt = tl.load(xp + ((dh * XW + dw) * XC + channel)[None, :], mask=ok, other=0.0)
        at = block.to(tl.int64) * (BN * BK)
        if DGRAD:
            wt = tl.load(wp + at[:, None], mask=present[:, None], other=0.0)
            acc = dot(xt, wt, acc, PRECISION, UPCAST)
        else:
            wt = tl.load(wp + at[None, :], mask=present[None, :], other=0.0)
            acc = dot(xt, tl.trans(wt), acc, PRECISION, UPCAST)
    return acc


@triton.jit(do_not_specialize=_SCALARS)
def gather(
    x, values, y, bias, ptr, entries, ids, order,
    programs, across, images, XH, XW, XC, YH, YW, YC, P_H, P_W, D_H, D_W,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, FUSE: tl.constexpr, DGRAD: tl.constexpr,
    S_H: tl.constexpr, S_W: tl.constexpr, TAPS: tl.constexpr, TAPS_W: tl.constexpr, BITS: tl.constexpr,
    X_MULTIPLE: tl.constexpr, Y_MULTIPLE: tl.constexpr, RAGGED: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS rows, BM consecutive pixels of their phase. x is the source [images, XH, XW, XC], y the result.

    For every tile there are ``programs`` programs, ``across`` for each phase.
    """
    XC = hint(XC, X_MULTIPLE)
    YC = hint(YC, Y_MULTIPLE)
    group = tl.load(order + tl.program_id(0) % programs)
    first_pixel = tl.program_id(0) // programs * BM
    start = tl.load(ptr + group)
    end = tl.load(ptr + group + 1)
    ph, pw, height, width, first_h, first_w = phase_of(group // across, P_H, P_W, YH, YW, DGRAD, S_H, S_W)
    total = images * height * width
    end = tl.where(first_pixel < total, end, start)  # tiles are counted for the largest phase; a phase can be empty
    n, i, j, live = pixels(first_pixel, BM, tl.maximum(height, 1), tl.maximum(width, 1), total)
    i0 = i if DGRAD else i * S_H
    j0 = j if DGRAD else j * S_W
    xp = x + (((n.to(tl.int64) * XH + i0) * XW + j0) * XC)[:, None]
    i0 = tl.where(live, i0, -(1 << 30))  # outside under every tap
    acc = tl.zeros((BM, ROWS * BN), dtype=tl.float32)
    if FUSE == 1:
        acc = block_by_block(
            acc, xp, values, entries, ids, start, end, i0, j0, XH, XW, XC, first_h, first_w, D_H, D_W,
            BN, BK, ROWS, DGRAD, S_H, S_W, TAPS, TAPS_W, BITS, RAGGED, PRECISION, UPCAST, STAGES)  # fmt: skip
    else:
        acc = several_blocks(
            acc, xp, values, entries, ids, start, end, i0, j0, XH, XW, XC, first_h, first_w, D_H, D_W,
            BN, BK, FUSE, DGRAD, S_H, S_W, BITS, RAGGED, PRECISION, UPCAST, STAGES)  # fmt: skip
    i = i * S_H + ph if DGRAD else i
    j = j * S_W + pw if DGRAD else j
    c = group % across * (ROWS * BN) + tl.arange(0, ROWS * BN)
    finish(acc, y, bias, n, i, j, live, c, YH, YW, YC, BIAS, RELU)


@triton.jit(do_not_specialize=_SCALARS)
def gather_box(
    x, values, y, bias, ptr, entries, ids, order,
    programs, across, images, YH, YW, YC, P_H, P_W, D_H, D_W, tiles_h, tiles_w,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, DGRAD: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr, BITS: tl.constexpr,
    Y_MULTIPLE: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS rows, a box of pixels of their phase, which the tensor memory accelerator fetches through the descriptor x.

    What lies outside the source [images, XH, XW, XC] arrives as zeros: padding, ragged channels and the last boxes need
    no masks. Forward with stride 1 only (neighbours in the result are neighbours in the source), input gradient always.
    """
    BM: tl.constexpr = BOX_N * BOX_H * BOX_W
    YC = hint(YC, Y_MULTIPLE)
    group = tl.load(order + tl.program_id(0) % programs)
    tile = tl.program_id(0) // programs
    start = tl.load(ptr + group)
    end = tl.load(ptr + group + 1)
    ph, pw, height, width, first_h, first_w = phase_of(group // across, P_H, P_W, YH, YW, DGRAD, S_H, S_W)
    w0 = tile % tiles_w * BOX_W
    h0 = tile // tiles_w % tiles_h * BOX_H
    n0 = tile // tiles_w // tiles_h * BOX_N
    end = tl.where((h0 < height) & (w0 < width), end, start)
    wp = places(values, BN, BK, ROWS, DGRAD)
    acc = tl.zeros((BM, ROWS * BN), dtype=tl.float32)
    entry_ahead = tl.load(entries + start)
    ahead = ids_at(ids + start * ROWS, ROWS)
    for p in tl.range(start, end, num_stages=STAGES):
        entry = entry_ahead
        entry_ahead = tl.load(entries + p + 1)
        block = ahead
        ahead = ids_at(ids + p * ROWS + ROWS, ROWS)
        kh, kw = tap(entry, BITS)
        dh, dw = shift(kh, kw, first_h, first_w, DGRAD, S_H, S_W, D_H, D_W)
        xt = x.load([n0, h0 + dh, w0 + dw, channel_block(entry, BITS) * BK]).reshape(BM, BK)
        acc = dot(xt, weights(wp, block, BN, BK, ROWS, DGRAD), acc, PRECISION, UPCAST)
    m = tl.arange(0, BM)
    n = n0 + m // (BOX_H * BOX_W)
    i = h0 + m // BOX_W % BOX_H
    j = w0 + m % BOX_W
    live = (n < images) & (i < height) & (j < width)
    i = i * S_H + ph if DGRAD else i
    j = j * S_W + pw if DGRAD else j
    c = group % across * (ROWS * BN) + tl.arange(0, ROWS * BN)
    finish(acc, y, bias, n, i, j, live, c, YH, YW, YC, BIAS, RELU)


def _check_size(source: Sequence[int], result: Sequence[int], kernel: Sequence[int], reach: int, bk: int) -> None:
    """Refuses what int32 cannot count: pixels, the elements of one image, packed entries. Tensors may be larger."""
    if max(t[0] * t[2] * t[3] for t in (source, result)) > 2**31 - 256:
        raise ValueError(f"the Triton kernels count pixels in int32, got tensors of shapes {source} and {result}")
    if max(math.prod(t[1:]) for t in (source, result)) >= 2**31 or reach >= 2**29:
        raise ValueError(f"the Triton kernels need images of less than 2**31 elements, got {source[1:]}, {result[1:]}")
    if -(-source[1] // bk) > max_channel_blocks(kernel):
        raise ValueError(
            f"the Triton kernels can tell {max_channel_blocks(kernel)} channel blocks apart with a kernel of {kernel}, "
            f"got {-(-source[1] // bk)}: use larger blocks"
        )


@tuning.remember
def plan(
    problem: Problem, config: GatherConfig | None, precision: str, bias: bool, relu: bool, device: int = -1
) -> Launch:
    """A launch for a problem; source and result are the input and output, in the input gradient the other way round.

    ``config`` None takes what was tuned for the device, of which -1 is the CPU; where nothing was, the default, and the
    first launch also compiles the default at other densities: a density that changes in training compiles nothing.
    """
    others = []
    if config is None:
        chosen = tuning.choose(problem, tuning.device_name(device))
        assert isinstance(chosen, GatherConfig)
        config, defaults = chosen, tuning.defaults(problem)
        if config == defaults[0]:
            others = [plan(problem, other, precision, bias, relu) for other in defaults[1:]]
    dgrad = problem.op == "input_grad"
    c_out, c_in, *kernel = problem.weight_shape
    source = (problem.images, c_in, *problem.input_size)
    result = (problem.images, c_out, *problem.output_size)
    bn, bk = problem.block
    stride = problem.stride
    if dgrad:
        source, result, bn, bk = result, source, bk, bn
    reach = [p + d * (k - 1) for p, d, k in zip(problem.padding, problem.dilation, kernel, strict=True)]
    _check_size(source, result, kernel, max(reach), bk)
    images, channels, height, width = result
    if dgrad:  # the size of the first phase, which is the largest
        height, width = -(-height // stride[0]), -(-width // stride[1])
    across = -(-channels // (config.rows * bn))
    programs = across * (stride[0] * stride[1] if dgrad else 1)
    constants = {
        "BN": bn, "BK": bk, "ROWS": config.rows, "DGRAD": dgrad, "S_H": stride[0], "S_W": stride[1],
        "BITS": tap_bits(kernel), "Y_MULTIPLE": math.gcd(channels, 16), "BIAS": bias, "RELU": relu,
        "PRECISION": precision, "UPCAST": upcast(problem.dtype), "STAGES": config.stages,
    }  # fmt: skip
    if config.box is not None:
        if not gather_fits(config, problem):
            raise ValueError(f"config must fit the problem, got {config} for {problem}")
        n, h, w = config.box
        tiles = -(-images // n), -(-height // h), -(-width // w)
        scalars = (programs, across, images, *result[2:], channels, *problem.padding, *problem.dilation, *tiles[1:])
        constants |= {"BOX_N": n, "BOX_H": h, "BOX_W": w}
        return Launch(gather_box, (programs * math.prod(tiles),), scalars, constants, config.warps, config.stages)
    taps = math.prod(kernel)
    constants |= {
        "BM": config.pixels, "FUSE": config.fuse, "RAGGED": source[1] % bk != 0,
        "TAPS": taps if config.bits and config.fuse == 1 and taps <= 32 else 0, "TAPS_W": kernel[1],
        "X_MULTIPLE": math.gcd(source[1], 16 if config.copy == 16 else config.copy // problem.dtype.itemsize),
    }  # fmt: skip
    grid = (programs * -(-images * height * width // config.pixels),)
    sizes = (*source[2:], source[1], *result[2:], channels)
    scalars = (programs, across, images, *sizes, *problem.padding, *problem.dilation)
    return Launch(gather, grid, scalars, constants, config.warps, config.stages, others)


def lists_of(problem: Problem, topology: Tensor, rows: int) -> RowLists:
    """What the programs of a problem walk through, ``rows`` rows in each."""
    shape = (topology, problem.weight_shape, problem.block)
    if problem.op == "forward":
        return forward_lists(*shape, rows)
    return input_grad_lists(*shape, problem.stride, problem.padding, problem.dilation, rows)


def _run(
    problem: Problem,
    source: Tensor,
    values: Tensor,
    bias: Tensor | None,
    result: Tensor,
    topology: Tensor,
    relu: bool,
    config: GatherConfig | None,
) -> None:
    """Fills ``result``, which like ``source`` is in native memory."""
    if result.numel() == 0:
        return
    precision = product_precision(problem.dtype, problem.linear)
    launch = plan(problem, config, precision, bias is not None, relu, source.get_device())
    x = _boxes(source, launch.constants) if launch.kernel is gather_box else source
    lists = lists_of(problem, topology, launch.constants["ROWS"])
    launch(x, values, result, values if bias is None else bias, *lists)


def _boxes(source: Tensor, constants: dict[str, Any]) -> TensorDescriptor:
    """What the tensor memory accelerator has to know of a source."""
    images, channels, height, width = source.shape if source.dim() == 4 else (*source.shape, 1, 1)
    strides = [height * width * channels, width * channels, channels, 1]
    box = [constants[name] for name in ("BOX_N", "BOX_H", "BOX_W", "BK")]
    return TensorDescriptor(source, [images, height, width, channels], strides, box)


def forward(
    problem: Problem,
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    output: Tensor,
    relu: bool = False,
    config: GatherConfig | None = None,
) -> None:
    """Fills ``output`` with ``relu(conv(input, W) + bias)``; ``config`` None takes what tuning chooses.

    Args:
        input, output: channels_last ``[N, C, H, W]``, or rows ``[N, C]`` of a linear map, as :func:`.launch.native` and
            :func:`.launch.native_rows` make them.
    """
    _run(problem, input, values, bias, output, topology, relu, config)


def input_grad(
    problem: Problem,
    grad_output: Tensor,
    values: Tensor,
    topology: Tensor,
    grad_input: Tensor,
    config: GatherConfig | None = None,
) -> None:
    """Fills ``grad_input`` with the convolution's transpose of ``grad_output``; memory as in :func:`forward`."""
    _run(problem, grad_output, values, None, grad_input, topology, False, config)
