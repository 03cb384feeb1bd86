"""A run that was stopped and continued is the same run, bit for bit, for every method."""

import json
import os
import signal

import pytest
import torch

from ddst.train import loop, run
from ddst.train.loop import Trainer, TrainingError
from ddst.train.options import ConfigError
from helpers.runs import TINY, checkpoint_of, differences, log_without_seconds, tiny

# Bounds that make the controller act at every decision, whatever is measured.
ALWAYS_GROW, ALWAYS_DROP = (-2e9, -1e9), (1e9, 2e9)
# Settings, the decisions they lead to, and the steps at which G's topology moves.
CASES = {
    "dense": ({"method": "dense"}, [], []),
    "static": ({"method": "static"}, [], []),
    "sdst-set": ({"method": "sdst-set"}, [], [4, 8, 12]),
    "sdst-rigl": ({"method": "sdst-rigl"}, [], [4, 8, 12]),
    "ddst-relaxed grows": ({"method": "ddst-relaxed", "bounds": ALWAYS_GROW}, ["grow"] * 2, [4, 8, 12]),
    "ddst-relaxed drops": (
        {"method": "ddst-relaxed", "bounds": ALWAYS_DROP, "density_d": 0.5},
        ["drop"] * 2,
        [4, 8, 12],
    ),
    "ddst-strict": (
        {"method": "ddst-strict", "bounds": ALWAYS_GROW, "delta": 0.1, "density_d_max": 0.4, "interval_d": 3},
        ["grow", "exchange", "exchange", "exchange"],
        [4, 8, 12],
    ),
    "single weights": (
        {"method": "ddst-relaxed", "block": (1, 1), "bounds": ALWAYS_GROW},
        ["grow"] * 2,
        [4, 8, 12],
    ),
}


@pytest.fixture
def _without_report(monkeypatch):
    """The end of a run (table, plot) is tested elsewhere and takes as long as the run."""
    monkeypatch.setattr("ddst.train.job._finish", lambda trainer: None)


@pytest.mark.usefixtures("_without_report")
@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_is_the_same_run(tmp_path, case):
    changes, decisions, updates = CASES[case]
    settings, whole = tiny(**changes), tmp_path / "whole"
    assert run({**settings, "out": str(whole)}) == 0
    log = log_without_seconds(whole)
    assert [e["step"] for e in log if "event" not in e] == list(range(1, 15))
    assert [e["action"] for e in log if e.get("event") == "decision"] == decisions
    moved = [e["step"] for e in log if e.get("event") == "update" and e["network"] == "generator"]
    assert moved == updates
    # Stopped right before an update, when its scores are asked for; right after one, and once more.
    for stops in ((7,), (8, 11)):
        parts = tmp_path / f"stopped at {stops}"
        for i, stop in enumerate(stops):
            again = {"resume": True} if i else settings
            assert run({**again, "out": str(parts), "stop_after": stop}) == 0
            torch.manual_seed(i)  # A new process would have another random state.
        assert run({"out": str(parts), "resume": True}) == 0
        assert differences(checkpoint_of(whole), checkpoint_of(parts)) == []
        assert log == log_without_seconds(parts)
        for picture in sorted((whole / "samples").iterdir()):
            assert picture.read_bytes() == (parts / "samples" / picture.name).read_bytes()


@pytest.mark.usefixtures("_without_report")
def test_run_killed_between_checkpoints_is_the_same_after_resume(tmp_path, monkeypatch):
    """The log has lines the checkpoint does not know; they are cut off and written again."""
    settings = {**TINY, "method": "ddst-relaxed", "bounds": ALWAYS_GROW}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run({**settings, "out": str(whole)})
    real_step = Trainer.train_step

    def killed_at_9(self):
        if self.step == 8:
            raise SystemExit("killed")
        return real_step(self)

    monkeypatch.setattr(Trainer, "train_step", killed_at_9)
    with pytest.raises(SystemExit):
        run({**settings, "out": str(parts)})
    monkeypatch.undo()
    assert checkpoint_of(parts)["step"] == 5
    assert log_without_seconds(parts)[-1]["step"] == 8
    assert run({"out": str(parts), "resume": True}) == 0
    assert differences(checkpoint_of(whole), checkpoint_of(parts)) == []
    assert log_without_seconds(whole) == log_without_seconds(parts)


