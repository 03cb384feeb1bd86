"""What ``torch.utils.flop_counter`` counts for the registered operators: two operations for each multiply-add of an
active block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from ..topology import grid

_ops = torch.ops.ddst


def _active(topology: Tensor, weight_shape: Sequence[int], block: Sequence[int]) -> int:
    """Weights in active blocks; of a vector without entries, in all slots."""
    rows, cols, _ = grid(weight_shape, (block[0], block[1]))
    if topology.is_meta or isinstance(topology, FakeTensor):
        return (topology.shape[0] - rows - cols - 2) // 5 * block[0] * block[1]
    return int(topology[rows]) * block[0] * block[1]


@register_flop_formula([_ops.conv2d, _ops.linear], get_raw=True)
def _forward(
    input: Tensor, values: Tensor, bias: Any, topology: Tensor, weight_shape: Sequence[int], *args: Any, out_val: Tensor
) -> int:
    return 2 * _active(topology, weight_shape, values.shape[1:]) * (out_val.numel() // weight_shape[0])


@register_flop_formula([_ops.conv2d_input_grad, _ops.linear_input_grad], get_raw=True)
def _input_grad(
    grad_output: Tensor, values: Tensor, topology: Tensor, weight_shape: Sequence[int], *args: Any, out_val: Tensor
) -> int:
    return 2 * _active(topology, weight_shape, values.shape[1:]) * (grad_output.numel() // weight_shape[0])


@register_flop_formula([_ops.conv2d_weight_grad, _ops.linear_weight_grad], get_raw=True)
def _weight_grad(
    grad_output: Tensor,
    input: Tensor,
    topology: Tensor,
    weight_shape: Sequence[int],
    block: Sequence[int],
    *args: Any,
    out_val: Tensor,
) -> int:
    return 2 * _active(topology, weight_shape, block) * (grad_output.numel() // weight_shape[0])


def _fused_pixels(input: Tensor, weight_shape: Sequence[int], geometry: Sequence[Any]) -> int:
    """Those that the convolution of a fused half block computes: of the upsampled map, before it is pooled."""
    stride, padding, dilation, _, _, upsample, *_ = geometry
    return input.shape[0] * math.prod(
        (input.shape[2 + i] * upsample + 2 * padding[i] - dilation[i] * (weight_shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )


@register_flop_formula(_ops.norm_act_conv2d, get_raw=True)
def _fused_forward(input: Tensor, values: Tensor, *args: Any, out_val: Any) -> int:
    topology, weight_shape, *geometry = args[6:]
    return 2 * _active(topology, weight_shape, values.shape[1:]) * _fused_pixels(input, weight_shape, geometry)


@register_flop_formula(_ops.norm_act_conv2d_input_grad, get_raw=True)
def _fused_input_grad(grad_output: Tensor, input: Tensor, values: Tensor, *args: Any, out_val: Any) -> int:
    topology, weight_shape, *geometry = args[4:]
    return 2 * _active(topology, weight_shape, values.shape[1:]) * _fused_pixels(input, weight_shape, geometry)


@register_flop_formula(_ops.norm_act_conv2d_weight_grad, get_raw=True)
def _fused_weight_grad(grad_output: Tensor, input: Tensor, *args: Any, out_val: Any) -> int:
    topology, weight_shape, block, *geometry = args[4:]
    return 2 * _active(topology, weight_shape, block) * _fused_pixels(input, weight_shape, geometry)


@register_flop_formula([_ops.conv2d_block_scores, _ops.linear_block_scores], get_raw=True)
def _block_scores(grad_output: Tensor, input: Tensor, weight_shape: Sequence[int], *args: Any, out_val: Tensor) -> int:
    return 2 * math.prod(weight_shape) * (grad_output.numel() // weight_shape[0])


@register_flop_formula([_ops.power_iteration], get_raw=True)
def _power_iteration(
    values: Tensor,
    topology: Tensor,
    u: Tensor,
    v: Tensor,
    matrix_shape: Sequence[int],
    channels: int,
    taps: int,
    iterations: int,
    *args: Any,
    out_val: Tensor,
) -> int:
    # Two products an iteration, and u vᵀ as a weight gradient counts.
    return 2 * _active(topology, matrix_shape, values.shape[1:]) * (2 * iterations + 1)
