"""Runs that are killed, meet full disks, and go on from damaged files: a few in the usual tests, many in tests/torture.

Everything is drawn from a seed. Runs that are to die are children of a server that has imported everything before.
"""

import copy
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ddst import cli
from ddst.data import DataError
from ddst.train import job
from ddst.train.checkpoint import CheckpointError, load_checkpoint
from ddst.train.folder import settings_begun
from ddst.train.log import RunLog, cut_log, kept_log
from ddst.train.loop import Trainer, TrainingError
from ddst.train.options import ConfigError, flag, shown_value
from ddst.train.report import plot_report
from helpers.copies import SERVER
from helpers.runs import TINY, checkpoint_of, differences, log_without_seconds

# A checkpoint is written after every step, so that many moments are moments of writing.
SETTINGS: dict[str, Any] = {**TINY, "checkpoint_every": 1}


def words_of(settings: dict[str, Any]) -> list[str]:
    """Settings as words of the command line."""
    return [word for name, value in settings.items() for word in (flag(name), *shown_value(value).split())]


NEW, RESUME = words_of(SETTINGS), ["--resume"]


def _child(words: list[str], said: str, largest_file: int | None, report: bool) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if not report:
        job._finish = lambda trainer: None
    sys.exit(cli.main(words))


class Child:
    """`ddst train` with these words in a process of its own.

    Args:
        out: the run's folder. words: of the command line. largest_file: bytes that a file may have. report: whether a
            finished run is judged, which takes as long as the run.
    """

    def __init__(self, out: Path, words: list[str], largest_file: int | None = None, report: bool = False) -> None:
        self.said_in = out.parent / f"{out.name}.txt"
        arguments = (["train", "--out", str(out), *words], str(self.said_in), largest_file, report)
        self.process = SERVER.Process(target=_child, args=arguments)
        self.process.start()

    def code(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def said(self) -> str:
        return self.said_in.read_text()


def finish(out: Path, words: list[str]) -> None:
    """Runs to the end."""
    child = Child(out, words)
    assert child.code() == 0, child.said()


def same_run(a: Path, b: Path) -> None:
    """Fails unless two runs have left the same, times and places aside."""
    assert differences(checkpoint_of(a), checkpoint_of(b)) == []
    assert log_without_seconds(a) == log_without_seconds(b)
    pictures = sorted(path.name for path in (a / "samples").iterdir())
    assert sorted(path.name for path in (b / "samples").iterdir()) == pictures
    for name in pictures:
        assert (a / "samples" / name).read_bytes() == (b / "samples" / name).read_bytes()


def way_on(out: Path, rng: random.Random) -> list[str]:
    """What a user types to go on with a run that was ended: --resume where it can, or the same line again."""
    if (out / "checkpoint.pt").exists():
        return RESUME
    return RESUME if settings_begun(out) is not None and rng.random() < 0.5 else NEW


def kills(folder: Path, count: int, seed: int) -> str:
    """Runs killed by SIGKILL at random moments, half of them while a checkpoint is being written, and continued."""
    rng, whole = random.Random(seed), folder / "whole"
    finish(whole, NEW)
    done, writing, runs = 0, 0, 0
    while done < count:
        out, step = folder / f"killed {runs}", 0
        runs += 1
        for _ in range(rng.randint(1, 4)):
            left = stamp(out / ".checkpoint.pt.tmp")
            child = Child(out, way_on(out, rng))
            _wait(child, out, rng)
            done += child.process.is_alive()
            child.process.kill()
            child.process.join()
            writing += stamp(out / ".checkpoint.pt.tmp") not in (0, left)
            reached = load_checkpoint(out / "checkpoint.pt")["step"] if (out / "checkpoint.pt").exists() else 0
            assert reached >= step, "a checkpoint is lost"
            step = reached
        finish(out, way_on(out, rng))
        same_run(whole, out)
    return f"{done} kills ({writing} while a checkpoint was written), 0 checkpoints lost, {runs} continued runs equal"


def _wait(child: Child, out: Path, rng: random.Random) -> None:
    """Until the child has written some more checkpoints, in half of the cases until it writes another; then a moment.

    Counted in checkpoints and not in seconds, so that a busy machine is tried at the same places.
    """
    checkpoint, temporary = out / "checkpoint.pt", out / ".checkpoint.pt.tmp"
    left = stamp(temporary)  # By an earlier kill.
    for _ in range(rng.randrange(5)):
        seen = stamp(checkpoint)
        while child.process.is_alive() and stamp(checkpoint) == seen:
            time.sleep(0.001)
    if rng.random() < 0.5:
        while child.process.is_alive() and stamp(temporary) in (0, left):
            time.sleep(0.0002)
        time.sleep(rng.uniform(0.0, 0.004))
    else:
        time.sleep(rng.uniform(0.0, rng.choice([0.01, 0.1, 1.0])))


def stamp(path: Path) -> int:
    """When a file was written, or 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def one_error(child: Child, out: Path) -> None:
    """Fails unless the child ended with one line that names a file of its folder."""
    said = [line for line in re.split(r"[\n\r]", child.said()) if line and "steps" not in line]
    assert "Traceback" not in child.said() and "ignored" not in child.said(), child.said()
    errors = [line for line in said if line.startswith("ddst train: error: ")]
    assert len(errors) == 1 and str(out) in errors[0], child.said()


def full_disks(folder: Path, count: int, seed: int) -> str:
    """Runs whose files may not grow beyond a size, continued without the limit."""
    rng, whole = random.Random(seed), folder / "whole"
    finish(whole, NEW)
    largest = (whole / "checkpoint.pt").stat().st_size
    for i in range(count):
        out = folder / f"full {i}"
        child = Child(out, NEW, largest_file=rng.randrange(largest), report=True)
        assert child.code() == 1
        one_error(child, out)
        if (out / "checkpoint.pt").exists():
            load_checkpoint(out / "checkpoint.pt")
        finish(out, way_on(out, rng))
        same_run(whole, out)
    return f"{count} full disks, 0 tracebacks, every continued run equal"


def small_file_systems(folder: Path, count: int, seed: int) -> str | None:
    """The same on file systems of a few hundred kilobytes; None where none may be mounted."""
    rng, whole, disk = random.Random(seed), folder / "whole", folder / "disk"
    finish(whole, NEW)
    disk.mkdir()

    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(disk)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    for _ in range(count):
        if not mount(f"size={rng.randrange(8, 400)}k"):
            return None
        try:
            out = disk / "run"
            child = Child(out, NEW, report=True)
            if child.code() != 0:
                one_error(child, out)
            assert mount("remount", "size=100m")
            if child.code() != 0:
                finish(out, way_on(out, rng))
            same_run(whole, out)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return f"{count} small file systems, 0 tracebacks, every continued run equal"


# --- damage ----------------------------------------------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file with one fault: a bit, a byte, a part that is missing, doubled, moved, zero or foreign."""
    at, length = rng.randrange(len(content)), rng.choice([1, 2, 8, 64, 512, 4096])
    before, part, after = content[:at], content[at : at + length], content[at + length :]
    return rng.choice(
        [
            lambda: before + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
            lambda: before + bytes([rng.randrange(256)]) + content[at + 1 :],
            lambda: before,
            lambda: before + after,
            lambda: before + part + part + after,
            lambda: before + part[::-1] + after,
            lambda: before + bytes(len(part)) + after,
            lambda: before + rng.randbytes(length) + after,
            lambda: after[:length] + before + part + after[length:],
        ]
    )()


def refusal(call: Callable[[], Any]) -> tuple[str | None, Any]:
    """What a call says that refuses, or what it returns."""
    try:
        return None, call()
    except (CheckpointError, ConfigError, DataError) as error:
        return str(error), None


def damaged_checkpoints(out: Path, count: int, seed: int) -> str:
    """Checkpoints whose bytes have changed: every one is refused, none in the words of others."""
    rng, path = random.Random(seed), out / "checkpoint.pt"
    good, tried = path.read_bytes(), 0
    while tried < count:
        content = damaged(good, rng)
        if content == good:
            continue
        path.write_bytes(content)
        said, _ = refusal(lambda: load_checkpoint(path))
        expected = r"cannot read checkpoint .*checkpoint\.pt: it is (damaged|empty|no file of ddst|a zip file).*"
        assert said is not None and re.fullmatch(expected, said), f"damage {tried} of seed {seed}: {said}"
        tried += 1
    path.write_bytes(good)
    return f"{count} checkpoints with changed bytes, {count} refused"


def _other(value: Any, rng: random.Random) -> Any:
    """A wrong value in place of another one: of another type, another shape or out of range."""
    anything: list[Any] = [None, True, False, 0, 1, -1, 3, 2**31, 2**70, 0.0, -1.0, 0.5, 1e300, float("nan")]
    anything += [float("inf"), "", "x", b"x", [], {}, (), [1, 2], {"x": 1}, (1, 2), torch.zeros(()), torch.ones(3)]
    anything += [
        torch.zeros(0),
        torch.ones(2, 2, dtype=torch.bool),
        torch.arange(5),
        torch.zeros(5056, dtype=torch.uint8),
    ]
    choices: list[Callable[[], Any]] = [lambda: rng.choice(anything)]
    if isinstance(value, torch.Tensor):
        choices += [lambda: value.flatten(), lambda: value[None], lambda: value.double(), lambda: value.to(torch.uint8)]
        choices += [lambda: -value.float(), lambda: value.bool(), lambda: torch.cat([value.flatten()] * 2)]
        choices += [lambda: torch.zeros_like(value), lambda: value.to_sparse(), lambda: value.float() / 0]
        if value.numel():
            choices.append(lambda: _with_entry(value, rng))
            choices.append(lambda: value.flatten()[1:] if value.dim() < 2 else value[1:])
    elif isinstance(value, bool):
        choices.append(lambda: not value)
    elif isinstance(value, int | float):
        choices += [lambda: value + 1, lambda: value - 1, lambda: -value, lambda: str(value), lambda: value * 1000]
        choices += [lambda: float(value), lambda: int(value)]
    elif isinstance(value, list | tuple):
        choices += [lambda: type(value)(value[1:]), lambda: type(value)([*value, *value[:1]]), lambda: [*value, None]]
        choices += [lambda: tuple(value), lambda: list(value)]
    elif isinstance(value, str):
        choices += [lambda: value + "x", lambda: value[1:], lambda: value.upper()]
    return rng.choice(choices)()


def _with_entry(value: torch.Tensor, rng: random.Random) -> torch.Tensor:
    changed = value.clone()
    entry = rng.choice(
        [float("nan"), float("inf"), -1e30, -1.0, 0.0, 1e30] if value.is_floating_point() else [0, 1, 200]
    )
    changed.view(-1)[rng.randrange(value.numel())] = entry
    return changed


def edited(state: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], str]:
    """A copy of a state in which one value is wrong, missing, new or at another's place; and which."""
    state = copy.deepcopy(state)
    place: Any = state
    path = []
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        path.append(str(key))
        value = place[key]
        inner = isinstance(value, dict | list) and len(value) > 0
        if not inner or rng.random() < 0.15:
            break
        place = value
    how = rng.choice(["other", "other", "other", "missing", "new", "swapped"])
    if how == "other" or isinstance(place, list):
        place[key] = _other(value, rng)
    elif how == "missing":
        del place[key]
    elif how == "new":
        place[rng.choice(["x", 7, f"{key}.x"])] = value
    else:
        other = rng.choice(keys)
        place[key], place[other] = place[other], place[key]
    return state, f"{how} {'.'.join(path)}"


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    """Ends what takes for ever."""

    def late(*_: Any) -> None:
        raise AssertionError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def edited_checkpoints(out: Path, count: int, seed: int, monkeypatch: Any) -> str:
    """Whole checkpoints with a wrong value: refused before anything changes, or trained on without an error."""
    rng, refused, good = random.Random(seed), 0, load_checkpoint(out / "checkpoint.pt")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    new_trainer = job._trainer
    state: dict[str, Any] = {}
    built: dict[Any, Trainer] = {}  # A trainer that has refused a state is as new as before.

    def trainer_of(config: Any) -> Trainer:
        if config not in built:
            built.clear()
            built[config] = new_trainer(config)
        return built[config]

    def train(trainer: Trainer, kept: Any, judge: Any, warnings: Any) -> int:
        try:
            for _ in range(min(2, trainer.config.steps - trainer.step)):
                trainer.train_step()
        except TrainingError:  # Weights that are too large end like a learning rate that is.
            pass
        built.clear()
        return 0

    monkeypatch.setattr(job, "_trainer", trainer_of)
    monkeypatch.setattr(job, "load_checkpoint", lambda path: state)
    monkeypatch.setattr(job, "_train", train)
    for i in range(count):
        state, what = edited(good, rng)
        try:
            with _within(60):
                said, _ = refusal(lambda: job.run({"resume": True, "out": str(out)}))
        except Exception as error:
            raise AssertionError(f"edit {i} of seed {seed}, {what}: {type(error).__name__} {error}") from error
        if said is not None:
            assert "\n" not in said and ("checkpoint.pt" in said or "cannot resume: the images" in said), (
                f"{what}: {said}"
            )
            refused += 1
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    return f"{count} checkpoints with wrong values, {refused} refused, 0 tracebacks"


def damaged_logs(out: Path, count: int, seed: int) -> str:
    """Logs with a fault: the run goes on and makes its picture, or the log is named."""
    rng, path = random.Random(seed), out / "log.jsonl"
    state, good, refused = load_checkpoint(out / "checkpoint.pt"), path.read_bytes(), 0
    for i in range(count):
        path.write_bytes(damaged(good, rng))
        said, kept = refusal(lambda: kept_log(path, state["log"], state["step"]))
        if said is not None:
            assert "move log.jsonl away to go on without it" in said
            refused += 1
            continue
        assert kept.warnings or path.read_bytes()[: kept.bytes] == good[: kept.bytes]
        cut_log(path, kept)
        with RunLog(path) as log:
            log.write(event="x")
        assert path.read_bytes().endswith(b'\n{"event": "x"}\n') or kept.bytes == 0
        if i % 10 == 0:
            plot_report(out)
    path.write_bytes(good)
    return f"{count} damaged logs, {refused} refused by name, 0 tracebacks"
