"""Weight memory falls with density: counted storage, and no dense weight-shaped tensor while training."""

import math
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ddst
from ddst.models.sngan import Discriminator, Generator
from ddst.nn import SparseLayer, sparse_layers
from ddst.sparsity import SparseTraining, network_stats


def trained(model, density, image, steps=7):
    """A few RigL steps with Adam and an average; returns the stats."""
    if density < 1:
        ddst.sparsify(model, density)
    adam = torch.optim.Adam(model.parameters(), betas=(0.0, 0.9))
    method = "rigl" if density < 1 else "static"
    training = SparseTraining(model, adam, method=method, total_steps=20, interval=3)
    ema = ddst.EMA(model)
    for _ in range(steps):
        adam.zero_grad()
        model(image).square().mean().backward()
        adam.step()
        training.step()
        ema.update()
    model(image).square().mean().backward()
    return network_stats(model, adam, ema.module)


@pytest.mark.parametrize("density", [0.1, 0.3])
@pytest.mark.parametrize("kind", ["generator", "discriminator"])
def test_values_gradients_adam_and_average_take_at_most_1_15_of_their_share(kind, density):
    def make():
        return Generator(16, 128, 3) if kind == "generator" else Discriminator(16, 128, 3)

    sample = torch.randn(2, 128) if kind == "generator" else torch.randn(2, 3, 16, 16)
    stats = trained(make(), density, sample)
    dense = trained(make(), 1.0, sample)
    assert stats.density == pytest.approx(density, rel=0.01)
    # The dense twin's bytes are counted here too, not only worked out.
    assert stats.memory.dense == dense.memory.total
    assert stats.memory.total <= 1.15 * density * dense.memory.total
    # Everything that scales with the weights does: values, gradients, two moments, the average.
    assert stats.memory.gradients == pytest.approx(stats.memory.values, rel=0.01)
    assert stats.memory.optimizer == pytest.approx(2 * stats.memory.values, rel=0.01)
    assert stats.memory.average == pytest.approx(stats.memory.values, rel=0.01)
    assert stats.memory.index <= 0.03 * stats.memory.total  # of the average and the spectral norms, too


def test_index_counts_masks_and_topologies_of_spectral_norms_and_of_the_average():
    model = network(spectral=True)
    average = ddst.EMA(model).module

    def of(net):
        layers = sparse_layers(net).values()
        own = sum(layer.slot_blocks.nbytes + layer.topology.nbytes for layer in layers)
        return own, sum(layer.spectral_norm.topology.nbytes for layer in layers)

    layers, norms = of(model)
    assert norms > 0
    assert network_stats(model).memory.index == layers + norms
    assert network_stats(model, average=average).memory.index == 2 * (layers + norms)


class Watch(TorchDispatchMode):
    """Notes the largest tensor any op returns, and the most large ones that live at once."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large, self.biggest, self.at_once = large, 0, 0
        self.alive: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.biggest = max(self.biggest, tensor.numel())
                if tensor.numel() >= self.large:
                    self.alive.add(tensor.untyped_storage())
        self.at_once = max(self.at_once, len(self.alive))
        return out


CHANNELS = 96
DENSE = CHANNELS * CHANNELS * 9  # activations are 2 · 96 · 4 · 4 = 3,072 numbers


def network(backend="auto", spectral=False):
    def conv():
        layer = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        return nn.utils.parametrizations.spectral_norm(layer) if spectral else layer

    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())
    ddst.sparsify(model, 0.1, backend=backend)
    return model


def watched_run(model, steps=4, method="rigl"):
    adam = torch.optim.Adam(model.parameters())
    training = SparseTraining(model, adam, method=method, total_steps=20, interval=3)
    ema = ddst.EMA(model)
    watches, reports = [], []
    for _ in range(steps):
        with Watch(DENSE // 2) as watch:
            adam.zero_grad()
            model(torch.randn(2, CHANNELS, 4, 4)).square().mean().backward()
            adam.step()
            reports.append(training.step())
            ema.update()
        watches.append(watch)
    assert reports[2].grown
    return watches


@pytest.mark.parametrize("spectral", [False, True])
def test_no_dense_weight_shaped_tensor_in_ordinary_steps_nor_at_updates(spectral):
    model = network(spectral=spectral)
    assert len(sparse_layers(model)) == 3
    for watch in watched_run(model):  # the third step makes an update
        assert 0 < watch.biggest < DENSE // 2
        assert watch.at_once == 0


def test_the_watch_sees_dense_weights_where_there_are_some():
    watches = watched_run(network("reference"))
    assert all(watch.biggest >= DENSE for watch in watches)
    assert max(watch.at_once for watch in watches) >= 1


def test_everything_held_between_steps_is_packed():
    model = network()
    watched_run(model, steps=3)
    layer = next(iter(sparse_layers(model).values()))
    held = [t for t in vars(layer)["_parameters"].values() if t is not None]
    assert not any(isinstance(t, torch.Tensor) for t in vars(layer)["_buffers"].values())
    held += [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]  # slot_blocks and topology
    held += [p.grad for p in held if p.grad is not None]
    assert isinstance(layer, SparseLayer)
    assert {id(layer.slot_blocks), id(layer.topology)} < {id(t) for t in held}
    assert max(t.untyped_storage().nbytes() // t.element_size() for t in held) == layer.nnz * 256
    assert layer.nnz * 256 == pytest.approx(0.1 * math.prod(layer.weight_shape), rel=0.05)
