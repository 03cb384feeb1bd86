"""Tensors and programs of a case: every baseline computes the same thing, and what is counted is right."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ddst import topology
from ddst.benchmarks import problem as bench
from ddst.benchmarks.problem import PASSES, Problem
from ddst.benchmarks.registry import LAYERS, Case, Layer

SMALL = Layer(24, 32, 3, 5)
STRIDED = Layer(16, 32, 4, 8, stride=2)
LINEAR = Layer(48, 64)
TRANSPOSED = Layer(48, 32, 4, 5, stride=2, transposed=True)
SIGNAL = Layer(24, 32, 3, 17, dilation=3, dims=1)
LONGER = Layer(32, 16, 8, 6, stride=4, dims=1, transposed=True)
CONVS = [SMALL, STRIDED, TRANSPOSED, SIGNAL, LONGER]


@pytest.fixture(autouse=True)
def _small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in (*CONVS, LINEAR):
        monkeypatch.setitem(LAYERS, layer.name, layer)


def make(layer: Layer, density: float = 0.3, *, mask: str = "random", channels_last: bool = True) -> Problem:
    return Problem.make(Case(layer.op, layer.name, 3, density, (16, 8), mask), channels_last)


@pytest.mark.parametrize("layer", [*CONVS, LINEAR], ids=lambda layer: layer.name)
@pytest.mark.parametrize("side", ["packed", "nchw", "dense", "dense_last", "masked"])
def test_every_side_computes_the_three_passes(layer: Layer, side: str) -> None:
    problem = make(layer, channels_last=side != "nchw")
    works = {
        "packed": problem.packed,
        "nchw": problem.packed,
        "dense": lambda: problem.dense(False),
        "dense_last": lambda: problem.dense(True),
        "masked": lambda: problem.masked(True),
    }[side]()
    expected = problem.expected()
    for i, work in enumerate(works):
        assert problem.wrong(i, work(), expected[i]) is None, PASSES[i]


def test_masked_gradient_is_zero_outside_the_mask() -> None:
    problem = make(SMALL)
    gradient = problem.masked(False)[2]()
    outside = topology.unpack(torch.ones_like(problem.values), problem.mask, SMALL.weight_shape) == 0
    assert outside.any()
    assert gradient[outside].abs().max() == 0.0


@pytest.mark.parametrize("layer", CONVS, ids=lambda layer: layer.name)
def test_converted_is_the_packed_pass_between_layout_changes(layer: Layer) -> None:
    problem = make(layer, channels_last=False)
    expected = problem.expected()
    for i, work in enumerate(problem.converted()):
        result = work()
        assert problem.wrong(i, result, expected[i]) is None
        assert i == 2 or result.is_contiguous()


def test_torch_sparse_is_right_or_absent() -> None:
    problem = Problem.make(Case("linear", LINEAR.name, 3, 0.3))
    expected = problem.expected()
    for i, work in enumerate(problem.torch_sparse("csr")):
        assert problem.wrong(i, work(), expected[i]) is None, PASSES[i]
    with pytest.raises(RuntimeError):
        problem.torch_sparse("bsr")[2]()


def test_errors_are_named() -> None:
    problem = make(SMALL)
    expected = problem.expected()
    assert problem.wrong(0, expected[0] + 1.0, expected[0]).startswith("forward (error")
    assert problem.wrong(1, torch.full_like(expected[1], math.nan), expected[1]).startswith("dgrad")
    assert problem.wrong(2, expected[2][:-1], expected[2]).startswith("wgrad (error inf")


@pytest.mark.parametrize("layer", [*CONVS, LINEAR], ids=lambda layer: layer.name)
def test_flops_count_taps_inside_the_image_only(layer: Layer) -> None:
    problem = make(layer)
    weight = topology.unpack(torch.ones_like(problem.values), problem.mask, layer.weight_shape)
    ones = torch.ones_like(problem.input)
    if layer.op == "linear":
        products = F.linear(ones, weight).sum()
    else:
        one_row = layer.dims == 1
        settings = {"stride": layer.stride, "padding": (0, layer.padding) if one_row else layer.padding}
        settings |= {"dilation": layer.dilation}
        products = (F.conv_transpose2d if layer.transposed else F.conv2d)(ones, weight, **settings).sum()
    assert problem.flops() == 2 * products.item()
    assert problem.flops(dense=True) == pytest.approx(make(layer, 1.0).flops())


def test_bytes_are_input_output_and_active_values() -> None:
    problem = make(LINEAR, 0.5)
    assert problem.bytes() == 4 * (3 * 48 + 3 * 64 + problem.mask.sum().item() * 16 * 8)


def test_skewed_rows_go_from_one_to_four() -> None:
    mask = bench.skewed_mask([256, 256, 3, 3], (16, 16), 230, torch.Generator().manual_seed(0))
    rows = sorted(mask.flatten(1).sum(1).tolist())
    assert sum(rows) == 230
    assert rows[-1] / rows[0] == pytest.approx(4.0, rel=0.15)
    assert rows[8] == pytest.approx(230 / 16, rel=0.15)


@pytest.mark.parametrize("nnz", [1, 9, 15, 16])
def test_skewed_masks_keep_the_count_when_rows_are_full(nnz: int) -> None:
    assert bench.skewed_mask([64, 64], (16, 16), nnz, torch.Generator().manual_seed(1)).sum() == nnz


def test_a_case_is_the_same_tensors_every_time() -> None:
    first, second = make(SMALL, mask="skewed"), make(SMALL, mask="skewed")
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.input, second.input)
    assert first.density == pytest.approx(0.3, abs=0.03)
