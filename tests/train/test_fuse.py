"""--fuse: the networks of a run are fused by default, and train as they would without."""

from __future__ import annotations

import pytest
import torch

from ddst.cli import build_parser
from ddst.data import load_images
from ddst.nn import sparse_layers
from ddst.train.config import resolve
from ddst.train.loop import Trainer
from ddst.train.players import discriminator_backward, generator_backward
from helpers.runs import TINY


def trainer_for(**settings: object) -> Trainer:
    config = resolve({**TINY, "out": "unused", **settings})
    return Trainer(config, load_images(config.data, config.resolution))


def planned(trainer: Trainer) -> list[str]:
    nets = {"g": trainer.players.generator, "d": trainer.players.discriminator}
    return [
        f"{which}.{name}"
        for which, net in nets.items()
        for name, layer in sparse_layers(net).items()
        if getattr(layer, "plan", None) is not None
    ]


def test_fused_unless_told_otherwise() -> None:
    assert {"g.blocks.0.conv2", "d.blocks.0.conv2", "d.blocks.3.conv2"} <= set(planned(trainer_for()))
    assert planned(trainer_for(fuse=False)) == []
    assert planned(trainer_for(method="dense")) == []


@pytest.mark.parametrize(
    ("words", "expected"), [([], {}), (["--no-fuse"], {"fuse": False}), (["--fuse"], {"fuse": True})]
)
def test_the_option(words: list[str], expected: dict[str, bool]) -> None:
    given = vars(build_parser()[0].parse_args(["train", *words]))
    assert {name: value for name, value in given.items() if name != "command"} == expected


def test_the_gradients_are_those_of_the_parts() -> None:
    """In float64: to rounding."""
    gradients = []
    for fuse in (True, False):
        players = trainer_for(fuse=fuse).players
        for net in (players.generator, players.discriminator):
            net.double()
        g = torch.Generator().manual_seed(0)
        real = torch.rand(4, 1, 8, 8, dtype=torch.float64, generator=g) * 2 - 1
        noise = torch.randn(4, 16, dtype=torch.float64, generator=g)
        torch.manual_seed(1)
        discriminator_backward(players, real, noise)
        found = [p.grad.clone() for p in players.discriminator.parameters() if p.grad is not None]
        generator_backward(players, noise)
        gradients.append([*found, *(p.grad for p in players.generator.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) > 20
    for fused, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, parts, rtol=1e-9, atol=1e-9)
