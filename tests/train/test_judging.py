"""Figures of the averaged generator while it trains: when, of what, and the best one kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ddst
from ddst.data import load_images
from ddst.metrics import evaluate_embedded
from ddst.train import Trainer, judging, report, resolve, run
from ddst.train.checkpoint import load_checkpoint
from ddst.train.log import read_log
from ddst.train.samples import generate
from helpers.runs import log_without_seconds, tiny


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
        monkeypatch.setattr(module, "generate", lambda generator, noise, labels: given.append(labels))
    judge(SimpleNamespace(write=lambda **entry: None))
    report._quality(trainer)
    assert [len(labels) for labels in given] == [4096, 6] * 2  # 4,096 is no multiple of ten
    assert torch.cat(given).tolist() == [i % 10 for i in range(4102)] * 2
