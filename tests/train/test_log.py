"""The log: strict JSON lines; what is damaged, missing or too short is found before a run goes on."""

import hashlib

import pytest

from ddst.train.checkpoint import CheckpointError
from ddst.train.log import Kept, RunLog, cut_log, kept_log, parsed, read_log

STEP = {"loss_d": 1.5, "loss_g": 0.5, "balance_ratio": None, "sample": None, "density_g": 0.1, "density_d": 0.1}


def write_steps(log, *steps):
    for step in steps:
        log.write(step=step, **STEP)
        log.write(event="decision", step=step, action="keep", new_density=0.5)


@pytest.fixture
def logged(tmp_path):
    """A log of steps 1 to 4 and what its checkpoint of step 2 says of it."""
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.write(event="start", settings={})
        write_steps(log, 1, 2)
        saved = log.sync()
        write_steps(log, 3, 4)
    return path, saved


def test_numbers_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.write(event="x", loss_d=1.5, nested={"x": [float("inf"), 2.0]})
        log.write(**{**STEP, "step": 2, "loss_d": float("nan")})
    first, second = read_log(path)
    assert first == {"event": "x", "loss_d": 1.5, "nested": {"x": [None, 2.0]}}
    assert second["loss_d"] is None


def test_what_came_after_the_checkpoint_is_cut_off(logged):
    path, saved = logged
    kept = kept_log(path, saved, step=2)
    assert kept == Kept(saved["bytes"], ())
    cut_log(path, kept)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == saved["sha256"]
    with RunLog(path) as log:
        write_steps(log, 3)
        again = log.sync()
    assert [e["step"] for e in read_log(path) if "event" not in e] == [1, 2, 3]
    assert again == {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_a_lost_or_shorter_log_goes_on_after_its_last_whole_line(logged):
    path, saved = logged
    content = path.read_bytes()
    for length in (0, 5, 60, saved["bytes"] - 1):
        path.write_bytes(content[:length])
        kept = kept_log(path, saved, step=2)
        assert kept.bytes == content[:length].rfind(b"\n") + 1
        assert [w.endswith("it goes on after its last whole line") for w in kept.warnings] == [True]
        assert path.read_bytes() == content[:length]  # Only looked at.
    path.unlink()
    kept = kept_log(path, saved, step=2)
    assert kept.bytes == 0
    assert "is missing: a new one is begun after step 2" in kept.warnings[0]
    cut_log(path, kept)
    assert not path.exists()


def test_damaged_lines_are_told_and_left_out(logged):
    path, saved = logged
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"step"', b'"stfp"')
    lines[4] = b"\xff" + lines[4][1:]
    path.write_bytes(b"".join(lines))
    warnings = kept_log(path, saved, step=2).warnings
    assert [w.split(": ")[1] for w in warnings] == [f"line {n} is damaged, the report leaves it out" for n in (2, 5)]
    assert [e["step"] for e in read_log(path) if "event" not in e] == [2, 3, 4]
    path.write_bytes(b"".join([lines[0], *[b"?\n"] * 8]) + b" " * saved["bytes"])
    assert "line 6 is damaged" in kept_log(path, {**saved, "bytes": len(lines[0]) + 16}, step=2).warnings[4]
    assert "so are 3 more lines" in kept_log(path, {**saved, "bytes": len(lines[0]) + 16}, step=2).warnings[5]


def test_a_changed_digit_is_told(logged):
    path, saved = logged
    path.write_bytes(path.read_bytes().replace(b"1.5", b"1.7", 1))
    assert [w.endswith("has been changed since its checkpoint was written") for w in kept_log(path, saved, 2).warnings]
    assert kept_log(path, saved, 2).bytes == saved["bytes"]


def test_a_position_that_is_not_where_the_step_ends_is_the_checkpoints_fault(logged):
    path, saved = logged
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    two_steps = sum(map(len, lines[:5]))
    assert two_steps == saved["bytes"]
    for wrong in (1, two_steps - 1, len(lines[0]), two_steps + len(lines[5])):
        with pytest.raises(
            CheckpointError, match=rf"log.bytes, {wrong}, is not where the lines of step 2 end .*move log"
        ):
            kept_log(path, {**saved, "bytes": wrong}, step=2)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"\n", b"[]\n", b"3\n", b'{"event": "start"}', b'{"event": 3}\n', b"[" * 100_000 + b"\n", b"\xff\n"),
        *(b'{"step": 1}\n', b'{"event": "decision", "step": 1, "action": 3, "new_density": 0.5}\n'),
    ],
)
def test_lines_that_no_run_writes(line):
    assert parsed(line) is None


@pytest.mark.parametrize("name", ["step", *STEP])
@pytest.mark.parametrize("value", ["x", True, [], {"ratio": "x"}, 10**400])
def test_values_that_no_picture_can_show(tmp_path, name, value):
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.write(**{"step": 1, **STEP, name: value})
    assert list(read_log(path)) == []
