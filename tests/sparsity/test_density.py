"""Density of a network: what counts, and that it follows the masks."""

import pytest
import torch
from torch import nn

import ddst
from ddst.nn import sparse_layers
from ddst.sparsity.density import NetworkDensity


def model_with_everything():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 40, 3),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(40, 40, 3)),
        nn.Flatten(),
        nn.Linear(40, 5),
        nn.Embedding(7, 5),
    )


def test_agrees_with_sparsifys_report_edge_blocks_and_dense_layers_included():
    model = model_with_everything()
    total = 3 * 32 * 9 + 32 * 40 * 9 + 40 * 40 * 9 + 40 * 5
    report = ddst.sparsify(model, 0.3)
    network = NetworkDensity(model)
    assert network.total_weights == total
    assert len(network.layers) < 4  # some are left dense
    active = network.dense_weights + sum(int((l.dense_weight() != 0).sum()) for l in network.layers.values())  # noqa: E741
    assert network.active_weights == active
    assert network.density == pytest.approx(report.density)
    assert network.density == pytest.approx(0.3, abs=256 / total)


def test_follows_changes_of_masks():
    model = nn.Sequential(ddst.SparseLinear(32, 32, density=0.25))
    network = NetworkDensity(model)
    assert network.density == 0.25
    (layer,) = sparse_layers(model).values()
    layer.set_block_mask(torch.tensor([[True, True], [True, False]]))
    assert network.density == 0.75
    layer.load_state_dict(ddst.SparseLinear(32, 32, density=0.5).state_dict())
    assert network.density == 0.5


def test_networks_without_weights_or_without_sparse_layers_are_dense():
    assert NetworkDensity(nn.ReLU()).density == 1.0
    assert NetworkDensity(nn.Sequential(nn.Linear(4, 4))).density == 1.0


def test_a_shared_layer_counts_once():
    layer = ddst.SparseLinear(16, 16, density=1.0)
    assert NetworkDensity(nn.Sequential(layer, nn.ReLU(), layer)).total_weights == 256
