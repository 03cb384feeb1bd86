"""Runs of `ddst train` that are killed, meet full disks and damaged files; each test tells its count at the end."""

import pytest

from ddst.train import run
from helpers import torture

pytestmark = pytest.mark.torture


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run stopped in the middle, of whose log lines are to be cut."""
    out = tmp_path_factory.mktemp("torture") / "run"
    run({**torture.SETTINGS, "checkpoint_every": 5, "out": str(out), "stop_after": 9})
    with (out / "log.jsonl").open("a") as log:
        log.write('{"event": "later"}\n')
    return out


def test_kills(tmp_path, record_property):
    record_property("torture", torture.kills(tmp_path, count=120, seed=11))


def test_full_disks(tmp_path, record_property):
    record_property("torture", torture.full_disks(tmp_path, count=40, seed=12))


def test_small_file_systems(tmp_path, record_property):
    said = torture.small_file_systems(tmp_path, count=10, seed=13)
    if said is None:
        pytest.skip("no right to mount a file system")
    record_property("torture", said)


def test_checkpoints_with_changed_bytes(stopped, record_property):
    record_property("torture", torture.damaged_checkpoints(stopped, count=5000, seed=14))


def test_checkpoints_with_wrong_values(stopped, record_property, monkeypatch):
    record_property("torture", torture.edited_checkpoints(stopped, count=1500, seed=15, monkeypatch=monkeypatch))


def test_logs_with_a_fault(stopped, record_property):
    record_property("torture", torture.damaged_logs(stopped, count=400, seed=16))
