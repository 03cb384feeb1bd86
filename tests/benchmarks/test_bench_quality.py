"""The study of distributions: equal multiply-adds, runs that are made once, and the numbers of its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddst.benchmarks import quality_of_distributions as study
from ddst.benchmarks.quality_of_distributions import Run
from ddst.benchmarks.report import MARKERS
from ddst.train import resolve
from ddst.train.players import build_networks

SMALL = {"resolution": 16, "width_g": 64, "width_d": 64}


def test_every_distribution_has_erks_multiply_adds() -> None:
    config = resolve({**study.settings_of("static", 0, 10, 0.3), **SMALL})
    reports = {}
    for distribution in study.DISTRIBUTIONS:
        reports[distribution] = study.make_sparse(config, *build_networks(config, 1), distribution)
    for erk, work in zip(*(reports[name] for name in ("erk", "work")), strict=True):
        layers = [row.multiply_adds for row in erk.layers]
        one_block = max(256 * row.multiply_adds / row.size for row in erk.layers if row.reason is None) / sum(layers)
        assert [row.multiply_adds for row in work.layers] == layers
        assert work.multiply_adds_left == pytest.approx(erk.multiply_adds_left, abs=2 * one_block)
        # What is left of a layer's multiply-adds follows ERK's sum.
        assert [row.blocks for row in work.layers] != [row.blocks for row in erk.layers]
        left = [row.density * row.multiply_adds / sum(row.shape) for row in work.layers if row.blocks > 20]
        assert len(left) > 1 and max(left) < 1.15 * min(left)


def test_runs_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def train_once(*key: Any) -> Run:
        made.append(key)
        return Run(*key, 0.1, 0.1, 0.1, 0.1, 0.1, float(len(made)), 1.0)

    monkeypatch.setattr(study, "train_once", train_once)
    kept = tmp_path / "runs.jsonl"
    arguments = (["static"], study.DISTRIBUTIONS, 2, 10, 0.1, kept)
    runs = list(study.all_runs(*arguments))
    assert [key[1:3] for key in made] == [("erk", 0), ("work", 0), ("erk", 1), ("work", 1)]
    assert [(run.distribution, run.seed, run.distance) for run in runs] == [
        ("erk", 0, 1.0), ("work", 0, 2.0), ("erk", 1, 3.0), ("work", 1, 4.0)
    ]  # fmt: skip
    assert list(study.all_runs(*arguments)) == runs and len(made) == 4
    list(study.all_runs(["static"], ["erk"], 1, 11, 0.1, kept))
    assert len(made) == 5
    kept.write_text('{"method": "static"}\n')
    with pytest.raises(ValueError, match="line 1 is no run of this program"):
        list(study.all_runs(*arguments))


def test_differences_are_paired_by_seed() -> None:
    def run(distribution: str, seed: int, distance: float) -> Run:
        return Run("static", distribution, seed, 10, 0.1, 0.05, 0.1, 0.1, 0.2, 0.07, distance, 9.0)

    runs = [run("erk", 0, 50.0), run("work", 0, 51.0), run("erk", 1, 90.0), run("work", 1, 92.0)]
    runs += [run("erk", 2, 70.0), run("work", 2, 73.0)]
    text = study.tables(runs)
    assert "| static | work | 0.0500, 0.1000 | 0.1000, 0.2000 | 0.0700 | 72.00 | +2.00 (-0.48 to +4.48) |" in text
    assert "| static | erk | 0.0500, 0.1000 | 0.1000, 0.2000 | 0.0700 | 70.00 | - |" in text
    assert "seeds 0, 1, 2" in text
    assert study.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


def test_the_command_puts_the_table_of_kept_runs_between_markers(tmp_path: Path) -> None:
    kept, page = tmp_path / "runs.jsonl", tmp_path / "page.md"
    runs = [Run("static", name, seed, 10, 0.1, 0.05, 0.1, 0.1, 0.2, 0.07, 50.0 + seed, 9.0) for seed in (0, 1)
            for name in study.DISTRIBUTIONS]  # fmt: skip
    kept.write_text("".join(json.dumps(run._asdict()) + "\n" for run in runs))
    page.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    line = ["--method", "static", "--seeds", "2", "--steps", "10", "--json", str(kept), "--markdown", str(page)]
    assert study.main(line) == 0
    assert page.read_text() == f"before\n{MARKERS[0]}\n{study.tables(runs)}\n{MARKERS[1]}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(SystemExit) as ended:
        study.main(line)
    assert ended.value.code == 2 and page.read_text() == "nothing"


def test_a_run_trains_the_networks_of_its_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {**SMALL, "batch": 4, "fd_samples": 100, "resolution": 8, "br_window": 2}
    monkeypatch.setattr(study, "SETTINGS", {**study.SETTINGS, **tiny})
    before = torch.get_num_threads()
    run = study.train_once("static", "work", 0, 2, 0.3)
    torch.set_num_threads(before)
    assert run.key == ("static", "work", 0, 2, 0.3)
    assert run.distance > 0 and 0 < run.flops < 1
    assert run.density_g > 0.3 and run.multiply_adds_g < 0.3
