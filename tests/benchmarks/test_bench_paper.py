"""The paper's table: which runs, in which order, resumed after a kill; its figures by hand; a tiny run of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddst.benchmarks import paper
from ddst.benchmarks.paper import one_run
from ddst.benchmarks.paper.estimates import Clock, Estimate, Runs, at_equal_seconds, goals, verdicts
from ddst.benchmarks.paper.page import page
from ddst.benchmarks.paper.plan import METHODS, PARTS, Cell, plan
from ddst.benchmarks.paper.published import DISTANCES, rank, settled
from ddst.benchmarks.paper.timing import time_rows
from ddst.gan import PRESETS
from ddst.train import resolve
from ddst.train.log import read_log
from helpers.runs import checkpoint_of, differences

TINY = [("resolution", "8"), ("width_g", "16"), ("width_d", "16"), ("latent", "16"), ("batch", "4"),
        ("fd_samples", "40"), ("br_window", "2"), ("compare_steps", "1"), ("checkpoint_every", "1"),
        ("block", "4x4")]  # fmt: skip


def in_this_process(arguments: Sequence[str], output: Path, look: Callable[[], None]) -> int:
    from ddst.cli import main

    look()
    return main(["train", *arguments])


@pytest.fixture(autouse=True)
def _threads_put_back():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_the_goal_row_comes_first_seed_by_seed_then_ten_and_thirty_percent():
    cells = plan(PARTS[:-1])
    assert len(set(cells)) == len(cells) == len({cell.name for cell in cells})
    assert [(c.method, c.seed) for c in cells[:15]] == [
        (method, seed) for seed in range(5) for method in ("dense", "static", "ddst-relaxed")
    ]
    assert all(c.data == "digits" and c.steps == 3000 for c in cells[:15])
    assert {c.block for c in cells[:15]} == {None, (16, 16)} and {c.density for c in cells[:15]} == {None, 0.1}
    digits = plan(["goal", "digits"])
    assert cells[: len(digits)] == digits
    assert [d for d in dict.fromkeys(c.density for c in digits) if d] == [0.1, 0.3]
    # Every method, both blocks, three seeds; dense once a seed.
    for density in (0.1, 0.3):
        for block in ((16, 16), (1, 1)):
            rows = [(c.method, c.seed) for c in digits if (c.density, c.block) == (density, block) and c.seed < 3]
            assert sorted(rows) == sorted((m, s) for m in METHODS[1:] for s in range(3))
    rest = cells[len(digits) :]
    assert [c.method for c in rest[:17]] == ["sdst-rigl"] * 17  # three of its 20 seeds are there already
    assert {(c.data, c.density) for c in cells if c.density} == {
        (data, d) for data in ("digits", "shapes") for d in (0.1, 0.2, 0.3, 0.5)
    }


def test_every_method_is_there_once_and_every_cell_can_be_trained():
    assert len(METHODS) == len({str(PRESETS[m]) for m in METHODS}) == len({str(p) for p in PRESETS.values()})
    assert METHODS[:9] == ("dense", *DISTANCES)
    for cell in {c.group: c for c in plan(PARTS)}.values():
        from ddst.cli import build_parser

        given = vars(build_parser()[0].parse_args(["train", *cell.arguments]))
        given.pop("command")
        config = resolve({**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}, "out": "x"})
        assert config.threads == 1 and config.resolution == (32 if cell.data == "shapes" else 16)
        assert cell.block is None or (config.block == cell.block and config.density == cell.density)
        assert (config.backend == "reference") == (cell.block == (1, 1))


def test_the_papers_order():
    # CIFAR-10 by SNGAN and STL-10: relaxed first, strict second; BigGAN: the other way round.
    assert rank("ddst-relaxed", 0.1) == rank("ddst-strict", 0.1) == 1.5 < rank("static", 0.1)
    pairs = settled(METHODS, 0.1)
    assert ("dense", "ddst-relaxed") in pairs and ("ddst-strict", "static-strong") in pairs
    # On CIFAR-10 SDST-Balance-RigL is behind static, elsewhere before it: not settled.
    assert not {("static", "sdst-rigl"), ("sdst-rigl", "static")} & set(pairs)


# -- the figures -------------------------------------------------------------------------------------------------------


def made(cell: Cell, distance: float, **more: Any) -> dict[str, Any]:
    """A record as of a run, of four measurements that fall to its distance."""
    quarter = cell.steps // 4
    series = [[quarter * i, 2.0 * quarter * i, 10 * i, distance * (5 - i)] for i in range(1, 5)]
    return {
        "kind": "paper", "cell": {**vars(cell), "changes": dict(cell.changes)}, "commit": ["abc"],
        "settings": {"threads": 1}, "versions": {"torch": "2.13.0"}, "machine": {"cpu": "a processor", "cores": 2},
        "load": {"mean": 1.0, "most": 1.0}, "distance": distance, "series": series, "seconds_per_step": 2.0,
        "peak_bytes": 3, "dense_peak_bytes": 6, "flops_ratio": 0.25, "density_d": 0.4, "mean_density_d": 0.3,
        "balance_ratio": 0.5, "signs": [], "collapsed": False, **more,
    }  # fmt: skip


def row(method: str, distances: Sequence[float], density: float = 0.1, steps: int = 3000, **more: Any):
    place = (None, None) if method == "dense" else (density, (16, 16))
    return [made(Cell("digits", method, *place, seed, steps), d, **more) for seed, d in enumerate(distances)]


def test_means_and_intervals_by_hand():
    """t of 2 degrees of freedom at 97.5 % is 4.302653: 20 ± 4.302653 · 2 / √3."""
    estimate = Estimate.of([18.0, 20.0, 22.0])
    assert estimate[:3] == pytest.approx((20.0, 15.032, 24.968), abs=1e-3)
    text = page(row("static", [18.0, 20.0, 22.0]) + row("dense", [5.0]))
    assert "| static | 10 % | 3 | 20.0 (15.0 to 25.0) | 2000 | 0.50 | 0.25 | 0.40 | 0.50 | - | 5.8 |" in text
    assert "| dense | - | 1 | 5.0 | 2000 |" in text


def test_goals_by_hand():
    records = row("dense", [4.0, 5.0, 6.0, 5.0, 5.0]) + row("static", [13.0, 12.0, 14.0, 13.0, 12.0])
    records += row("ddst-relaxed", [6.0, 7.0, 8.0, 7.0, 7.0], seconds_per_step=1.0)
    records += row("sdst-rigl", [22.0, 300.0], collapsed=True)
    found = goals(Runs(records), 3000, Clock({}))
    assert [goal.reached for goal in found] == [True, True, True, None, False]
    # DDST takes 3,000 seconds, in which the dense run is at step 1,500, the second of its four measurements.
    dense, ours = records[0], records[10]
    assert at_equal_seconds(ours, dense, Clock({})) == pytest.approx(6.0 / 12.0)
    # By a quiet timing of 1.25 s beside 2 s: 3,750 s, step 1,875, halfway between 12 and 8.
    timed = {("digits", "ddst-relaxed", 0.1, (16, 16), 3000, ()): 1.25, ("digits", "dense", None, None, 3000, ()): 2.0}
    assert at_equal_seconds(ours, dense, Clock(timed)) == pytest.approx(6.0 / 10.0)
    assert [goal.reached for goal in goals(Runs(records), 3000, Clock({**timed, next(iter(timed)): 2.0}))][2] is False
    # Before the first measurement it is the first, after the last one the last.
    assert at_equal_seconds({**ours, "seconds_per_step": 0.1}, dense, Clock({})) == pytest.approx(6.0 / 16.0)
    assert at_equal_seconds({**ours, "seconds_per_step": 9.0}, dense, Clock({})) == pytest.approx(6.0 / 4.0)
    assert "**no**" in page(records) and "2 of 2 seeds collapsed (0, 1)" in page(records)
    assert [goal.reached for goal in goals(Runs(records[:1]), 3000, Clock({}))] == [None] * 5
    twenty = goals(Runs(row("sdst-rigl", [20.0] * 20)), 3000, Clock({}))
    assert twenty[-1].reached and twenty[-1].found == "0 of 20 seeds collapsed"


def test_what_agrees_with_the_paper_is_by_paired_seeds():
    records = row("static", [20.0, 21.0, 22.0]) + row("ddst-relaxed", [10.0, 11.5, 12.0])
    records += row("sdst-strong-rigl", [5.0, 6.1, 7.0]) + row("sdst-rigl", [4.0, 11.0, 15.0])
    said = {(v.better, v.worse): v.said for v in verdicts(Runs(records), METHODS, ("digits", 0.1, (16, 16), 3000))}
    assert said[("ddst-relaxed", "static")] == "agrees"
    assert said[("ddst-relaxed", "sdst-strong-rigl")] == "does not"
    assert said[("ddst-relaxed", "sdst-rigl")] == "undecided"
    text = page(records)
    assert "do **not** agree: ddst-relaxed before sdst-strong-rigl (-5.1, -5.7 to -4.6)." in text
    alone = verdicts(Runs(row("static", [9.0]) + row("ddst-relaxed", [1.0])), METHODS, ("digits", 0.1, (16, 16), 3000))
    assert [v.said for v in alone] == ["undecided"]


def test_what_is_not_finished_is_marked_and_other_lengths_stand_apart():
    records = row("static", [20.0], steps=800) + row("dense", [9.0], load={"mean": 2.4, "most": 3.0})
    text = page(records)
    long, short = text.index("## 3,000 steps"), text.index("## 800 steps")
    assert long < short and "**Not the planned 3,000 steps**" in text[short:] and "Not the planned" not in text[:short]
    assert "| static | 10 % | 1 | 20.0 |" in text[short:] and "| static | 10 % | 1" not in text[:short]
    assert "| static, static-strong, sdst-set" in text[short:] and "No run is finished" not in text[short:]
    assert "*not finished*" in text and "- `goal`: 1 of 15 runs of 3,000 steps are finished; the next is" in text
    assert "`digits-static-0.1-16x16-3000-seed0`" in text
    empty = page([])
    assert "No run is finished." in empty and "- `goal`: 0 of 15 runs" in empty
    busy = page(row("static", [20.0], load={"mean": 2.4, "most": 3.0}))
    assert "| *2000* |" in busy
    broken = [{"kind": "paper", "cell": vars(plan(["goal"])[1]) | {"changes": {}}, "error": "loss is not finite"}]
    assert "- `digits-static-0.1-16x16-3000-seed0` broke off: loss is not finite" in page(broken)


def test_a_density_that_the_plan_does_not_have_is_shown_without_what_is_missing():
    text = page(row("static", [30.0, 32.0], density=0.05) + row("sdst-rigl", [20.0, 21.0]))
    assert "| static | 5 % | 2 | 31.0 (18.3 to 43.7) |" in text
    assert text.index("| sdst-rigl | 10 % | 2 |") < text.index("| static | 5 % | 2 |")
    assert "sdst-set | 5 %" not in text and "At 5 %" not in text


def test_other_lengths_with_other_settings_alone_have_no_goals():
    changed = made(Cell("digits", "sdst-rigl", 0.1, (16, 16), 0, 800, (("interval_g", "100"),)), 50.0)
    short = page([changed]).split("## 800 steps")[1]
    assert "interval_g 100 | 1 | 50.0 (1 seed)" in short and "Goals" not in short and "No run is finished" not in short


def test_other_settings_stand_beside_the_defaults_by_equal_seeds():
    usual = row("sdst-rigl", [50.0, 60.0, 70.0])
    changed = [
        made(Cell("digits", "sdst-rigl", 0.1, (16, 16), seed, 3000, (("interval_g", "100"),)), d)
        for seed, d in enumerate([40.0, 51.0, 59.0])
    ]
    text = page(usual + changed)
    assert "| digits sdst-rigl 10 % 16x16 | interval_g 100 | 3 | 50.0 (26.3 to 73.7; 3 seeds) | " in text
    assert "| -10.0 (-12.5 to -7.5; 3 seeds) | 0 of 3 |" in text
    assert "| sdst-rigl | 10 % | 3 | 60.0 (35.2 to 84.8) |" in text  # not mixed with them


# -- the runs ----------------------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_goes_on_and_a_kept_one_is_not_made_again(tmp_path: Path):
    cell = Cell("digits", "ddst-relaxed", 0.3, (16, 16), 0, 3).with_changes(TINY)
    begun: list[Sequence[str]] = []

    def killed(arguments: Sequence[str], output: Path, look: Callable[[], None]) -> int:
        begun.append(arguments)
        output.write_text("a bar of progress")
        assert in_this_process([*arguments, "--stop-after", "2"], output, look) == 0
        return -signal.SIGKILL

    assert paper.make([cell], tmp_path / "parts", tmp_path / "results", None, killed) == 1
    assert list((tmp_path / "results").iterdir()) == [] and "--resume" not in begun[0]

    def goes_on(arguments: Sequence[str], output: Path, look: Callable[[], None]) -> int:
        begun.append(arguments)
        return in_this_process(arguments, output, look)

    assert paper.make([cell], tmp_path / "parts", tmp_path / "results", None, goes_on) == 0
    assert begun[1] == [*begun[0], "--resume"]
    (record,) = paper.load(tmp_path / "results")
    assert record["sessions"] == 2 and [s[0] for s in record["series"]] == [3]
    assert [e["step"] for e in read_log(tmp_path / "parts" / cell.name / "log.jsonl") if "event" not in e] == [1, 2, 3]
    assert paper.make([cell], tmp_path / "parts", tmp_path / "results", None, goes_on) == 0 and len(begun) == 2
    # The run is the one that nobody interrupted.
    assert paper.make([cell], tmp_path / "whole", tmp_path / "others", None, in_this_process) == 0
    assert paper.load(tmp_path / "others")[0]["distance"] == record["distance"]
    both = (checkpoint_of(tmp_path / name / cell.name) for name in ("parts", "whole"))
    assert differences(*both) == []


def test_what_broke_off_is_kept_what_could_not_begin_is_tried_again(tmp_path: Path, capsys):
    cells = plan(["goal"])[:3]
    codes = iter([1, 2, 130])

    def start(arguments: Sequence[str], output: Path, look: Callable[[], None]) -> int:
        output.write_text("progress\nddst train: error: loss is not finite\n")
        return next(codes)

    results = tmp_path / "results"
    assert paper.make(cells, tmp_path, results, None, start) == 130
    assert [file.name for file in results.iterdir()] == [f"{cells[0].name}.json"]
    assert paper.load(results)[0]["error"] == "ddst train: error: loss is not finite"
    assert "interrupted" in capsys.readouterr().out
    codes = iter([-signal.SIGTERM])  # before it listened
    assert paper.make(cells[1:], tmp_path, results, None, start) == 143 and next(codes, None) is None
    assert paper.make(cells, tmp_path, results, 1e-9, start) == 0  # the time is over before anything begins
    (results / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="is no run of this program"):
        paper.load(results)


def test_signals_and_the_deadline_end_a_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\nprint('up', flush=True)\n"
    )
    line = [sys.executable, "-c", code + "time.sleep(60)"]
    real = subprocess.Popen
    monkeypatch.setattr(one_run.subprocess, "Popen", lambda ignored, **how: real(line, **how))
    deadline, output = one_run.Deadline(None), tmp_path / "output"

    def look() -> None:
        if output.read_bytes():  # It listens.
            deadline.at = 0.0

    assert one_run.in_a_process(deadline)([], output, look) == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_command_trains_two_steps_and_writes_the_page(tmp_path: Path, capsys):
    places = [f"--{name}={tmp_path / name}" for name in ("runs", "results")] + [f"--page={tmp_path / 'page.md'}"]
    some = ["--only", "goal", "--steps", "2", "--set", *(f"{name}={value}" for name, value in TINY), *places]
    assert paper.main([*some, "--list"]) == 0
    assert len(capsys.readouterr().out.split()) == 15 and list(tmp_path.iterdir()) == []
    # Two of its runs are there already, so that one is left to train.
    for cell in plan(["goal"], 2)[:15]:
        if (cell.method, cell.seed) != ("static", 4):
            kept = tmp_path / "results" / f"{cell.with_changes(TINY).name}.json"
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps(made(cell.with_changes(TINY), 30.0)))
    assert paper.main(some) == 0
    name = Cell("digits", "static", 0.1, (16, 16), 4, 2).with_changes(TINY).name
    record = json.loads((tmp_path / "results" / f"{name}.json").read_text())
    assert record["cell"]["changes"]["width_g"] == "16" and record["distance"] > 0
    assert record["commit"] and record["versions"]["torch"] and record["load"]["most"] >= 0
    assert record["peak_bytes"] > 0 and 0 < record["flops_ratio"] < 1 and record["settings"]["threads"] == 1
    assert (tmp_path / "page.md").read_text() == page(paper.load(tmp_path / "results"))
    with pytest.raises(SystemExit) as ended:
        paper.main([*some, "--set", "width_g"])
    assert ended.value.code == 2


def test_rows_are_timed_in_pairs_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from ddst.benchmarks.paper import timing

    calls = []

    def paired(mine, dense, repeats):
        mine()
        calls.append(repeats)
        return 4.0, timing.MedianInterval(0.5, 0.4, 0.8)

    monkeypatch.setattr(timing, "paired", paired)
    cell = Cell("digits", "ddst-relaxed", 0.3, (8, 8), 0, 3)
    given = {name: int(value) for name, value in TINY[:-1]}
    settings = resolve({**given, "method": cell.method, "density": 0.3, "block": (8, 8), "interval_g": 2, "out": "x"})
    records = [made(cell, 9.0, settings=json.loads(json.dumps(settings.saved())), mean_density_d=0.5)]
    kept = tmp_path / "timing.json"
    changed = cell.with_changes((("interval_g", "100"),))
    records.append(made(changed, 9.0))
    other = [Cell("digits", "static", 0.3, (8, 8), 0, 3), changed]  # without a kept run; with further settings
    assert time_rows(other, records, kept)["rows"] == [] and not kept.exists()
    (timed,) = time_rows([*other, cell, replace(cell, seed=1)], records, kept)["rows"]
    assert timed["seconds"] == 2.0 and timed["speedup"] == {"median": 2.0, "low": 1.25, "high": 2.5}
    assert timed["density_d"] == pytest.approx(0.5, abs=0.05) and timed["density_g"] == pytest.approx(0.3, abs=0.05)
    assert time_rows([cell], records, kept) == json.loads(kept.read_text()) and len(calls) == 1
    assert "timed: 2000, 2.00× as fast as dense" in page(
        [{**made(cell, 9.0), "cell": {**vars(cell), "block": [16, 16], "changes": {}}}],
        {**json.loads(kept.read_text()), "rows": [{**timed, "cell": {**timed["cell"], "block": [16, 16]}}]},
    )
