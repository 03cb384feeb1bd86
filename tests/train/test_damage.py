"""A small sample of tests/torture: runs that are killed, meet full disks, and go on from damaged files."""

import pytest

from ddst.train import run
from helpers import torture


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run stopped in the middle, of whose log lines are to be cut."""
    out = tmp_path_factory.mktemp("torture") / "run"
    run({**torture.SETTINGS, "checkpoint_every": 5, "out": str(out), "stop_after": 9})
    with (out / "log.jsonl").open("a") as log:
        log.write('{"event": "later"}\n')
    return out


def test_killed_runs_continue_equal(tmp_path):
    torture.kills(tmp_path, count=2, seed=2)


def test_full_disks_leave_a_run_that_continues(tmp_path):
    torture.full_disks(tmp_path, count=2, seed=1)


def test_changed_bytes_of_checkpoints_are_found(stopped):
    torture.damaged_checkpoints(stopped, count=100, seed=1)


def test_wrong_values_in_checkpoints_are_found(stopped, monkeypatch):
    torture.edited_checkpoints(stopped, count=40, seed=1, monkeypatch=monkeypatch)


def test_damaged_logs_are_told(stopped):
    torture.damaged_logs(stopped, count=30, seed=1)
