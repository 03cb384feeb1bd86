"""A checkpoint is replaced whole or not at all; damaged, missing and foreign ones are named."""

import os

import pytest
import torch

from ddst.train.checkpoint import CheckpointError, load_checkpoint, replacing, save_checkpoint, truncate_log
from ddst.train.log import RunLog, read_log

STATE = {"step": 3, "weights": {"a": torch.arange(5.0)}, "names": ["x", None], "bounds": (0.4, 0.5)}


def test_round_trip_keeps_everything(tmp_path):
    save_checkpoint(tmp_path / "c.pt", STATE)
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(loaded["weights"]["a"], STATE["weights"]["a"])
    assert loaded["names"] == ["x", None]
    assert loaded["bounds"] == (0.4, 0.5)
    assert loaded["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("crash_in", ["write", "fsync", "replace"])
def test_crash_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch, crash_in):
    path = tmp_path / "c.pt"
    save_checkpoint(path, STATE)
    before = path.read_bytes()

    def crash(*args, **kwargs):
        raise OSError("no space left on device")

    real_save = torch.save

    def half(state, file):
        real_save(state, file)
        file.truncate(file.tell() // 2)
        crash()

    if crash_in == "write":
        monkeypatch.setattr(torch, "save", half)
    else:
        monkeypatch.setattr(os, crash_in, crash)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, {**STATE, "step": 4})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert load_checkpoint(path)["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_old_file_is_whole_until_the_last_moment(tmp_path):
    """What a kill without warning would leave: the old file, and perhaps a hidden temporary one."""
    path = tmp_path / "c.pt"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new, half written")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new, half written"


def test_missing_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "c.pt"
    with pytest.raises(CheckpointError, match=r"no checkpoint .*c\.pt does not exist"):
        load_checkpoint(path)
    save_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*c\.pt") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    torch.save({"step": 3}, path)
    with pytest.raises(CheckpointError, match="no ddst training checkpoint"):
        load_checkpoint(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"format": 1, "x": Evil()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "ran").exists()


def test_log_is_strict_json_and_can_be_cut_back(tmp_path):
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.write(step=1, loss_d=1.5, nested={"x": [float("inf"), 2.0]})
        size = log.sync()
        log.write(step=2, loss_d=float("nan"))
    assert size < path.stat().st_size
    assert list(read_log(path))[1] == {"step": 2, "loss_d": None}
    truncate_log(path, size)
    with RunLog(path) as log:
        log.write(step=9)
    assert list(read_log(path)) == [{"step": 1, "loss_d": 1.5, "nested": {"x": [None, 2.0]}}, {"step": 9}]
    with pytest.raises(CheckpointError, match="does not belong"):
        truncate_log(path, 10**6)
    with pytest.raises(CheckpointError, match="does not belong"):
        truncate_log(tmp_path / "none", 1)
