"""The operators in torch's own, for ``torch.onnx.export``, which calls them when it decomposes a program.

Not in torch's table of decompositions: there fake tensors of symbolic sizes would take them in place of the fake
kernels, whose memory formats they do not have, and inductor refuses them where the environment has ``CI``. Functions
registered with ONNX's exporter would have to be handed to each call of it. The packed values are scattered into zeros
in the file, too: there a weight is as small as here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..topology import as_blocks, split_topology
from . import reference
from .autograd import formulas
from .norm_act_conv2d import composed

Function = Callable[..., Any]


def for_export(name: str) -> Callable[[Function], Function]:
    """Registers what stands in a file for an operator."""
    return partial(formulas.setdefault, name)


@for_export("conv2d")
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


@for_export("conv2d_input_grad")
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


@for_export("linear")
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


@for_export("linear_input_grad")
def _linear_input_grad(
    grad_output: Tensor,
    values: Tensor,
    topology: Tensor,
    weight_shape: list[int],
    backend: int = 0,
    record: int = 0,
) -> Tensor:
    return grad_output @ reference.dense_weight(values, topology, weight_shape)


@for_export("linear_weight_grad")
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


@for_export("norm_act_conv2d")
def _norm_act_conv2d(*args: Any) -> tuple[Tensor, Tensor]:
    moments, asked = args[19], (*args[:19], backends.code("reference"), 0)
    y = composed(*asked)
    if not moments:
        return y, y.new_empty([0])
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    return y, torch.stack([mean, var])
