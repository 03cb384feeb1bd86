"""Norms of the blocks of the dense weight gradient, active or not, without storing that gradient.

    scores[r, c, kh, kw] = ‖ Σ over output pixels p of grad_output[p, rows of r]ᵀ · input[p at tap, columns of c] ‖₂

Needed at updates of the mask only. Whatever the blocks are, a program computes 64 × 64 channels of one tap, which fills
the tensor cores, and of them the sums of squares of 16 × 16 pieces; a block's score is the root of its pieces' sum.
A norm needs the sum over all pixels. Only where there are too few programs to fill the device, the pixels are split,
and the sums are kept in float32 until a second kernel adds and squares them: a few MB of scratch (:data:`FULL`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Problem
from .launch import Launch, native, native_rows, product_precision, upcast
from .tile import divisor, hint
from .weight_grad import Part, multiprocessors, pixel_sum, split_pixels

TILE = 64
PIECE = 16
#: Programs per multiprocessor that fill a device. As pixels are split only where there are fewer tiles, the scratch
#: memory holds at most FULL tiles of 16 kB per multiprocessor (more beyond 2³¹ pixels, in several launches).
FULL = 4

_SCALARS = [
    *("direct", "part", "total", "tiles_in", "taps", "XH", "XW", "XC", "YH", "YW", "YC"),
    *("magic_h", "bits_h", "magic_w", "bits_w", "P_H", "P_W", "D_H", "D_W", "KW"),
]


@triton.jit
def store_squares(acc, squares, number, TILE: tl.constexpr, PIECE: tl.constexpr):
    """Writes the sums of squares of a tile's pieces, ``[TILE / PIECE, TILE / PIECE]``."""
    N: tl.constexpr = TILE // PIECE
    by_column = tl.sum(tl.reshape(acc * acc, (TILE, N, PIECE)), axis=2)
    by_piece = tl.sum(tl.reshape(by_column, (N, PIECE, N)), axis=1)
    n = tl.arange(0, N)
    tl.store(squares + number.to(tl.int64) * (N * N) + n[:, None] * N + n[None, :], by_piece)


