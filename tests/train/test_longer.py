"""A run may become longer than it was planned, or shorter: from where it is resumed on it is one of the new length."""

import json
import shutil

import pytest
import torch

from ddst.cli import main
from ddst.data import load_images
from ddst.sparsity.schedule import DropSchedule
from ddst.train import Trainer, resolve, run, train
from ddst.train.log import lengths, read_log
from ddst.train.options import ConfigError
from ddst.train.players import learning_rates
from ddst.train.replay import replay
from helpers.runs import TINY, checkpoint_of, differences, log_without_seconds

ALWAYS_GROW = (-2e9, -1e9)
# G's blocks move and D's density is decided on at step 12: scores for both are asked for at the end of step 11.
SETTINGS = {**TINY, "bounds": ALWAYS_GROW, "interval_g": 4, "interval_d": 6, "metric_every": 0, "steps": 20}


CONSTANT = {**SETTINGS, "drop_schedule": "constant", "steps": 14}


@pytest.fixture
def _without_report(monkeypatch):
    monkeypatch.setattr("ddst.train.job._finish", lambda trainer: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    trainer = Trainer(resolve({**CONSTANT, "out": str(out)}), load_images("digits", 8))
    train(trainer)
    assert {e["step"] for e in read_log(out / "log.jsonl") if e.get("event") == "update"} == {4, 6, 8, 12}
    return out


@pytest.mark.usefixtures("_without_report")
@pytest.mark.parametrize(
    "parts", [[{"steps": 11}, {"steps": 14}], [{"stop_after": 11}, {"steps": 11}, {"steps": 14}]], ids=str
)
def test_what_does_not_depend_on_the_length_is_the_same_bit_for_bit(whole, tmp_path, parts):
    out = tmp_path / "parts"
    for i, part in enumerate(parts):
        assert run({**({"resume": True} if i else CONSTANT), **part, "out": str(out)}) == 0
        torch.manual_seed(i)
    states = checkpoint_of(whole), checkpoint_of(out)
    for state in states:
        state["config"].pop("prune_at")  # a share of the steps it was begun with, which this method does not look at
    assert differences(*states) == []
    ours, theirs = (
        # Samples are also looked at where a part ends.
        [e for e in log_without_seconds(folder) if e.get("event") not in ("start", "settings", "samples")]
        for folder in (whole, out)
    )
    assert ours == theirs


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """A run of 10 steps whose folder was moved and that went on to 20, with its default schedules."""
    folder = tmp_path_factory.mktemp("longer")
    settings = {**SETTINGS, "interval_d": 3, "steps": 10}
    del settings["warmup"]
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert run({**settings, "out": str(folder / "first")}) == 0
    (folder / "first").rename(folder / "moved")
    assert run({"out": str(folder / "moved"), "resume": True, "steps": 20, "stop_after": 19}) == 0
    assert run({"out": str(folder / "moved"), "resume": True}) == 0
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    return folder / "moved"


def test_its_log_has_both_lengths_and_its_schedules_are_those_of_the_new_one(longer):
    entries = list(read_log(longer / "log.jsonl"))
    assert [e["step"] for e in entries if "event" not in e] == list(range(1, 21))
    assert lengths(entries) == [(0, 10), (10, 20)]
    (changed,) = (e for e in entries if e.get("event") == "settings")  # what is said once holds
    assert changed == {"event": "settings", "step": 10, "before": {"steps": 10}, "now": {"steps": 20}}
    updates = [e for e in entries if e.get("event") == "update" and e["network"] == "generator"]
    assert [e["step"] for e in updates] == [4, 8, 12, 16]
    for update in updates:
        assert update["fraction"] == DropSchedule(0.3, 3 if update["step"] < 10 else 6)(update["step"])
    # An eighth of the run is its warm-up: 1 step, then 2; the last step of the first plan decides nothing.
    decided = [e["step"] for e in entries if e.get("event") == "decision"]
    assert decided == [3, 6, 9, 12, 15, 18]
    assert json.loads((longer / "summary.json").read_text())["steps"] == 20


def test_it_is_replayed_and_reported(longer, tmp_path):
    result = replay(longer, {})
    assert result.replayed == result.logged and list(result.replayed) == [3, 6, 9, 12, 15, 18]
    assert list(replay(longer, {"interval_d": 5}).replayed) == [5, 15]  # 10 was the last step then, 20 is now
    page = tmp_path / "page.html"
    assert main(["report", str(longer), "--out", str(page)]) == 0
    assert "steps: 10, then 20 from step 10 on" in page.read_text()


def test_fewer_steps_than_it_has_made_are_refused(longer, capsys):
    before = (longer / "log.jsonl").read_bytes()
    assert main(["train", "--resume", "--out", str(longer), "--steps", "19"]) == 2
    assert capsys.readouterr().err == (
        "ddst train: error: cannot resume with --steps 19: the run in --out has made 20\n"
    )
    assert (longer / "log.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="cannot resume with --prune-at 3"):
        run({"out": str(longer), "resume": True, "prune_at": 3})


def test_a_length_is_remembered_from_the_first_moment_on(longer, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(longer, out)

    def dies(self):
        raise SystemExit("killed")

    monkeypatch.setattr(Trainer, "train_step", dies)
    with pytest.raises(SystemExit):
        run({"out": str(out), "resume": True, "steps": 30})
    assert "30 steps of batch 4, resumed after step 20 of 20 that were planned" in capsys.readouterr().out
    assert checkpoint_of(out)["config"]["steps"] == 30
    assert lengths(read_log(out / "log.jsonl")) == [(0, 10), (10, 20), (20, 30)]
    # Numbers of the end that it had are not shown for it any more.
    *_, last = (
        line for line in (longer / "log.jsonl").read_bytes().splitlines(keepends=True) if b'"event"' not in line
    )
    with (out / "log.jsonl").open("ab") as log:
        log.write(last.replace(b'"step": 20', b'"step": 21'))
    page = tmp_path / "page.html"
    assert main(["report", str(out), "--out", str(page)]) == 0
    assert _cells(page)[1] == "21" and _cells(page)[-3:] == ["–"] * 3


def _cells(page):
    """Of the table of runs."""
    text = page.read_text()
    row = text[text.index("<tr><td>") :].split("</tr>")[0]
    return [cell.split("</td>")[0] for cell in row.split("<td>")[2:]]


def trainer_of(steps, **settings):
    given = {k: v for k, v in {**SETTINGS, "steps": steps, **settings}.items() if k != "warmup"}
    return Trainer(resolve({**given, "out": "unused"}), load_images("digits", 8))


def test_everything_that_follows_from_the_length_is_that_of_the_new_one():
    """Learning rates, the controller's warm-up, the line of D's density."""
    short, long = (trainer_of(steps, lr_decay="linear", bounds=(0.4, 0.5)) for steps in (80, 160))
    for _ in range(2):
        short.train_step()
    state = {**short.state_dict(), "log": {"bytes": 1, "sha256": ""}}
    long.load_state_dict(state)
    assert learning_rates(long.config, long.step)[0] == long.config.lr * (1 - 2 / 160)
    assert (short.scheduler.controller.warmup, long.scheduler.controller.warmup) == (10, 20)

    ramp = {"method": "ddst-ramp", "interval_d": 2, "density_d_max": 0.8, "bounds": (0.45, 0.55)}
    short = trainer_of(8, **ramp)
    for _ in range(8):
        short.train_step()
    ended, long = short.scheduler.density_d, trainer_of(16, **ramp)
    long.load_state_dict({**short.state_dict(), "log": {"bytes": 1, "sha256": ""}})
    for _ in range(8):
        long.train_step()
    assert 0.6 < ended < 0.75 < long.scheduler.density_d < 0.8


def test_a_pruned_run_is_fine_tuned_longer(tmp_path, monkeypatch):
    """What is left of it stays where it was: --prune-at is a step, not a share."""
    monkeypatch.setattr("ddst.train.job._finish", lambda trainer: None)
    out = tmp_path / "run"
    settings = {k: v for k, v in TINY.items() if k not in ("interval_g", "interval_d", "warmup")}
    assert run({**settings, "method": "prune", "steps": 6, "metric_every": 0, "out": str(out)}) == 0
    assert run({"out": str(out), "resume": True, "steps": 9}) == 0
    entries = list(read_log(out / "log.jsonl"))
    assert [e["step"] for e in entries if e.get("event") == "update"] == [4]
    assert checkpoint_of(out)["step"] == 9
