"""Figures of the averaged generator while it trains: when, of what, and the best one kept."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ddst
from ddst.data import load_images
from ddst.metrics import evaluate_embedded
from ddst.metrics.inception import Features
from ddst.metrics.judge import Judge
from ddst.train import Trainer, judging, report, resolve, run
from ddst.train.checkpoint import load_checkpoint
from ddst.train.log import read_log
from ddst.train.samples import generate
from helpers.runs import checkpoint_of, differences, log_without_seconds, tiny


def test_figures_are_logged_and_the_best_generator_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(tiny(out=str(out), metric_every=5)) == 0
    figures = [entry for entry in read_log(out / "log.jsonl") if entry.get("event") == "metric"]
    assert [entry["step"] for entry in figures] == [5, 10, 14]
    assert all(f["metric"] == "digits" and f["samples"] == 40 and f["real"] == 1797 for f in figures)
    assert all(f["split"] == "digits, training" and "classifier" in f["resizer"] for f in figures)
    assert 0 < figures[0]["flops"] < figures[1]["flops"] < figures[2]["flops"]
    assert 0 < figures[0]["seconds"] < figures[1]["seconds"] < figures[2]["seconds"]
    values = [f["value"] for f in figures]
    assert [f["best"] for f in figures] == [all(v < w for w in values[:i]) for i, v in enumerate(values)]

    # The last figure, by hand, is also that of the final table.
    noise = torch.randn(40, 16, generator=torch.Generator().manual_seed(3))
    by_hand = evaluate_embedded(load_images("digits", 8).batch(slice(None)), generate(ddst.load_generator(out), noise))
    assert values[-1] == pytest.approx(by_hand.distance, rel=1e-6)
    assert values[-1] == pytest.approx(json.loads((out / "summary.json").read_text())["quality"]["distance"])
    best = evaluate_embedded(
        load_images("digits", 8).batch(slice(None)), generate(ddst.load_generator(out / "best.safetensors"), noise)
    )
    assert best.distance == pytest.approx(min(values), rel=1e-6)
    assert load_checkpoint(out / "checkpoint.pt")["best"] == {"value": min(values), "measure": "digits of 40 samples"}


def test_the_best_by_another_measure_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(resolve(tiny(out=str(tmp_path))), load_images("digits", 8))
    written: list[bool] = []
    log = SimpleNamespace(write=lambda **entry: written.append(entry["best"]))
    kept: list[float] = []
    for settings, network, value in (
        ({}, None, 5.0),
        ({}, None, 6.0),
        ({"fd_samples": 41}, None, 6.0),  # fewer or more samples are another measure, too
        ({"inception": "file"}, "weights a", 90.0),
        ({"inception": "moved"}, "weights a", 91.0),
        ({"inception": "moved"}, "weights b", 92.0),
        ({}, None, 7.0),
    ):
        figure = SimpleNamespace(value=value, as_dict=dict)
        judge = _Known(network, figure)
        monkeypatch.setattr(judging, "Judge", lambda *given, judge=judge, **more: judge)
        trainer.config = dataclasses.replace(trainer.config, **{"fd_samples": 40, "inception": None, **settings})
        judging.Judging(trainer)(log)
        kept.append(trainer.best.value)
        state = trainer.state_dict()
        trainer.best = None
        trainer.load_state_dict({**state, "log": {"bytes": 1, "sha256": ""}})
    assert written == [True, False, True, True, False, True, True]
    assert kept == [5.0, 5.0, 6.0, 90.0, 90.0, 92.0, 7.0]


@dataclasses.dataclass
class _Known:
    """A judge whose network has a name and whose figure is known."""

    network: str | None
    figure: SimpleNamespace

    def __call__(self, parts: object) -> list[SimpleNamespace]:
        return [self.figure]


def test_an_interrupted_run_logs_the_same_figures(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(tiny(out=str(whole), metric_every=4)) == 0
    assert run(tiny(out=str(parts), metric_every=4, stop_after=9)) == 0
    assert run({"out": str(parts), "resume": True}) == 0
    assert log_without_seconds(parts) == log_without_seconds(whole)
    assert (parts / "best.safetensors").read_bytes() == (whole / "best.safetensors").read_bytes()


@pytest.mark.parametrize(("step", "number"), [(4, signal.SIGTERM), (8, signal.SIGINT), (14, signal.SIGTERM)])
@pytest.mark.parametrize("batch", [0, 1])
def test_a_stop_during_a_measurement_ends_it_and_the_resumed_run_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, number: int, batch: int
) -> None:
    """Before the first or after one of three batches; beside a sample grid, at --stop-after, and at the last step."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = tiny(metric_every=4, sample_every=4, fd_samples=300)
    monkeypatch.setattr("ddst.train.job._finish", lambda trainer: None)
    assert run({**settings, "out": str(whole)}) == 0
    told: list[int] = []

    class Stopping(Trainer):
        def train_step(self):
            if self.step == step - 1 and batch == 0:
                os.kill(os.getpid(), number)
            return super().train_step()

    def generate_and_stop(generator, noise, labels, before_batch):
        def before() -> None:
            before_batch()
            told.append(trainer.step)
            if 0 < batch == told.count(step):
                os.kill(os.getpid(), number)

        return generate(generator, noise, labels=labels, before_batch=before)

    def made(*given) -> Trainer:
        nonlocal trainer
        trainer = Stopping(*given)
        return trainer

    trainer: Any = None
    with monkeypatch.context() as patch:
        patch.setattr(judging, "generate", generate_and_stop)
        patch.setattr("ddst.train.job.Trainer", made)
        assert run({**settings, "out": str(parts), "stop_after": 8}) == (128 + number if step <= 8 else 0)
        if step > 8:
            assert run({"out": str(parts), "resume": True}) == 128 + number
    assert told.count(step) == batch
    assert load_checkpoint(parts / "checkpoint.pt")["step"] == step
    assert [e["step"] for e in read_log(parts / "log.jsonl") if e.get("event") == "metric"] == [
        each for each in (4, 8, 12) if each < step
    ]
    assert run({"out": str(parts), "resume": True}) == 0
    assert log_without_seconds(parts) == log_without_seconds(whole)
    assert differences(checkpoint_of(parts), checkpoint_of(whole)) == []
    assert (parts / "best.safetensors").read_bytes() == (whole / "best.safetensors").read_bytes()


