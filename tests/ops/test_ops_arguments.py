"""Wrong arguments of the public functions: an error that names the argument, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddst.ops import conv2d, linear
from helpers.problems import ConvProblem, LinearProblem
from helpers.sparse import BACKENDS

CONV = [
    ("input", torch.zeros(2, 7, 6, 7), "input"),
    ("input", torch.zeros(6, 7), "input"),
    ("input", torch.zeros(1, 2, 8, 6, 7), "input"),
    ("values", torch.zeros(3, 8, 8), "values|topology"),
    ("values", torch.zeros(1, 8, 8), "values|topology"),  # would broadcast
    ("values", torch.zeros(8, 8), "values"),
    ("values", torch.zeros(0, 0, 8), "values|block"),
    ("values", torch.zeros(5, 65, 8), "values|block"),
    ("bias", torch.zeros(15), "bias"),
    ("bias", torch.zeros(16, 1), "bias"),
    ("bias", torch.zeros(1), "bias"),  # would broadcast
    ("topology", torch.zeros(2, dtype=torch.int32), "topology|values"),
    ("topology", torch.zeros(9, 9, dtype=torch.int32), "topology"),
    ("topology", torch.zeros(70, dtype=torch.int64), "topology"),
    ("weight_shape", (16, 8), "weight_shape"),
    ("weight_shape", (16, 8, 3), "weight_shape"),
    ("stride", 0, "stride"),
    ("stride", (1, -1), "stride"),
    ("stride", (1, 1, 1), "stride"),
    ("stride", 1.5, "stride"),
    ("padding", -1, "padding"),
    ("padding", (0, -2), "padding"),
    ("padding", "full", "padding"),
    ("padding", (1, 1, 1), "padding"),
    ("padding", 10**6, "padding"),
    ("padding", 2**31, "padding"),
    ("padding", True, "padding"),
    ("padding", 0.5, "padding"),
    ("dilation", 0, "dilation"),
    ("dilation", (1, 0), "dilation"),
    ("dilation", "2", "dilation"),
    ("dilation", 9, "input"),  # the kernel reaches beyond the padded input
    ("input", torch.zeros(2, 8, 0, 7), "input"),
    ("backend", "cudnn", "backend"),
]
LINEAR = [
    ("input", torch.zeros(5, 15), "input"),
    ("input", torch.zeros(()), "input"),
    ("values", torch.zeros(1, 8, 8), "values|topology"),
    ("values", torch.zeros(64), "values"),
    ("bias", torch.zeros(23), "bias"),
    ("bias", torch.zeros(1), "bias"),
    ("topology", torch.zeros(2, dtype=torch.int32), "topology|values"),
    ("topology", torch.zeros(40, dtype=torch.int64), "topology"),
    ("weight_shape", (24, 16, 1, 1), "weight_shape"),
    ("backend", "fast", "backend"),
]


def _right(problem: ConvProblem | LinearProblem) -> dict[str, Any]:
    case = problem.build(torch.float32)
    names = {"input": case.x, "values": case.values, "bias": case.bias, "topology": case.topology}
    return {**names, "weight_shape": case.weight_shape, **case.kwargs}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, value, named", CONV)
def test_conv2d_names_the_wrong_argument(name: str, value: Any, named: str, backend: str) -> None:
    arguments = {**_right(ConvProblem()), "backend": backend}
    conv2d(**arguments)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=named):
        conv2d(**{**arguments, name: value})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, value, named", LINEAR)
def test_linear_names_the_wrong_argument(name: str, value: Any, named: str, backend: str) -> None:
    arguments = {**_right(LinearProblem()), "backend": backend}
    linear(**arguments)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=named):
        linear(**{**arguments, name: value})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [2, (1, 2)])
def test_same_padding_with_a_stride_is_refused_as_by_torch(stride: Any, backend: str) -> None:
    arguments = {**_right(ConvProblem()), "backend": backend, "padding": "same", "stride": stride}
    with pytest.raises((ValueError, RuntimeError), match="padding"):
        conv2d(**arguments)


def test_topology_of_another_weight_is_refused() -> None:
    # A topology of another weight of equal length: row and column counts swapped.
    case = ConvProblem(channels=(8, 24), mask="full").build(torch.float32)
    other = ConvProblem(channels=(24, 8), mask="full").build(torch.float32)
    assert case.topology.numel() == other.topology.numel()
    with pytest.raises((ValueError, RuntimeError), match="topology"):
        conv2d(case.x, case.values, None, other.topology, case.weight_shape, padding=1, backend="cpu")