@triton.jit(do_not_specialize=_SCALARS)
def tile_sums(
    grad_output, input, squares, partial,
    direct, part, total, tiles_in, taps, XH, XW, XC, YH, YW, YC, magic_h, bits_h, magic_w, bits_w, P_H, P_W, D_H, D_W,
    KW,
    TILE: tl.constexpr, PIECE: tl.constexpr, PIXELS: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr,
    X_MULTIPLE: tl.constexpr, Y_MULTIPLE: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (t, s): tile t (rows of output channels, then input channels, then taps), s-th part of the pixels."""
    XC = hint(XC, X_MULTIPLE)
    YC = hint(YC, Y_MULTIPLE)
    number = tl.program_id(0)
    split = tl.program_id(1)
    tap = number % taps
    lane = tl.arange(0, TILE)
    in_channel = number // taps % tiles_in * TILE + lane
    out_channel = number // taps // tiles_in * TILE + lane
    acc = pixel_sum(
        grad_output, input, out_channel, out_channel < YC, in_channel, in_channel < XC,
        tap // KW * D_H - P_H, tap % KW * D_W - P_W, split * part, tl.minimum(split * part + part, total), total,
        XH, XW, XC, YH, YW, YC, magic_h, bits_h, magic_w, bits_w,
        S_H, S_W, PIXELS, False, False, RAGGED, RAGGED, PRECISION, UPCAST, STAGES,
    )  # fmt: skip
    if RAGGED:  # an infinity times a masked zero is no zero
        acc = tl.where((out_channel < YC)[:, None] & (in_channel < XC)[None, :], acc, 0.0)
    if direct:
        store_squares(acc, squares, number, TILE, PIECE)
    else:
        to = (tl.cast(split, tl.int64) * tl.num_programs(0) + number) * (TILE * TILE)
        tl.store(partial + to + lane[:, None] * TILE + lane[None, :], acc)


@triton.jit(do_not_specialize=["parts"])
def add_and_square(partial, squares, parts, TILE: tl.constexpr, PIECE: tl.constexpr):
    """Adds the parts of a tile in order, and squares."""
    number = tl.program_id(0)
    lane = tl.arange(0, TILE)
    at = partial + number.to(tl.int64) * (TILE * TILE) + lane[:, None] * TILE + lane[None, :]
    acc = tl.zeros((TILE, TILE), dtype=tl.float32)
    for split in tl.range(0, parts):
        acc += tl.load(at + tl.cast(split, tl.int64) * tl.num_programs(0) * (TILE * TILE))
    store_squares(acc, squares, number, TILE, PIECE)


@functools.lru_cache(maxsize=4096)
def plan(problem: Problem, precision: str, device: int) -> tuple[list[Part], list[Launch], Launch | None]:
    """Images and parts per launch, the launches, and the one that adds the parts if there are several."""
    out_channels, in_channels, *kernel = problem.weight_shape
    height, width = problem.output_size
    tiles_in, taps = -(-in_channels // TILE), math.prod(kernel)
    tiles = -(-out_channels // TILE) * tiles_in * taps
    step = 32 if problem.dtype == torch.float32 else 64
    parts = split_pixels(problem.images, height * width, tiles, step, multiprocessors(device), FULL)
    splits = sum(p.splits for p in parts)
    constants = {
        "TILE": TILE, "PIECE": PIECE, "PIXELS": step, "S_H": problem.stride[0], "S_W": problem.stride[1],
        "X_MULTIPLE": math.gcd(in_channels, 16), "Y_MULTIPLE": math.gcd(out_channels, 16),
        "RAGGED": in_channels % TILE != 0 or out_channels % TILE != 0,
        "PRECISION": precision, "UPCAST": upcast(problem.dtype), "STAGES": 3,
    }  # fmt: skip
    sizes = (*problem.input_size, in_channels, height, width, out_channels, *divisor(height), *divisor(width))
    geometry = (*problem.padding, *problem.dilation, kernel[1])

    def launch(p: Part) -> Launch:
        counts = (int(splits == 1), p.length, p.count * height * width, tiles_in, taps)
        return Launch(tile_sums, (tiles, p.splits), (*counts, *sizes, *geometry), constants, warps=4, stages=3)

    return parts, [launch(p) for p in parts], adding(tiles, splits) if splits > 1 else None


def adding(tiles: int, splits: int) -> Launch:
    """The launch that adds ``splits`` parts of so many tiles."""
    return Launch(add_and_square, (tiles,), (splits,), {"TILE": TILE, "PIECE": PIECE}, warps=4, stages=1)


def block_scores(problem: Problem, grad_output: Tensor, input: Tensor) -> Tensor:
    """``[R, C, kH · kW]`` of operands in native memory."""
    rows, cols, taps = problem.grid
    scores = input.new_zeros(rows, cols, taps)
    if grad_output.numel() == 0 or input.numel() == 0:
        return scores
    parts, launches, final = plan(problem, product_precision(problem.dtype, problem.linear), input.get_device())
    tiles_out, tiles_in = -(-problem.weight_shape[0] // TILE), -(-problem.weight_shape[1] // TILE)
    n = TILE // PIECE
    squares = torch.empty(tiles_out, tiles_in, taps, n, n, dtype=torch.float32, device=input.device)
    splits = sum(p.splits for p in parts) if final else 0
    partial = torch.empty(splits, tiles_out * tiles_in * taps, TILE * TILE, dtype=torch.float32, device=input.device)
    done = 0
    for part, launch in zip(parts, launches, strict=True):
        images = slice(part.first, part.first + part.count)
        launch(grad_output[images], input[images], squares, partial[done:])
        done += part.splits
    if final:
        final(partial, squares)
    # [tile row, piece row | tile column, piece column | tap], then pieces into blocks; the pieces beyond are zero.
    pieces = squares.permute(0, 3, 1, 4, 2).reshape(tiles_out * n, tiles_in * n, taps)
    high, wide = problem.block[0] // PIECE, problem.block[1] // PIECE
    missing = (rows * high - pieces.shape[0], cols * wide - pieces.shape[1])
    pieces = torch.nn.functional.pad(pieces, (0, 0, 0, missing[1], 0, missing[0]))
    return pieces.view(rows, high, cols, wide, taps).sum((1, 3)).sqrt().to(input.dtype)


def conv2d_block_scores(
    grad_output: Tensor,
    input: Tensor,
    weight_shape: Sequence[int],
    block: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``scores[r, c, kh, kw] = ‖∂⟨grad_output, conv2d(input, W)⟩ / ∂W[block r, c, kh, kw]‖₂``, all blocks.

    Args:
        grad_output: ``[N, C_out, H_out, W_out]``; input: ``[N, C_in, H, W]``; float32, float16 or bfloat16.
        weight_shape, block, stride, padding, dilation: of the convolution.

    Returns:
        ``[R, C, kH, kW]`` in the dtype of the input, from float32 sums.

    Cost: the dense weight gradient's products; scratch memory of a few MB, whatever the layer.
    """
    problem = Problem(
        "block_scores", False, input.dtype, tuple(block), tuple(weight_shape), tuple(stride), tuple(padding),
        tuple(dilation), input.shape[0], tuple(input.shape[2:]), tuple(grad_output.shape[2:]), 0,
    )  # fmt: skip
    return block_scores(problem, native(grad_output), native(input)).view(*problem.grid[:2], *weight_shape[2:])


def linear_block_scores(
    grad_output: Tensor, input: Tensor, weight_shape: Sequence[int], block: Sequence[int]
) -> Tensor:
    """``scores[r, c] = ‖(grad_outputᵀ · input)[block r, c]‖₂`` of ``[B, out]`` and ``[B, in]``."""
    one = (1, 1)
    problem = Problem(
        "block_scores", True, input.dtype, tuple(block), (*weight_shape, 1, 1), one, (0, 0), one, input.shape[0], one,
        one, 0,
    )  # fmt: skip
    return block_scores(problem, native_rows(grad_output), native_rows(input))[:, :, 0]
