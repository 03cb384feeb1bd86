"""The folder of a run: its files, whether a run may begin there, and the lock that only one process holds."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from ddst.train.log import parsed
from ddst.train.options import ConfigError

CHECKPOINT, LOG, SAMPLES, REPORT, SUMMARY = "checkpoint.pt", "log.jsonl", "samples", "report.png", "summary.json"
BEST, EVALUATION = "best.safetensors", "evaluation.json"
LOCK = "lock"
_FIRST_SAMPLE = "step_000000.png"


def versions() -> dict[str, str]:
    """Versions of what decides the numbers of a run."""
    from ddst import __version__

    return {
        "ddst": __version__,
        "torch": str(torch.__version__),  # Of a class of its own, which no checkpoint may hold.
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


@contextlib.contextmanager
def reached(option: str, path: Path) -> Iterator[None]:
    """Raises ConfigError that names the option where the block may not look at its path."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror or error}") from error


def check_folder(out: Path) -> None:
    """Raises ConfigError if a new run in `out` would overwrite something, or `out` is no folder.

    What a run left that ended before its first checkpoint (its settings, the picture of its noise) is nothing: a new
    run takes the folder over.
    """
    with reached("--out", out):
        _check_free(out)


def _check_free(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is not a folder")
    for name in (CHECKPOINT, REPORT, SUMMARY):
        if (out / name).exists():
            raise ConfigError(
                f"--out {out} already holds a run ({name}): add --resume to continue it, or choose another"
            )
    pictures = sorted((out / SAMPLES).iterdir()) if (out / SAMPLES).is_dir() else []
    trained = [path for path in pictures if path.name.removeprefix(".").removesuffix(".tmp") != _FIRST_SAMPLE]
    if (out / LOG).exists() and not _only_begun(out / LOG):
        trained.insert(0, out / LOG)
    if trained:
        raise ConfigError(
            f"--out {out} holds the results of a run ({trained[0].relative_to(out)}) without its {CHECKPOINT}: "
            "move them away, or choose another"
        )


def _only_begun(log: Path) -> bool:
    """Whether a log holds its first line at most: the others come after the first checkpoint."""
    with log.open("rb") as file:
        file.readline()
        return not file.read(1)


def settings_begun(out: Path) -> Any:
    """The settings in the first line of the log of a run that has no checkpoint; None where there is none such."""
    try:
        with (out / LOG).open("rb") as file:
            entry = parsed(file.readline())
    except OSError:
        return None
    return entry.get("settings") if entry is not None and entry.get("event") == "start" else None


def make_folder(out: Path, option: str = "--out") -> None:
    """Make a folder that an option names; ConfigError if it cannot be, or is there and nothing may be made in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {out} cannot be made: {error.strerror or error}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {out} cannot be written: nothing may be made in it")


def clear_folder(out: Path) -> None:
    """Delete what `check_folder` calls nothing."""
    (out / LOG).unlink(missing_ok=True)
    for picture in (out / SAMPLES).glob("*.png*"):
        picture.unlink()


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[list[str]]:
    """Holds the lock of an existing folder; it ends with the block or with the process, however that ends.

    Yields:
        Warnings: that the file system has no locks.

    Raises:
        ConfigError: another process holds it, or the lock file cannot be made.
    """
    path = out / LOCK
    file, warnings = -1, []
    try:
        while file < 0:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_open(path, file):  # Its last holder has just deleted it.
                os.close(file)
                file = -1
    except OSError as error:
        if file < 0:
            raise ConfigError(f"--out {out} cannot be written: {error.strerror or error}") from error
        if error.errno == errno.EWOULDBLOCK:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise ConfigError(f"--out {out} is in use: {holder} holds {path}") from None
        warnings.append(f"{path} cannot be locked ({error.strerror}): let no other process write to the folder")
    try:
        with contextlib.suppress(OSError):  # On a full disk it is locked without a name.
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield warnings
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(file)


def _is_open(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
