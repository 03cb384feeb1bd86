"""Slots set aside for a density to come: a density steered below it makes no new tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ddst
from ddst.nn import sparse_layers
from ddst.sparsity import TopologyUpdater


def model_with(reserve: float | None) -> tuple[nn.Sequential, ddst.convert.SparsifyReport]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(512, 64)
    )
    return model, ddst.sparsify(model, 0.2, block=8, reserve=reserve)


@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_a_density_steered_within_the_reserve_makes_no_new_tensors(growth):
    model, _ = model_with(0.6)
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    updater = TopologyUpdater(model, adam, growth=growth)
    layers = sparse_layers(model).values()
    places = [(layer.values.data_ptr(), layer.topology.data_ptr()) for layer in layers]
    reached = []
    for step, target in enumerate([0.4, 0.6, 0.3, 0.6, 0.2, 0.5], 1):
        updater.scores.request()
        adam.zero_grad()
        model(torch.randn(4, 16, 6, 6)).square().mean().backward()
        adam.step()
        updater.change_density(target, step)
        reached.append(updater.density)
        assert all(layer.nnz <= layer.slots for layer in layers)
    assert reached == pytest.approx([0.4, 0.6, 0.3, 0.6, 0.2, 0.5], abs=updater.resolution * 2)
    assert [layer.storage_version for layer in layers] == [0, 0, 0]
    assert [(layer.values.data_ptr(), layer.topology.data_ptr()) for layer in layers] == places
    free = [layer.values[layer.slot_blocks < 0] for layer in layers]
    assert sum(values.numel() for values in free) > 0
    assert not any(values.any() for values in free)


def test_beyond_the_reserve_a_layer_is_enlarged():
    model, _ = model_with(0.3)
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    updater = TopologyUpdater(model, adam, growth="random")
    updater.change_density(0.5)
    assert updater.density == pytest.approx(0.5, abs=updater.resolution * 2)
    assert sum(layer.storage_version for layer in sparse_layers(model).values()) >= 1


def test_the_report_counts_idle_slots():
    model, report = model_with(0.6)
    for layer in report.layers:
        sparse = model.get_submodule(layer.name)
        assert layer.slots == sparse.slots > layer.blocks == sparse.nnz
        assert f"{layer.slots - layer.blocks} slots in reserve" in str(report)
    _, plain = model_with(None)
    assert "in reserve" not in str(plain)
