"""Lazy regularisation: R1 and R2 at every k-th step of D, k times as heavy, and the same over k steps."""

import pytest
import torch
from torch import nn

from ddst.gan.losses import lazy_weight
from ddst.train import resolve
from ddst.train.game import Game
from ddst.train.options import ConfigError
from ddst.train.players import Players, gan_iteration


def gradient(game, step=0):
    """Of D's loss, in a step of D, on the same batches."""
    torch.manual_seed(0)
    discriminator = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 1), nn.Flatten(0)).double()
    real, fake = torch.randn(2, 6, 4, dtype=torch.float64)
    game.steps_of_d = step
    game.loss_of_d(discriminator, real, fake).backward()
    return torch.cat([p.grad.flatten() for p in discriminator.parameters() if p.grad is not None])


def test_over_k_steps_it_is_the_plain_form():
    settings = {"loss": "bce", "r1": 0.3, "r2": 0.7}
    none, plain = gradient(Game("bce")), gradient(Game(**settings))
    assert not torch.allclose(plain, none)
    assert torch.equal(gradient(Game(**settings, lazy=1), step=5), plain)
    steps = [gradient(Game(**settings, lazy=4), step) for step in range(8)]
    for step, found in enumerate(steps):
        torch.testing.assert_close(found - none, (plain - none) * (4 if step in (0, 4) else 0))
    torch.testing.assert_close(torch.stack(steps[:4]).mean(0), plain)


def test_the_iteration_counts_ds_steps(monkeypatch):
    """Of several batches for one step all have the penalty, or none."""
    networks = [nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))]
    optimizers = [torch.optim.Adam(net.parameters()) for net in networks]
    game, at = Game(r1=1.0, lazy=3, accumulate=2), []
    monkeypatch.setattr(
        "ddst.train.game.zero_centred_penalty", lambda score, x: at.append(game.steps_of_d) or score(x).sum() * 0
    )
    for _ in range(2):
        gan_iteration(Players(*networks, *optimizers, game), [torch.zeros(2, 4)] * 4, lambda: torch.zeros(2, 3))
    assert game.steps_of_d == 4 and at == [0, 0, 3, 3]


def test_what_it_takes():
    assert resolve({"out": "x", "r1": 1.0, "lazy": 16}).lazy == 16
    with pytest.raises(ConfigError, match="--lazy has no effect without --r1 or --r2"):
        resolve({"out": "x", "lazy": 16})
    for arguments, message in (((0, 0), "every must be at least 1"), ((-1, 4), "step must be at least 0")):
        with pytest.raises(ValueError, match=message):
            lazy_weight(*arguments)
