"""Signs of collapse: from made logs and made samples, and in a run's log, last line and page."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ddst.cli import main
from ddst.data import load_images
from ddst.train import collapse, run
from ddst.train.collapse import MOST_REAL, CollapseWatch, classes_of, spread, told, watched
from ddst.train.log import read_log
from helpers.runs import log_without_seconds, tiny

BOUNDS = (0.45, 0.55)


def steps(ratios: list[float | None], first: int = 1) -> list[dict]:
    return [{"step": step, "balance_ratio": ratio} for step, ratio in enumerate(ratios, first)]


def shares(step: int, *values: float) -> dict:
    return {"event": "metric", "step": step, "more": {"shares": list(values)}}


def grid(step: int, value: float) -> dict:
    return {"event": "samples", "step": step, "spread": value}


def test_spread_is_the_mean_over_pairs_of_pictures():
    images = torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = [(images[i] - images[j]).square().mean() for i in range(7) for j in range(7) if i != j]
    assert spread(images) == pytest.approx(math.sqrt(sum(pairs) / len(pairs)), rel=1e-12)
    assert spread(images[:1].expand(9, -1, -1, -1)) == 0 == spread(images[:1])


def test_real_digits_one_class_and_one_picture():
    images = load_images("digits", 16)
    real = spread(images.batch(slice(None)))
    one_class = [spread(images.batch((images.labels == k).nonzero().squeeze(1))) / real for k in range(10)]
    assert 0.5 < min(one_class) < max(one_class) < 1
    noisy = images.batch(slice(0, 1)) + 0.02 * torch.randn(100, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert spread(noisy) / real < 0.1
    assert len(images) > MOST_REAL
    assert classes_of([0.1] * 10) == pytest.approx(10)
    assert classes_of([0.9, 0.1]) < 2 < classes_of([0.6, 0.2, 0.2])


def test_a_ratio_above_one_for_an_eighth_of_the_run():
    assert watched(steps([0.9] * 80), BOUNDS, steps=80).found == []  # as healthy runs of small networks have it
    watch = watched(steps([0.5] * 15 + [1.2] * 9 + [0.5] + [1.1] * 10 + [0.5]), BOUNDS, steps=80)
    assert [(s.step, s.sign, s.begins, s.value) for s in watch.found] == [
        (35, "weak discriminator", True, 10), (36, "weak discriminator", False, 0)
    ]  # fmt: skip
    assert not watch.collapsed and watch.standing == {}
    assert "above 1.00 for 10 steps" in told(watch)
    # A bound that is met is not passed; a window without a ratio neither begins nor ends it.
    assert watched(steps([1.0] * 40), BOUNDS, 80).found == []
    assert watched(steps([None] * 40), BOUNDS, 80).found == []
    assert [s.step for s in watched(steps([1.6] * 5 + [None] * 5, first=20), BOUNDS, 80).found] == [29]
    assert watched(steps([1.2] * 40), (0.9, 1.3), 80).found == []


def test_pictures_say_that_a_run_has_collapsed_and_that_it_has_not():
    healthy = [shares(50, *[0.1] * 10), grid(50, 0.9)]
    assert told(watched(healthy, BOUNDS, 100)) == "no sign of collapse"
    one_class = watched([*healthy, shares(60, 0.97, 0.03)], BOUNDS, 100)
    assert one_class.collapsed and list(one_class.standing) == ["one class"]
    assert told(one_class) == "collapsed: one class from step 60 (samples hold 1.14 classes, below 2)"
    one_picture = watched([*healthy, grid(60, 0.05), grid(70, 0.04)], BOUNDS, 100)
    assert one_picture.collapsed and [s.step for s in one_picture.found] == [60]
    recovered = watched([grid(60, 0.05), grid(70, 0.5)], BOUNDS, 100)
    assert not recovered.collapsed
    assert told(recovered).startswith("signs of collapse, none in the last pictures: one picture from step 60 (")
    assert told(recovered).endswith("; one picture until step 70")


def test_nothing_is_said_of_an_untrained_generator_and_of_damaged_entries():
    assert watched([shares(12, 1.0, 0.0), grid(12, 0.0), *steps([0.9] * 12)], BOUNDS, 96).found == []
    odd = [{"event": "metric", "step": 50, "more": more} for more in (None, {}, {"shares": 3}, {"shares": ["a", -1]})]
    assert watched([*odd, {"event": "samples", "step": 50, "spread": None}], BOUNDS, 96).found == []


def test_a_run_says_so_in_its_log_its_last_line_and_its_page(tmp_path: Path, capsys, monkeypatch):
    """Every ratio is above this limit. Of a run in parts the log is that of the whole one."""
    monkeypatch.setattr(collapse, "SMALLEST_RATIO", -10.0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = tiny(bounds=(-2e9, -20.0), metric_every=0)
    assert run({**settings, "out": str(whole)}) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "collapse" in line)
    entries = list(read_log(whole / "log.jsonl"))
    grids = [e for e in entries if e.get("event") == "samples"]
    assert [e["step"] for e in grids] == [6, 12, 14] and all(0.2 < e["spread"] < 1 for e in grids)
    sign = {"step": 2, "sign": "weak discriminator", "begins": True, "value": 2.0, "limit": -10.0}
    assert [e for e in entries if e.get("event") == "collapse"] == [{"event": "collapse", **sign}]
    said = (
        "none in the last pictures: weak discriminator from step 2 (the balance ratio has been above -10.00 for 2 steps"
    )
    assert said in line
    assert run({**settings, "out": str(parts), "stop_after": 3}) == 0
    assert run({"out": str(parts), "resume": True}) == 0
    assert log_without_seconds(parts) == log_without_seconds(whole)
    page = tmp_path / "page.html"
    assert main(["report", str(whole), "--out", str(page)]) == 0
    assert "<p>Signs of collapse, none in the last pictures: weak discriminator from step 2 (" in page.read_text()


def test_a_watch_needs_no_more_than_the_log(tmp_path: Path):
    watch = CollapseWatch(BOUNDS, 8)
    for entry in (grid(2, 0.1), {"event": "start", "settings": {}}, grid(3, 0.1)):
        watch.see(entry)
    assert [s.as_dict() for s in watch.found] == [
        {"step": 2, "sign": "one picture", "begins": True, "value": 0.1, "limit": 0.2}
    ]