@pytest.mark.usefixtures("_without_report")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_after_the_current_step_with_a_checkpoint(tmp_path, monkeypatch, capsys, number, code):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run({**TINY, "out": str(whole)})
    real_step, before = Trainer.train_step, signal.getsignal(number)

    def signalled_in_step_7(self):
        if self.step == 6:
            os.kill(os.getpid(), number)
        return real_step(self)

    monkeypatch.setattr(Trainer, "train_step", signalled_in_step_7)
    assert run({**TINY, "out": str(parts)}) == code
    monkeypatch.undo()
    assert signal.getsignal(number) is before
    assert "stopped after step 7 of 14; go on with: ddst train --resume --out" in capsys.readouterr().out
    assert checkpoint_of(parts)["step"] == 7
    assert run({"out": str(parts), "resume": True}) == 0
    assert differences(checkpoint_of(whole), checkpoint_of(parts)) == []


def test_a_second_ctrl_c_ends_at_once_and_names_the_last_checkpoint(tmp_path, monkeypatch):
    def signalled(self):
        if self.step == 6:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        return real_step(self)

    real_step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", signalled)
    message = r"^ended at once after step 6; the last good checkpoint is that of step 5, "
    with pytest.raises(TrainingError, match=message):
        run({**TINY, "out": str(tmp_path)})


def test_a_second_ctrl_c_while_the_last_checkpoint_is_written_names_the_one_before(tmp_path, monkeypatch):
    def signalled_in_step(self):
        if self.step == 6:
            signal.raise_signal(signal.SIGINT)
        return real_step(self)

    def signalled_in_checkpoint(path, state):
        if state["step"] == 7:
            signal.raise_signal(signal.SIGINT)
        return real_save(path, state)

    real_step, real_save = Trainer.train_step, loop.save_checkpoint
    monkeypatch.setattr(Trainer, "train_step", signalled_in_step)
    monkeypatch.setattr(loop, "save_checkpoint", signalled_in_checkpoint)
    message = r"^ended at once after step 7; the last good checkpoint is that of step 5, "
    with pytest.raises(TrainingError, match=message):
        run({**TINY, "out": str(tmp_path)})
    assert checkpoint_of(tmp_path)["step"] == 5


def test_finished_run_resumes_to_its_report_only(tmp_path):
    out = tmp_path / "run"
    run({**TINY, "out": str(out), "stop_after": 14})
    before = checkpoint_of(out)
    (out / "report.png").unlink()
    numbers = json.loads((out / "summary.json").read_text())
    assert run({"out": str(out), "resume": True}) == 0
    again = json.loads((out / "summary.json").read_text())
    assert all(again[name] == numbers[name] for name in ("generator", "discriminator", "quality", "measured"))
    assert numbers["measured"]["metric"] == "digits" and numbers["measured"]["step"] == 14
    assert (out / "report.png").exists()
    assert differences(before, checkpoint_of(out)) == []


def test_changed_images_are_refused(tmp_path):
    from PIL import Image

    from ddst.train.checkpoint import CheckpointError

    folder, out = tmp_path / "images", tmp_path / "run"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (8, 8), (i * 40, 0, 0)).save(folder / f"{i}.png")
    run(tiny(data=str(folder), out=str(out), stop_after=2))
    before = (out / "log.jsonl").read_bytes()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "3.png")
    with pytest.raises(CheckpointError, match=r"the images of --data .* have changed"):
        run({"out": str(out), "resume": True, "data_cache": "none"})
    assert (out / "log.jsonl").read_bytes() == before


def test_a_run_goes_on_wherever_its_images_lie(tmp_path, monkeypatch):
    from PIL import Image

    from ddst.train.checkpoint import CheckpointError

    monkeypatch.chdir(tmp_path)
    for name, shade in (("photos", 0), ("others", 100)):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (8, 8), (i * 30, shade, 0)).save(tmp_path / name / f"{i}.png")
    run(tiny(data="photos", out="run", stop_after=1))
    again = {"out": "run", "resume": True, "data_cache": "none"}
    assert run({**again, "data": str(tmp_path / "photos"), "stop_after": 2}) == 0
    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"photos does not exist .*; --data PATH says where they lie now"):
        run(again)
    with pytest.raises(CheckpointError, match=r"none does not exist \(.*\)$"):
        run({**again, "data": "none"})
    assert run({**again, "data": "moved", "stop_after": 3}) == 0
    assert run({**again, "stop_after": 4}) == 0  # the checkpoint knows by now where they lie
    with pytest.raises(CheckpointError, match=r"the images of --data others have changed, or are others"):
        run({**again, "data": "others"})
    assert checkpoint_of(tmp_path / "run")["step"] == 4


def test_density_the_networks_cannot_have_is_a_setting_error(tmp_path):
    with pytest.raises(ConfigError, match=r"--density 0\.001: ") as caught:
        run({**TINY, "density": 0.001, "out": str(tmp_path / "x")})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()
