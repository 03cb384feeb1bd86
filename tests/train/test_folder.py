"""The folder of a run: one writer at a time, no results overwritten, no dead end before the first checkpoint."""

import os
import re
import socket
import subprocess
import sys

import pytest

from ddst.train import run
from ddst.train.checkpoint import CheckpointError
from ddst.train.folder import LOCK, check_folder, only_writer
from ddst.train.loop import Trainer
from ddst.train.options import ConfigError
from helpers.runs import TINY, checkpoint_of, differences, log_without_seconds


def test_the_second_process_is_told_who_holds_the_folder(tmp_path):
    with only_writer(tmp_path) as warnings:
        assert warnings == []
        code = "import sys, pathlib, ddst.train.folder as f\nwith f.only_writer(pathlib.Path(sys.argv[1])): pass"
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
        )
        holder = f"process {os.getpid()} on {socket.gethostname()} holds {tmp_path / LOCK}"
        assert done.stderr.splitlines()[-1].endswith(f"ConfigError: --out {tmp_path} is in use: {holder}")
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path):
        pass


def test_a_lock_left_by_a_killed_process_holds_nobody_off(tmp_path):
    (tmp_path / LOCK).write_text("process 1 on elsewhere\n")
    with only_writer(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_a_folder_that_cannot_be_written_and_a_file_system_without_locks(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cannot be written: No such file"), only_writer(tmp_path / "none"):
        pass

    def without(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", without)
    with only_writer(tmp_path) as warnings:
        assert re.fullmatch(r".*lock cannot be locked \(Operation not supported\): let no other .*", warnings[0])


def test_a_run_in_use_is_neither_resumed_nor_begun(tmp_path):
    out = tmp_path / "run"
    run({**TINY, "out": str(out), "stop_after": 2})
    other = tmp_path / "other"
    other.mkdir()
    for folder, given in ((out, {"resume": True}), (other, TINY)):
        with only_writer(folder), pytest.raises(ConfigError, match="is in use: process"):
            run({**given, "out": str(folder)})
    assert list(other.iterdir()) == []
    assert checkpoint_of(out)["step"] == 2


@pytest.mark.parametrize("again", [TINY, {"resume": True}])
@pytest.mark.parametrize("died_in", ["save_samples", "checkpoint"])
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(tmp_path, monkeypatch, capsys, again, died_in):
    """The same command does, and --resume with the settings that were given first."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    settings = {**TINY, "seed": 5}
    run({**settings, "out": str(whole), "stop_after": 3})

    def dies(*args):
        raise SystemExit("killed")

    monkeypatch.setattr(Trainer, died_in, dies)
    with pytest.raises(SystemExit):
        run({**settings, "out": str(out)})
    monkeypatch.undo()
    assert not (out / "checkpoint.pt").exists()
    (out / "samples" / ".step_000000.png.tmp").write_bytes(b"half")
    again = again if "resume" in again else settings
    assert run({**again, "out": str(out), "stop_after": 3}) == 0
    assert ("the run begins anew" in capsys.readouterr().out) == ("resume" in again)
    assert differences(checkpoint_of(whole), checkpoint_of(out)) == []
    assert log_without_seconds(whole) == log_without_seconds(out)
    assert [p.name for p in (out / "samples").iterdir()] == ["step_000000.png"]


def test_without_checkpoint_and_settings_there_is_nothing_to_resume(tmp_path):
    for log in (None, b"", b'{"event": "sta'):
        if log is not None:
            (tmp_path / "log.jsonl").write_bytes(log)
        with pytest.raises(CheckpointError, match="does not exist; leave out --resume to begin a run"):
            run({"resume": True, "out": str(tmp_path)})


@pytest.mark.parametrize(
    "name", ["checkpoint.pt", "report.png", "summary.json", "samples/step_000009.png", "log.jsonl"]
)
def test_results_are_not_overwritten(tmp_path, name):
    check_folder(tmp_path)
    (tmp_path / "samples").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "samples" / "step_000000.png").write_bytes(b"")
    (tmp_path / "log.jsonl").write_text('{"event": "start"}\n')
    check_folder(tmp_path)
    (tmp_path / name).write_text('{"event": "start"}\n{"step": 1}\n')
    with pytest.raises(ConfigError, match=re.escape(name)):
        check_folder(tmp_path)
