"""The JSON-lines log: one object per line, strict JSON, flushed to the disk whenever a checkpoint is written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any


class RunLog:
    """Appends objects to a file, one per line. NaN and infinities are written as null, so every line is valid JSON.

    Args:
        path: the file; created when missing, otherwise appended to.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> with RunLog(path) as log:
        ...     log.write(step=1, loss_d=2.5, balance_ratio=float("nan"))
        >>> path.read_text()
        '{"step": 1, "loss_d": 2.5, "balance_ratio": null}\\n'
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, **entry: Any) -> None:
        """Append one line."""
        self._file.write(json.dumps(_finite(entry), allow_nan=False) + "\n")

    def sync(self) -> int:
        """Flush everything to the disk and return the length of the file in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log, in order."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
