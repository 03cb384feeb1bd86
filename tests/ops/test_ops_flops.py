"""torch.utils.flop_counter counts the operations of active blocks, in every pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ddst

CASES = [
    (lambda **k: ddst.SparseLinear(64, 96, block=16, **k), (5, 64), 5),
    (lambda **k: ddst.SparseConv2d(32, 48, 3, padding=1, block=(16, 8), **k), (2, 32, 6, 5), 2 * 6 * 5),
    (lambda **k: ddst.SparseConv2d(32, 48, 3, stride=2, block=16, **k), (2, 32, 7, 7), 2 * 3 * 3),
]


def flops(layer: nn.Module, x: torch.Tensor, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("make, shape, positions", CASES)
@pytest.mark.parametrize("reserve", [None, 1.0])
def test_two_operations_for_each_active_weight_and_position(make, shape, positions, reserve) -> None:
    layer = make(density=0.25, reserve=reserve)
    one_pass = 2 * layer.active_weights * positions
    assert flops(layer, torch.randn(shape), backward=False) == one_pass
    assert flops(layer, torch.randn(shape), backward=True) == 2 * one_pass  # the input needs no gradient
    assert flops(layer, torch.randn(shape, requires_grad=True), backward=True) == 3 * one_pass


@pytest.mark.parametrize("make, shape, positions", CASES)
def test_a_full_layer_counts_what_the_dense_one_does(make, shape, positions) -> None:
    layer, x = make(density=1.0), torch.randn(shape, requires_grad=True)
    assert flops(layer, x, backward=True) == flops(layer.to_dense(), x.detach().requires_grad_(), backward=True) > 0


def test_scores_cost_the_dense_weight_gradient_and_meta_counts_slots() -> None:
    layer = ddst.SparseLinear(64, 64, density=0.25)
    layer.request_scores()
    layer(torch.randn(3, 64)).sum().backward()
    with FlopCounterMode(display=False) as counter:
        layer.take_scores()
    assert counter.get_total_flops() == 2 * 64 * 64 * 3
    meta = ddst.SparseLinear(64, 64, density=0.25, reserve=0.5, device="meta")
    assert flops(meta, torch.empty(3, 64, device="meta"), backward=False) == 2 * (64 * 64 // 2) * 3


def test_a_fused_half_block_counts_its_convolution() -> None:
    """Over the upsampled map, before it is pooled."""
    layer, x = ddst.SparseConv2d(32, 48, 3, padding=1, block=16, density=0.25), torch.randn(2, 32, 4, 5)
    settings = {"padding": 1, "upsample": 2, "pool": 2}
    call = (layer.values, None, layer.topology, layer.weight_shape)
    one_pass = 2 * layer.active_weights * 2 * 8 * 10
    with FlopCounterMode(display=False) as counter:
        y, _ = ddst.ops.norm_act_conv2d(x.requires_grad_(), *call, **settings)
    assert counter.get_total_flops() == one_pass
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * one_pass
