"""Where an iteration's time goes: every layer is named, forward and backward, whoever runs what it computes."""

from pathlib import Path

import pytest
import torch
from torch import nn

import ddst
from ddst.data import load_images
from ddst.train import Trainer, resolve
from ddst.train.compare import time_of_layers
from ddst.train.layer_time import layer_times
from helpers.runs import differences, tiny


def test_passes_are_those_of_the_layer_that_they_are_of() -> None:
    body = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.AvgPool2d(2))
    model = nn.ModuleDict({"body": body, "dense": nn.Conv2d(16, 8, 1), "unused": nn.Linear(2, 2)})
    model.to(memory_format=torch.channels_last)
    ddst.sparsify(body, 0.5, block=8)
    ddst.fuse(body)
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    seen = []

    def iteration() -> None:
        # The convolution waits for its pool, which runs it, and is one operator with the norm in front of it.
        output = model["dense"](body(x))
        seen.append(output.detach())
        output.square().mean().backward()

    times = {time.layer: time for time in layer_times(iteration, {"generator": model})}
    assert {time.network for time in times.values()} == {"generator"}
    assert times.keys() == {"body.0", "body.2", "dense"}
    assert all(times[name].forward > 0 and times[name].backward > 0 for name in ("body.2", "dense"))
    assert 0 < sum(time.forward + time.backward for time in times.values()) < 1
    assert "forward" not in vars(body[2]) and torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("settings", [{}, {"method": "dense"}, {"model": "stylegan2", "r1": 1.0}], ids=str)
def test_a_run_knows_its_layers_and_is_left_as_it_is(tmp_path: Path, settings: dict[str, object]) -> None:
    trainer = Trainer(resolve(tiny(out=str(tmp_path), **settings)), load_images("digits", 8))
    before = trainer.state_dict()
    times = time_of_layers(trainer)
    assert differences(before, trainer.state_dict()) == []
    weights = {
        (network, name.rpartition(".")[0].removesuffix(".packed_weight").partition(".parametrizations.")[0])
        for network in ("generator", "discriminator")
        for name, _ in ddst.named_weights(getattr(trainer.players, network))
    }
    assert weights <= {(time.network, time.layer) for time in times}
    assert all(time.forward > 0 for time in times)
    backward = {(time.network, time.layer) for time in times if time.backward > 0}
    assert weights <= backward
    assert sum(time.forward + time.backward for time in times) < 1
