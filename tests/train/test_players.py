"""The optimizers of a run."""

import copy

import torch

from ddst.data import load_images
from ddst.train import Trainer, resolve
from ddst.train.players import discriminator_backward, generator_backward
from helpers.runs import TINY


def test_the_fused_steps_of_a_run_are_adams_steps(tmp_path):
    """Both networks are channels_last, sparse layers beside dense ones; fused Adam counts on strides of gradients."""
    config = resolve({**TINY, "out": str(tmp_path / "run")})
    players = Trainer(config, load_images("digits", 8)).players
    torch.manual_seed(0)
    real = torch.randn(4, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    for net, optimizer in (
        (players.discriminator, players.optimizer_d),
        (players.generator, players.optimizer_g),
    ):
        assert optimizer.defaults["fused"] is True
        twin = copy.deepcopy(net)
        settings = {name: optimizer.defaults[name] for name in ("lr", "betas")}
        plain = torch.optim.Adam(twin.parameters(), **settings, foreach=False)
        for _ in range(3):
            if net is players.discriminator:
                discriminator_backward(players, real, torch.randn(4, config.latent))
            else:
                generator_backward(players, torch.randn(4, config.latent))
            for one, other in zip(net.parameters(), twin.parameters(), strict=True):
                # The stride of a dimension of one says nothing.
                assert [s for s, n in zip(one.grad.stride(), one.shape, strict=True) if n > 1] == [
                    s for s, n in zip(one.stride(), one.shape, strict=True) if n > 1
                ]
                other.grad = one.grad.clone()
            optimizer.step()
            plain.step()
        for (name, one), other in zip(net.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
