"""``ddst train --distribution work``: the density is the share of multiply-adds of both networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddst.sparsity import FlopCounter
from ddst.train import resolve
from ddst.train.players import build_networks, make_sparse


@pytest.mark.parametrize("batch_norm", ["local", "synced"])
def test_the_density_is_the_share_of_multiply_adds(batch_norm: str) -> None:
    given = {"out": "unused", "resolution": 16, "width_g": 64, "density": 0.2, "density_d": 0.3}
    config = resolve({**given, "distribution": "work", "batch_norm": batch_norm})
    generator, discriminator = build_networks(config, 3)
    means = {name: buffer.clone() for name, buffer in generator.named_buffers()}
    make_sparse(config, generator, discriminator)
    for net, density, sample in (
        (generator, 0.2, torch.zeros(1, config.latent)),
        (discriminator, 0.3, torch.zeros(1, 3, 16, 16)),
    ):
        counter = FlopCounter(net, sample)
        assert counter.forward / counter.dense == pytest.approx(density, abs=0.01)
        assert all(module.training for module in net.modules() if not isinstance(module, nn.Identity))
    assert all(torch.equal(buffer, means[name]) for name, buffer in generator.named_buffers() if name in means)
