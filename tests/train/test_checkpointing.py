"""Activation checkpointing of dense networks: the numbers of those without, statistics and vectors updated once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ddst.models import Discriminator
from ddst.train.checkpointing import Checkpointed, as_before, checkpoint_blocks


class Listed(nn.Module):
    def __init__(self, container: type[nn.Module]) -> None:
        super().__init__()
        pairs = (nn.Sequential(nn.Conv2d(c, 4, 3), nn.BatchNorm2d(4), nn.ReLU()) for c in (3, 4))
        blocks = list(pairs)
        spectral_norm(blocks[1][0])
        self.blocks = container(*blocks) if container is nn.Sequential else container(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
def test_outputs_gradients_and_buffers_are_those_without(container: type[nn.Module]) -> None:
    torch.manual_seed(0)
    plain = Listed(container).double()
    saving = copy.deepcopy(plain)
    assert checkpoint_blocks(saving)
    assert all(isinstance(block, Checkpointed) for block in saving.blocks)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for network in (plain, saving):
        for _ in range(2):  # gradients add up, statistics move on
            network(x).square().sum().backward()
    names = [name for name, _ in plain.named_parameters()]
    for name, ours, theirs in zip(names, saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for (name, theirs), ours in zip(plain.named_buffers(), saving.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert int(saving.blocks[0].block[1].num_batches_tracked) == 2


def test_a_gradient_penalty_repeats_blocks_twice() -> None:
    torch.manual_seed(0)
    plain = Discriminator(16, 16, 1).double()
    saving = copy.deepcopy(plain)
    assert checkpoint_blocks(saving)
    images = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    gradients = []
    for network in (plain, saving):
        x = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_repeated_leaves_the_module_as_it_was_also_after_an_error() -> None:
    module = nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4, momentum=0.3))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def repeated() -> None:
        with as_before(module):
            module(torch.randn(2, 3, 4, 4))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        repeated()
    assert module[1].momentum == 0.3
    assert all(m.training for m in module.modules())
    after = dict(module.named_buffers())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_network_without_a_list_of_blocks_says_so() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    assert not checkpoint_blocks(network)
    assert isinstance(network[0], nn.Linear)
