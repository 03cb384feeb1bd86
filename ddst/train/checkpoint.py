"""One checkpoint file, replaced whole or not at all, and the log cut back to the checkpoint's last line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued from; the message is one line that says why."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; when the block ends without error `path` holds all of it, otherwise what it held before.

    The bytes go to a temporary file in the same folder and are flushed to the disk before it is renamed over `path`
    (atomic on POSIX); the folder is flushed last, so that the new name survives a power cut.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) to `path`, whole or not at all."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state `save_checkpoint` wrote. Only tensors and plain containers are read, never code.

    Raises:
        CheckpointError: the file is missing, damaged or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint to resume from: {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch errors alike mean a damaged or foreign file.
        raise CheckpointError(f"cannot read checkpoint {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no ddst training checkpoint of format {FORMAT}")
    return state


def truncate_log(path: Path, size: int) -> None:
    """Cut the log back to its length when the checkpoint was written: later lines will be written again.

    Raises:
        CheckpointError: the log is missing or shorter than the checkpoint says.
    """
    found = path.stat().st_size if path.is_file() else 0
    if found < size:
        raise CheckpointError(f"{path} does not belong to its checkpoint: {found} bytes, {size} expected")
    os.truncate(path, size)
