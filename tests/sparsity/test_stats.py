"""Counted parameters and training operations."""

import pytest
import torch
from torch import nn

import ddst
from ddst.sparsity import FlopCounter, TrainingFlops, network_stats
from ddst.sparsity.stats import storage_bytes


def convnet(density=None):
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3, stride=2, padding=1),
        nn.Flatten(), nn.Linear(16 * 4, 10),
    )  # fmt: skip
    if density is not None:
        ddst.sparsify(model, density, distribution="uniform")
    return model


CONV1, CONV2, LINEAR = 16 * 32 * 9 * 16, 32 * 16 * 9 * 4, 64 * 10


def test_operations_of_a_dense_network_by_hand():
    counter = FlopCounter(convnet(), torch.zeros(3, 16, 4, 4))
    assert counter.forward == counter.dense == 2 * (CONV1 + CONV2 + LINEAR)


def test_operations_follow_the_masks():
    model = convnet(0.5)
    counter = FlopCounter(model, torch.zeros(3, 16, 4, 4))
    assert counter.dense == 2 * (CONV1 + CONV2 + LINEAR)
    assert counter.forward == 2 * (CONV1 / 2 + CONV2 / 2 + LINEAR)
    mask = torch.ones_like(model[0].block_mask)
    model[0].set_block_mask(mask)
    assert counter.forward == 2 * (CONV1 + CONV2 / 2 + LINEAR)


def test_edge_blocks_count_what_lies_inside_the_weight():
    layer = ddst.SparseLinear(20, 24, density=1.0)
    counter = FlopCounter(layer, torch.zeros(1, 20))
    assert counter.forward == counter.dense == 2 * 20 * 24


def test_other_layers_and_layers_used_twice():
    transposed = nn.ConvTranspose2d(4, 6, 3, stride=2)
    counter = FlopCounter(transposed, torch.zeros(2, 4, 5, 5))
    assert counter.dense == 2 * (4 * 6 * 9) * 25
    grouped = FlopCounter(nn.Conv2d(8, 8, 3, groups=4), torch.zeros(1, 8, 5, 5))
    assert grouped.dense == 2 * (8 * 2 * 9) * 9
    shared = nn.Linear(6, 6)
    assert FlopCounter(nn.Sequential(shared, nn.ReLU(), shared), torch.zeros(1, 6)).dense == 2 * 2 * 36
    tokens = FlopCounter(nn.Linear(6, 7), torch.zeros(2, 5, 6))
    assert tokens.dense == 2 * 6 * 7 * 5


def test_counting_leaves_no_trace():
    model = convnet(0.5).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    FlopCounter(model, torch.randn(3, 16, 4, 4))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert not any(m._forward_hooks for m in model.modules())


def test_gan_iteration_counts_passes_as_published():
    g = FlopCounter(nn.Linear(10, 10), torch.zeros(1, 10))
    d = FlopCounter(nn.Linear(10, 20), torch.zeros(1, 10))
    flops = TrainingFlops(g, d, d_steps=5)
    assert flops.iteration()[0] == 200 * (5 + 3) + 400 * (15 + 1)
    assert flops.relative == 1.0
    flops.update()
    assert flops.relative == 1.0


def test_relative_operations_are_an_average_over_the_run():
    layer = ddst.SparseLinear(64, 64, density=0.25)
    flops = TrainingFlops(FlopCounter(layer, torch.zeros(1, 64)), FlopCounter(nn.ReLU(), torch.zeros(1, 64)))
    flops.update()
    layer.set_block_mask(torch.ones_like(layer.block_mask))
    other = TrainingFlops(flops.generator, flops.discriminator)
    other.load_state_dict(flops.state_dict())
    for each in (flops, other):
        each.update()
        assert each.relative == pytest.approx((0.25 + 1.0) / 2)


def test_parameters_of_a_sparse_and_a_dense_network():
    stats, dense = network_stats(convnet(0.5)), network_stats(convnet())
    weights = 16 * 32 * 9 * 2
    others = 32 + 16 + 2 * 32 + 650
    assert (stats.parameters, stats.dense_parameters) == (weights // 2 + others, weights + others)
    assert (dense.parameters, dense.density, dense.sparse_density) == (weights + others, 1.0, 1.0)
    assert stats.sparse_density == 0.5
    assert stats.density == pytest.approx((weights / 2 + 640) / (weights + 640))
    assert dense.memory.relative == 1.0
    assert dense.memory.index == 0 < stats.memory.index


def test_bytes_are_those_of_whole_storages():
    big = torch.zeros(1000)
    assert storage_bytes([big[:10]]) == 4000
    assert storage_bytes([big[:10], big[20:]]) == 4000


@pytest.mark.parametrize("sample", [None, torch.zeros(3), torch.zeros(0, 3)])
def test_errors_name_the_argument(sample):
    with pytest.raises(TypeError, match="sample"):
        FlopCounter(nn.Linear(3, 3), sample)


def test_d_steps_must_be_positive():
    counter = FlopCounter(nn.Linear(3, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="d_steps"):
        TrainingFlops(counter, counter, d_steps=0)
