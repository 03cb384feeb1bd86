"""The dense reference of every operator: unpack the weight, let torch compute. The oracle of all tests.

Selectable as ``backend="reference"``; it saves neither time nor memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .. import backends
from ..topology import as_blocks, from_blocks, grid, split_topology
from .gradient_record import recorder_of


def dense_weight(values: Tensor, topology: Tensor, weight_shape: Sequence[int], record: int = 0) -> Tensor:
    """The dense weight of packed values, differentiable; the recorder of a key, if open, receives its gradient."""
    block = (values.shape[1], values.shape[2])
    rows, cols, taps = grid(weight_shape, block)
    expected = rows + cols + 2 + 5 * values.shape[0]
    if topology.dtype != torch.int32 or topology.dim() != 1 or topology.numel() != expected:
        raise ValueError(
            f"topology must be an int32 vector of {expected} entries for values of the shape {tuple(values.shape)}, "
            f"got {topology.dtype} of the shape {tuple(topology.shape)}"
        )
    index = split_topology(topology, rows, cols)
    total = rows * cols * taps
    # One place more, for the free slots, whose row and column lie outside.
    flat = ((index.block_row.long() * cols + index.block_col) * taps + index.block_tap).clamp(max=total)
    blocks = values.new_zeros(total + 1, *block).index_put((flat,), values)[:-1]
    weight = from_blocks(blocks.view(rows, cols, *weight_shape[2:], *block), weight_shape)
    if record and weight.requires_grad and not torch.compiler.is_compiling():
        weight.register_hook(lambda gradient: _record(record, gradient))
    return weight


def _record(key: int, gradient: Tensor) -> None:
    recorder = recorder_of(key)
    if recorder is not None:
        recorder.add_dense(gradient)


def conv2d(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: list[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    record: int = 0,
) -> Tensor:
    """:func:`ddst.ops.conv2d` by a dense convolution."""
    return F.conv2d(input, dense_weight(values, topology, weight_shape, record), bias, stride, padding, dilation)


def conv_transpose2d(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: list[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int],
    dilation: tuple[int, int],
    record: int = 0,
) -> Tensor:
    """:func:`ddst.ops.conv_transpose2d` by a dense transposed convolution."""
    weight = dense_weight(values, topology, weight_shape, record)
    return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, dilation=dilation)


def linear(
    input: Tensor, values: Tensor, bias: Tensor | None, topology: Tensor, weight_shape: list[int], record: int = 0
) -> Tensor:
    """:func:`ddst.ops.linear` by a dense matrix product."""
    if bias is not None and tuple(bias.shape) != (weight_shape[0],):  # F.linear would broadcast it
        raise ValueError(f"bias must have the shape ({weight_shape[0]},), got {tuple(bias.shape)}")
    return F.linear(input, dense_weight(values, topology, weight_shape, record), bias)


def block_norms_of(gradient: Tensor, block: Sequence[int]) -> Tensor:
    """L2 norm of every block of a dense weight's gradient, in the shape of the block mask."""
    return torch.linalg.vector_norm(as_blocks(gradient, (block[0], block[1])), dim=(-2, -1))


def conv2d_block_scores(
    grad_output: Tensor,
    input: Tensor,
    weight_shape: list[int],
    block: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """:func:`ddst.ops.conv2d_block_scores` by the dense weight gradient."""
    gradient = conv2d_weight(input, weight_shape, grad_output, stride, padding, dilation)
    return block_norms_of(gradient, block)


def linear_block_scores(grad_output: Tensor, input: Tensor, weight_shape: list[int], block: list[int]) -> Tensor:
    """:func:`ddst.ops.linear_block_scores` by the dense weight gradient."""
    return block_norms_of(grad_output.t() @ input, block)


def supports(problem: backends.Problem) -> tuple[bool, str]:
    """``(ok, reason)``: always yes."""
    return True, "dense arithmetic on the unpacked weight: right, but saves neither time nor memory"


backends.register("reference", supports)
