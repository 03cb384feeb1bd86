"""A checkpoint is replaced whole or not at all; damaged, missing and foreign ones are named."""

import os
import random
import resource

import pytest
import torch

from ddst.train.checkpoint import FORMAT, CheckpointError, load_checkpoint, replacing, save_checkpoint

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
        real_save(state["weights"], file)
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


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    """Not the temporary one beside it."""
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for path in (tmp_path / "none" / "c.pt", tmp_path / "folder", tmp_path / "."):
        with pytest.raises(OSError) as caught, replacing(path) as file:
            file.write(b"new")
        assert caught.value.filename == str(path) and ".tmp" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_missing_and_foreign_files_are_named_in_our_words(tmp_path):
    path = tmp_path / "c.pt"
    with pytest.raises(CheckpointError, match=r"no checkpoint .*c\.pt does not exist"):
        load_checkpoint(path)
    for write, message in (
        (lambda: path.write_bytes(b""), "it is empty"),
        (
            lambda: torch.save({"step": 3}, path),
            "it is a zip file such as torch.save writes, without what ddst train writes at its end; expected a",
        ),
        (lambda: torch.save(torch.nn.Linear(2, 2), path), "it is a zip file such as torch.save writes, without what"),
        (lambda: path.write_bytes(path.read_bytes()[:-30]), "such as torch.save writes, and its end is missing; exp"),
        (lambda: torch.save([1], path, _use_new_zipfile_serialization=False), "it is a pickle; expected a checkpoint"),
        (lambda: path.write_bytes(b"\x08\x0a\x12\x07pytorch"), "it is an ONNX file; expected a checkpoint of ddst"),
        (lambda: path.write_bytes(b"PK"), "it is no file of ddst train, or its end is missing; expected a checkpoint"),
        (lambda: save_checkpoint(path, {"format": "1"}), "is no checkpoint of ddst train"),
        (lambda: save_checkpoint(path, {"format": FORMAT + 1}), f"of format {FORMAT + 1}; this ddst"),
        (lambda: (path.unlink(), path.mkdir()), "Is a directory"),
    ):
        write()
        with pytest.raises(CheckpointError, match=r"c\.pt") as caught:
            load_checkpoint(path)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)


def test_no_flipped_bit_and_no_missing_byte_passes(tmp_path):
    """In headers, between the parts and in the digest too."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, STATE)
    good = path.read_bytes()
    torch.load(path, weights_only=True)  # It is a file of torch all the same.
    rng = random.Random(0)
    damaged = [good[:n] for n in rng.sample(range(len(good)), 200)] + [good + b"\0", good[1:], good[::-1]]
    for bit in range(len(good) * 8):
        if bit // 8 >= len(good) - 80 or rng.random() < 0.1:
            changed = bytearray(good)
            changed[bit // 8] ^= 1 << bit % 8
            damaged.append(bytes(changed))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"^cannot read checkpoint .*c\.pt: it is"):
            load_checkpoint(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    save_checkpoint(tmp_path / "c.pt", {"x": Evil()})
    with pytest.raises(CheckpointError, match="it holds more than tensors and plain values"):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    """torch.save turns the error of a write into one about positions in its file."""

    def limited(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    path = tmp_path / "c.pt"
    save_checkpoint(path, STATE)
    before = path.read_bytes()
    unlimited, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 700, len(before) - 1):
        limited(size)
        try:
            with pytest.raises(OSError, match="too large") as caught:
                save_checkpoint(path, STATE)
        finally:
            limited(unlimited)
        assert caught.value.filename == str(path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
