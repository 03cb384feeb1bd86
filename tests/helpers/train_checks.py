"""Runs on several ranks that stop and go on: of a loop of one's own, and of `ddst train` beside one process."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import ddst
from ddst.data import ImageSet
from ddst.train import run
from ddst.train.checkpoint import load_checkpoint
from ddst.train.config import resolve
from ddst.train.log import read_log
from ddst.train.loop import Trainer
from ddst.train.samples import generate
from helpers.rank_checks import assert_like_one, assert_ranks_equal, check, data, mine, network
from helpers.runs import TINY, checkpoint_of, differences, log_without_seconds

ALWAYS_GROW = (-2000000000, -1000000000)
# Topology updates at 2, 4 and 6, decisions at 3 and 6; 12 images for 1, 2, 3 processes.
SETTINGS: dict[str, Any] = {
    **TINY, "batch": 12, "d_steps": 1, "method": "ddst-relaxed", "bounds": ALWAYS_GROW, "steps": 8, "interval_g": 2,
    "interval_d": 3,
}  # fmt: skip
LAST = 7  # The step at which runs end here, one before their own end, where reports would be drawn.
# A run that goes on with another number of processes: number, and the step up to which it trains.
CHAIN = [(1, 1), (2, 3), (3, 6), (1, LAST)]

folder = Path()  # Of a group of processes, for what they leave.


class NormOfShares(nn.BatchNorm2d):
    """Normalises each share of the batch by itself; its running statistics are the first share's."""

    shares = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        first, *others = x.chunk(self.shares)
        return torch.cat([super().forward(first), *(self._normalised(other) for other in others)])

    def _normalised(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


@contextlib.contextmanager
def small() -> Iterator[None]:
    """In float64, where Adam makes no steps of what is rounding (the gradients of biases before a batch norm, of D's
    last one); and on images that take no package to read.
    """
    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddst.train.job.load_images", lambda *_, **__: images())
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def images() -> ImageSet:
    stored = torch.randint(256, (100, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet("noise", stored, 255.0)


def trained(code: int = 0, **given: Any) -> Trainer:
    """What `ddst train` with these settings has in this process at its end; a group of processes stays."""
    made: list[Trainer] = []

    def make(*arguments: Any) -> Trainer:
        made.append(Trainer(*arguments))
        return made[-1]

    with small(), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr("ddst.train.job.Trainer", make)
        patch.setattr("ddst.train.job.parted", lambda: None)
        assert run(given) == code
    if dist.is_initialized():
        dist.barrier()
    return made[0]


def one_process(phases: list[tuple[int, int]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The state, and the decisions, of one process that normalises like so many up to each of the steps."""
    config = resolve({**SETTINGS, "out": "unused"})
    decisions = []
    with small():
        trainer = Trainer(config, images())
        norms = [m for m in trainer.players.generator.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        for shares, last in phases:
            for norm in norms:
                norm.__class__, norm.shares = NormOfShares, shares
            while trainer.step < last:
                decision = trainer.train_step()[2].decision
                decisions += [] if decision is None else [decision.as_dict()]
    return trainer.state_dict(), decisions


def check_like_one(out: Path, phases: list[tuple[int, int]]) -> None:
    """The run in a folder has the masks and decisions of `one_process`, and its weights to rounding."""
    state, decisions = one_process(phases)
    theirs = load_checkpoint(out / "checkpoint.pt")
    logged = [entry for entry in read_log(out / "log.jsonl") if entry.get("event") == "decision"]
    assert [entry["action"] for entry in logged] == [entry["action"] for entry in decisions] == ["grow", "grow"]
    for name in ("noise", "torch", "step"):
        assert not differences(theirs[name], state[name])
    assert not differences(theirs["sampler"], state["sampler"])
    for net in ("generator", "discriminator"):
        assert any(name.endswith("slot_blocks") for name in state[net])
        for name, entry in state[net].items():
            torch.testing.assert_close(theirs[net][name], entry, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def assert_states_equal(trainer: Trainer) -> None:
    """All that all ranks hold, bit for bit: not the statistics of batch norm, which are each rank's own."""
    state = trainer.state_dict()
    for name in ("log", "seconds"):
        state.pop(name, None)
    for net in (state["generator"], state["ema"]["module"]):
        for name in [name for name in net if "running" in name]:
            del net[name]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    for other in states[1:]:
        assert not differences(other, states[0])


@check
def ddst_train() -> None:
    """All ranks end alike, and a run that was resumed with as many ends like one that was not, bit for bit."""
    whole = trained(**SETTINGS, stop_after=LAST, out=str(folder / "whole"))
    assert whole.step == LAST
    assert_states_equal(whole)
    trained(**SETTINGS, stop_after=6, out=str(folder / "parts"))
    parts = trained(resume=True, stop_after=LAST, out=str(folder / "parts"))
    assert_states_equal(parts)
    assert not differences(checkpoint_of(folder / "whole"), checkpoint_of(folder / "parts"))
    assert log_without_seconds(folder / "whole") == log_without_seconds(folder / "parts")


@check
def ddst_train_stopped_while_the_first_measures() -> None:
    """A signal to the last rank ends the first one's measurement, which the resumed run makes: bit for bit the same."""
    settings = {**SETTINGS, "metric_every": 3, "fd_samples": 1000, "stop_after": LAST}
    trained(**settings, out=str(folder / "measured"))
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    batches = 0

    def interrupted(*given: Any, before_batch: Any, **more: Any) -> Tensor:
        def before() -> None:
            nonlocal batches
            before_batch()
            batches += 1
            if batches == 1:
                os.kill(pids[-1], signal.SIGTERM)

        return generate(*given, before_batch=before, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddst.train.judging.generate", interrupted)
        stopped = trained(128 + signal.SIGTERM, **settings, out=str(folder / "stopped"))
    assert stopped.step == 3 and batches < 8 and stopped.best is None
    trained(resume=True, stop_after=LAST, out=str(folder / "stopped"))
    assert not differences(checkpoint_of(folder / "measured"), checkpoint_of(folder / "stopped"))
    entries = log_without_seconds(folder / "stopped")
    assert [entry["step"] for entry in entries if entry.get("event") == "metric"] == [3, 6]
    assert entries == log_without_seconds(folder / "measured")


@check
def ddst_train_goes_on() -> None:
    """A run that other numbers of processes began."""
    last = dict(CHAIN[1:3])[dist.get_world_size()]
    assert_states_equal(trained(resume=True, stop_after=last, out=str(folder / "chain")))


@check
def a_resumed_loop_is_bit_equal_on_two_ranks_and_to_rounding_on_more() -> None:
    """Reducers lay their buckets anew after the first step, and sums of three depend on the place in a bucket."""

    def begin(unused: bool) -> tuple[Any, ...]:
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        training = ddst.SparseTraining(model, optimizer, total_steps=30, interval=3)
        return DistributedDataParallel(model, find_unused_parameters=unused), model, optimizer, training

    def go(parts: tuple[Any, ...], steps: range) -> None:
        ddp, _, optimizer, training = parts
        for step in steps:
            optimizer.zero_grad()
            x = data(step)[mine()]
            (ddp(x) - x[:, :8]).square().mean().backward()
            optimizer.step()
            training.step()

    for unused in (False, True):
        whole = begin(unused)
        go(whole, range(5))
        saved = copy.deepcopy([part.state_dict() for part in whole[1:]])
        go(whole, range(5, 10))
        resumed = begin(unused)
        for part, state in zip(resumed[1:], saved, strict=True):
            part.load_state_dict(state)
        go(resumed, range(5, 10))
        assert_ranks_equal(resumed[1])
        if dist.get_world_size() == 2 or unused:
            assert not differences(resumed[1].state_dict(), whole[1].state_dict())
            assert not differences(resumed[2].state_dict(), whole[2].state_dict())
        else:
            assert_like_one(resumed[1], whole[1], atol=1e-6)
