"""One checkpoint file: replaced whole or not at all, and read only where it is, bit for bit, what was written."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ddst.train.terminal import OneLineError

FORMAT = 7

# What torch.save writes, a zip file whose checksums torch.load does not compare, ends with this and the SHA-256 of all
# before it. Readers of zip files pass over what stands behind the end of one.
_MARK = b"ddst checkpoint, sha256: "
_DIGEST_BYTES = hashlib.sha256().digest_size


class CheckpointError(OneLineError, ValueError):
    """A checkpoint that cannot be continued from; the message is one line that says which file, and why."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; when the block ends without error `path` holds all of it, otherwise what it held before.

    The bytes go to a temporary file in the same folder and are flushed to the disk before it is renamed over `path`
    (atomic on POSIX); the folder is flushed last, so that the new name survives a power cut.

    Raises:
        OSError: names `path`, also where the system names no file (a full disk), or the temporary one.
    """
    temporary = path.parent / f".{path.name}.tmp"
    with naming(path, temporary):
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


@contextmanager
def naming(path: Path, *others: Path) -> Iterator[None]:
    """Gives an OSError that names no file, or one of `others`, the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and str(error.filename) not in map(str, others)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


class _Digesting:
    """Passes on what is written, with a digest of it and the error that ended it, which torch.save hides."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return written

    def flush(self) -> None:
        self._file.flush()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) to `path`, whole or not at all.

    Raises:
        OSError: it cannot be written; `path` holds what it held before.
    """
    with replacing(path) as file:
        through: Any = _Digesting(file)
        try:
            torch.save({"format": FORMAT, **state}, through)
        except RuntimeError as error:
            raise through.error or error from None
        file.write(_MARK + through.digest.digest())


def load_checkpoint(path: Path, expected: str = "a checkpoint of ddst train") -> dict[str, Any]:
    """The state `save_checkpoint` wrote. Only tensors and plain containers are read, never code.

    Args:
        expected: what an error says of a file that is something else.

    Raises:
        CheckpointError: the file is missing, damaged (a single bit suffices), of another format or not of ddst.
    """
    try:
        with path.open("rb") as file:  # Once, so that what is read is what was compared.
            _compare_digest(path, file, expected)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint to resume from: {path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except Exception as error:  # What torch says of it is advice on how to load it all the same.
        raise CheckpointError(f"cannot read checkpoint {path}: it holds more than tensors and plain values") from error
    if not isinstance(state, dict) or type(found := state.pop("format", None)) is not int:
        raise CheckpointError(f"{path} is no checkpoint of ddst train")
    if found != FORMAT:
        raise CheckpointError(f"{path} is a checkpoint of format {found}; this ddst continues format {FORMAT}")
    return state


def _compare_digest(path: Path, file: BinaryIO, expected: str) -> None:
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise CheckpointError(f"cannot read checkpoint {path}: it is empty")
    end = size - len(_MARK) - _DIGEST_BYTES
    digest, left = hashlib.sha256(), max(end, 0)
    while left > 0 and (part := file.read(min(left, 1 << 20))):
        digest.update(part)
        left -= len(part)
    mark, written = file.read(len(_MARK)), file.read()
    if mark != _MARK:
        raise CheckpointError(f"cannot read checkpoint {path}: it is {_looks_like(file)}; expected {expected}")
    if written != digest.digest():
        raise CheckpointError(
            f"cannot read checkpoint {path}: it is damaged, its bytes are not those that were written"
        )


def _looks_like(file: BinaryIO) -> str:
    """What a file without our end is, by its first bytes."""
    file.seek(0)
    start = file.read(4)
    if start == b"PK\x03\x04" and zipfile.is_zipfile(file):
        return "a zip file such as torch.save writes, without what ddst train writes at its end"
    if start == b"PK\x03\x04":
        return "a zip file such as torch.save writes, and its end is missing"
    if start[:1] == b"\x08" and start[2:3] in (b"\x12", b"\x3a"):  # ir_version, then producer_name or graph
        return "an ONNX file"
    if start[:1] == b"\x80":
        return "a pickle"
    return "no file of ddst train, or its end is missing"