def test_a_figure_that_a_stop_left_out_is_made_again_until_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by other settings, if the step is one of theirs; one that was made is not made again."""
    out, again = tmp_path / "run", {"out": str(tmp_path / "run"), "resume": True}

    def figures() -> list[int]:
        return [entry["step"] for entry in read_log(out / "log.jsonl") if entry.get("event") == "metric"]

    def stopped(*given, before_batch, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return generate(*given, before_batch=before_batch, **more)

    with monkeypatch.context() as patch:
        patch.setattr(judging, "generate", stopped)
        assert run(tiny(out=str(out), metric_every=4)) == 143
        assert run(again) == 143
    assert figures() == [] and load_checkpoint(out / "checkpoint.pt")["step"] == 4
    assert run({**again, "metric_every": 3, "stop_after": 5}) == 0
    assert figures() == []
    assert run({**again, "metric_every": 5, "stop_after": 6}) == 0
    assert run({**again, "metric_every": 6, "stop_after": 6}) == 0
    assert run({**again, "metric_every": 1, "stop_after": 6}) == 0
    assert figures() == [5, 6]


def test_a_network_is_stopped_between_its_batches_of_real_images_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Network:
        def __init__(self, *given) -> None:
            self.digest = "made"

        def features(self, parts) -> Features:
            pool = torch.cat([part.flatten(1)[:, :4].double() for part in parts])
            return Features(pool, pool)

    monkeypatch.setattr("ddst.metrics.judge.Inception", Network)
    left = 100

    def before_batch() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise InterruptedError

    images = load_images("digits", 8)
    judge = Judge(["fid"], images, "training", weights=Path("any"), before_batch=before_batch)
    fake = [torch.randn(130, 1, 8, 8, generator=torch.Generator().manual_seed(0))]
    (figure,) = judge(fake)
    assert left == 100 - 3 - 29  # of 64 of 130 and of 1,797
    assert judge(fake) == [figure] and left == 100 - 3 - 29 - 3
    for last in (2, 5):
        left = last
        with pytest.raises(InterruptedError):
            Judge(["fid"], images, "training", weights=Path("any"), before_batch=before_batch)(fake)


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    often, never = tmp_path / "often", tmp_path / "never"
    assert run(tiny(out=str(often), metric_every=1)) == 0
    assert run(tiny(out=str(never), metric_every=0)) == 0
    assert not (never / "best.safetensors").exists()
    a, b = (ddst.load_generator(out).state_dict() for out in (often, never))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_classes_come_in_turn_through_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model": "biggan", "latent": 8, "fd_samples": 4102, "out": str(tmp_path)}
    trainer = Trainer(resolve(tiny(**settings)), load_images("digits", 8))
    judge, given = judging.Judging(trainer), []
    trainer.step = trainer.config.steps
    figure = SimpleNamespace(value=1.0, as_dict=dict)
    monkeypatch.setattr(judge, "_judge", lambda parts: [figure for _ in [list(parts)]])
    monkeypatch.setattr(report, "evaluate_embedded", lambda real, parts, data: list(parts))
    for module in (judging, report):
        monkeypatch.setattr(module, "generate", lambda generator, noise, labels, **more: given.append(labels))
    judge(SimpleNamespace(write=lambda **entry: None))
    report._quality(trainer)
    assert [len(labels) for labels in given] == [4096, 6] * 2  # 4,096 is no multiple of ten
    assert torch.cat(given).tolist() == [i % 10 for i in range(4102)] * 2
