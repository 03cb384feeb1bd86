"""`ddst.capture`, on a pretended device whose graphs run their operators again: a GAN's step over blocks that move."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddst
from ddst import captured_step
from ddst.nn import sparse_layers
from helpers import fake_cuda


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda.pretended(monkeypatch):
        monkeypatch.setattr(captured_step, "_on_device", lambda parameter: True)
        yield


class Game:
    """A small GAN whose step computes the same with and without a graph."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.g = nn.Sequential(ddst.SparseLinear(16, 32, density=0.5, reserve=0.75), nn.ReLU(), nn.Linear(32, 16))
        self.d = nn.Sequential(ddst.SparseConv2d(16, 32, 1, density=0.5), nn.ReLU(), nn.Flatten(), nn.Linear(32, 1))
        self.layers = [*sparse_layers(self.g).values(), *sparse_layers(self.d).values()]
        self.opt_g, self.opt_d = (torch.optim.Adam(net.parameters(), 1e-3, fused=True) for net in (self.g, self.d))
        self.steps = 0

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.g, self.d, self.opt_g, self.opt_d

    def step(self, real: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        fake = self.g(torch.randn(real.shape[0], 16))[:, :, None, None]
        self.opt_d.zero_grad()
        loss_d = (1 - self.d(real)).relu().mean() + (1 + self.d(fake.detach())).relu().mean()
        loss_d.backward()
        self.opt_d.step()
        self.opt_g.zero_grad()
        loss_g = -self.d(fake).mean()
        loss_g.backward()
        self.opt_g.step()
        return {"d": loss_d.detach(), "g": loss_g.detach()}

    def state(self) -> list[Tensor]:
        return [p.detach().clone() for net in (self.g, self.d) for p in net.parameters()]


def play(change: Callable[[Game, int], None], captured: bool, calls: int = 9) -> tuple[Game, Any, list[Tensor]]:
    """Calls with a change before each; losses and parameters afterwards."""
    game = Game()
    step: Any = ddst.capture(game.step, *game.parts) if captured else game.step
    torch.manual_seed(1)
    losses = []
    for call in range(calls):
        change(game, call)
        losses += [loss.clone() for loss in step(torch.randn(4, 16, 1, 1)).values()]
    return game, step, [*losses, *game.state()]


def same(change: Callable[[Game, int], None], calls: int = 9) -> tuple[Game, Any]:
    """The game of captured calls, after it was found equal to that of plain ones."""
    _, _, expected = play(change, False, calls)
    game, step, found = play(change, True, calls)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    return game, step


def move(game: Game, call: int) -> None:
    """An exchange at equal count in every layer."""
    if call in (5, 7):
        for layer in game.layers:
            layer.set_block_mask(layer.block_mask.flip(0).logical_not() if call == 5 else layer.block_mask.flip(1))


def test_three_calls_run_as_they_are_and_the_others_are_one_graph(device: None) -> None:
    game, step = same(lambda game, call: None)
    assert (step.captures, step.replays, game.steps) == (1, 6, 4)
    (graph,) = fake_cuda.Graph.made
    for name in ("ddst::conv2d", "ddst.linear_weight_grad", "_fused_adam_"):
        assert any(name.replace("::", ".") in operator for operator in graph.operators), graph.operators
    assert sum("_fused_adam_" in operator for operator in graph.operators) == 2


def test_blocks_move_and_their_number_changes_without_another_capture(device: None) -> None:
    def change(game: Game, call: int) -> None:
        move(game, call)
        if call == 6:  # within the reserve
            mask = torch.zeros_like(game.layers[0].block_mask)
            mask[:, 0] = True
            mask[0] = True
            game.layers[0].set_block_mask(mask)

    game, step = same(change)
    assert step.captures == 1 and game.layers[0].mask_version > 1
    assert game.layers[0].storage_version == 0


def test_storage_that_grows_is_captured_anew_counted_and_logged(device: None, caplog: pytest.LogCaptureFixture) -> None:
    def change(game: Game, call: int) -> None:
        if call == 5:
            for layer, optimizer in ((game.layers[0], game.opt_g), (game.layers[1], game.opt_d)):
                ddst.carry_state(optimizer, layer.values, layer.set_block_mask(torch.ones_like(layer.block_mask)))

    with caplog.at_level(logging.INFO, "ddst"):
        _, step = same(change)
    assert step.captures == 2
    assert "captured anew: the storage of packed values changed" in caplog.text
    assert "captured as a CUDA graph, the 2. time" in caplog.text


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda game: game.g.eval(), "modes or backends of modules"),
        (lambda game: game.opt_d.param_groups[0].update(lr=0.1), "settings of an optimizer"),
        (lambda game: game.d[3].bias.requires_grad_(False), "which parameters are trained"),
    ],
)
def test_what_is_in_a_graph_for_good_makes_another(
    device: None, caplog: pytest.LogCaptureFixture, change: Callable[[Game], Any], why: str
) -> None:
    with caplog.at_level(logging.INFO, "ddst"):
        _, step = same(lambda game, call: change(game) if call == 5 else None)
    assert step.captures == 2 and f"captured anew: {why} changed" in caplog.text


def test_scores_are_recorded_by_calls_without_a_graph(device: None) -> None:
    def change(game: Game, call: int) -> None:
        if call == 5:
            for layer in game.layers:
                layer.request_scores()
        if call == 6:
            for layer in game.layers:
                assert layer.scores_recorded
                layer.cancel_scores()

    game, step = same(change)
    assert (step.captures, step.replays, game.steps) == (1, 5, 5)
    gradients = [p.grad for p in game.g.parameters()]
    before = copy.deepcopy(gradients)
    step(torch.randn(4, 16, 1, 1))
    assert not all(torch.equal(*pair) for pair in zip(gradients, before, strict=True))  # those of the graph


def test_another_shape_runs_without_the_graph_that_stays(device: None) -> None:
    game = Game()
    step = ddst.capture(game.step, *game.parts, warmups=1)
    for count in (4, 4, 3, 4):
        assert step(torch.randn(count, 16, 1, 1))["d"].dim() == 0
    assert (step.captures, step.replays, game.steps) == (1, 2, 3)


def test_a_step_that_waits_for_the_device_is_refused_and_can_be_called_again(device: None) -> None:
    game = Game()
    waiting = [True]

    def step(real: Tensor) -> Tensor:
        loss = game.step(real)["d"]
        if waiting[0]:
            loss.item()
        return loss

    captured = ddst.capture(step, *game.parts, warmups=1)
    captured(torch.randn(4, 16, 1, 1))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captured(torch.randn(4, 16, 1, 1))
    waiting[0] = False
    captured(torch.randn(4, 16, 1, 1))
    assert (captured.captures, captured.replays) == (0, 0)
    captured(torch.randn(4, 16, 1, 1))
    assert (captured.captures, captured.replays) == (1, 1)


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="step must be a function, got int"):
        ddst.capture(3, net)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"parts must be torch\.nn\.Modules and torch\.optim\.Optimizers, got 'G'"):
        ddst.capture(print, "G")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parts must hold the modules that step uses, got none"):
        ddst.capture(print)
    with pytest.raises(ValueError, match="warmups must be at least 1, got 0"):
        ddst.capture(print, net, warmups=0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="torch sees no CUDA device here"):
            ddst.capture(print, net)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(RuntimeError, match="parts must be on a CUDA device, got parameters on cpu"):
            ddst.capture(print, net)
