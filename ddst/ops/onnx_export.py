"""The operators in torch's own, for ``torch.onnx.export``: it takes what is registered here, and nothing else does.

(``run_decompositions()``, AOTAutograd and inductor have tables of their own; registered implementations of ONNX would
have to be handed to each call of the exporter.) The packed values are scattered into zeros in the file, too: there a
weight is as small as here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from .. import backends
from ..topology import as_blocks, split_topology
from . import reference
from .conv2d import _conv2d_fake, _conv2d_input_grad_fake
from .linear import _linear_fake, _linear_input_grad_fake, _linear_weight_grad_fake
from .norm_act_conv2d import _norm_act_conv2d_fake, composed

_ops = torch.ops.ddst
Function = Callable[..., Any]


def for_export(operator: Any, fake: Function) -> Callable[[Function], Function]:
    """Registers what stands in a file for an operator.

    Fake tensors of symbolic sizes would take it, too, in place of the fake kernel, whose memory formats it does not
    have, and whose sizes it would compare. What stands in the table of meta functions they take first.
    """
    register_decomposition(operator, type="meta")(fake)
    return register_decomposition(operator)


@for_export(_ops.conv2d.default, _conv2d_fake)
def _conv2d(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    channels_last: bool,
    backend: int = 0,
    record: int = 0,
) -> Tensor:
    weight = reference.dense_weight(values, topology, weight_shape)
    return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation)


@for_export(_ops.conv2d_input_grad.default, _conv2d_input_grad_fake)
def _conv2d_input_grad(
    grad_output: Tensor,
    values: Tensor,
    topology: Tensor,
    weight_shape: list[int],
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    channels_last: bool,
    backend: int = 0,
    record: int = 0,
) -> Tensor:
    # Of sizes that may be symbols: the smallest that the transposed convolution has, and what is missing of them.
    smallest = [
        (grad_output.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight_shape[2 + i] - 1) + 1
        for i in (0, 1)
    ]
    missing = [int(input_size[i] - smallest[i]) for i in (0, 1)]
    weight = reference.dense_weight(values, topology, weight_shape)
    return torch.nn.functional.conv_transpose2d(grad_output, weight, None, stride, padding, missing, dilation=dilation)


@for_export(_ops.linear.default, _linear_fake)
def _linear(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Tensor,
    weight_shape: list[int],
    backend: int = 0,
    record: int = 0,
) -> Tensor:
    return torch.nn.functional.linear(input, reference.dense_weight(values, topology, weight_shape), bias)


@for_export(_ops.linear_input_grad.default, _linear_input_grad_fake)
def _linear_input_grad(
    grad_output: Tensor,
    values: Tensor,
    topology: Tensor,
    weight_shape: list[int],
    backend: int = 0,
    record: int = 0,
) -> Tensor:
    return grad_output @ reference.dense_weight(values, topology, weight_shape)


@for_export(_ops.linear_weight_grad.default, _linear_weight_grad_fake)
def _linear_weight_grad(
    grad_output: Tensor, input: Tensor, topology: Tensor, weight_shape: list[int], block: list[int], backend: int = 0
) -> Tensor:
    # Of spectral norms: sigma is the sum over blocks of u vᵀ times the weight.
    blocks = as_blocks(grad_output.t() @ input, (block[0], block[1]))
    rows, cols = blocks.shape[:2]
    index = split_topology(topology, rows, cols)
    # One block of zeros more, for the free slots.
    flat = (index.block_row.long() * cols + index.block_col).clamp(max=rows * cols)
    return torch.nn.functional.pad(blocks.flatten(0, 1), (0, 0, 0, 0, 0, 1))[flat]


@for_export(_ops.norm_act_conv2d.default, _norm_act_conv2d_fake)
def _norm_act_conv2d(*args: Any) -> tuple[Tensor, Tensor]:
    moments, asked = args[19], (*args[:19], backends.code("reference"), 0)
    y = composed(*asked)
    if not moments:
        return y, y.new_empty([0])
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    return y, torch.stack([mean, var])
