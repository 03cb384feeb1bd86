"""The JSON-lines log: one object per line, strict JSON, flushed to the disk whenever a checkpoint is written."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ddst.train.checkpoint import CheckpointError, naming

# What the report reads of a line, by its "event"; other events are not looked into.
_NUMBER = (int, float, type(None))
_READ: dict[str | None, dict[str, tuple[type, ...]]] = {
    None: {
        "step": (int,),
        "loss_d": _NUMBER,
        "loss_g": _NUMBER,
        "balance_ratio": _NUMBER,
        "density_g": _NUMBER,
        "density_d": _NUMBER,
        "sample": (dict, type(None)),
    },
    "start": {"settings": (dict,)},
    "settings": {"step": (int,), "before": (dict,), "now": (dict,)},
    "decision": {"step": (int,), "action": (str,), "new_density": _NUMBER},
    "densities": {"step": (int,), "generator": (dict,), "discriminator": (dict,)},
    "metric": {"step": (int,), "metric": (str,), "value": _NUMBER, "seconds": _NUMBER, "flops": _NUMBER},
    "samples": {"step": (int,), "spread": _NUMBER},
}


class RunLog:
    """Appends objects to a file, one per line. NaN and infinities are written as null, so every line is valid JSON.

    Args:
        path: the file; created when missing, otherwise appended to.

    Attributes:
        watcher: is called with every entry, too.

    Raises:
        OSError: here, in `write` and in `sync`: the disk is full, for one; names the file.

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
        self.watcher: Callable[[Mapping[str, Any]], None] = lambda entry: None
        self._file = path.open("a+b")
        self._file.seek(0)
        self._digest = hashlib.file_digest(self._file, "sha256")

    def write(self, **entry: Any) -> None:
        """Append one line."""
        entry = _finite(entry)
        self.watcher(entry)
        line = (json.dumps(entry, allow_nan=False) + "\n").encode()
        with naming(self.path):
            self._file.write(line)
        self._digest.update(line)

    def sync(self) -> dict[str, Any]:
        """Flush everything to the disk; the length of the file in bytes and the SHA-256 of its contents."""
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            return {"bytes": os.fstat(self._file.fileno()).st_size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        with naming(self.path):
            self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError:  # What could not be written before cannot be now; the first error says so.
            if error is None:
                raise


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log, in order; lines that are damaged are left out."""
    with path.open("rb") as file:
        for line in file:
            entry = parsed(line)
            if entry is not None:
                yield entry


def parsed(line: bytes) -> dict[str, Any] | None:
    """The object of a whole line of a log, or None where the line is not one that a run writes.

    Example:
        >>> parsed(b'{"event": "update", "step": 4}\\n'), parsed(b'{"event": "upd')
        ({'event': 'update', 'step': 4}, None)
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not line.endswith(b"\n") or not isinstance(entry, dict):
        return None
    event = entry.get("event")
    if event is not None and not isinstance(event, str):
        return None
    fits = all(_fits(entry.get(name, ...), types) for name, types in _READ.get(event, {}).items())
    fits = fits and _fits(entry.get("mean_sign"), _NUMBER)
    sample = entry.get("sample")
    measured = [sample.get(name) for name in ("ratio", "sign")] if isinstance(sample, dict) else []
    return entry if fits and all(_fits(value, _NUMBER) for value in measured) else None


def lengths(entries: Iterable[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """(step, steps of the whole run from there on): what was planned, and what each resumption made of it.

    Example:
        >>> start, more = {"event": "start", "settings": {"steps": 10}}, {"before": {"steps": 10}, "now": {"steps": 20}}
        >>> lengths([start, {"event": "settings", "step": 10, **more}])
        [(0, 10), (10, 20)]
    """
    found: list[tuple[int, int]] = []
    for entry in entries:
        event = entry.get("event")
        stated = entry["settings"] if event == "start" else entry["now"] if event == "settings" else {}
        if type(total := stated.get("steps")) is int:
            found.append((0 if event == "start" else entry["step"], total))
    return found


def _fits(value: Any, types: tuple[type, ...]) -> bool:
    # Of an int that is no float there would be no picture.
    return type(value) in types and (not isinstance(value, int) or abs(value) < 2**63)


@dataclass(frozen=True)
class Kept:
    """What a continued run keeps of its log.

    Attributes:
        bytes: length it is cut to: what was written since the checkpoint will be written again.
        warnings: what is wrong with what is kept, a line each.
    """

    bytes: int
    warnings: tuple[str, ...]


def kept_log(path: Path, saved: Mapping[str, Any], step: int) -> Kept:
    """How much of the log belongs to a checkpoint. Changes nothing.

    A log that is lost or too short is no reason to refuse a good checkpoint: its whole lines are kept.

    Args:
        path: the log. saved: what `RunLog.sync` returned for the checkpoint. step: the checkpoint's.

    Raises:
        CheckpointError: the log is long enough, but what the checkpoint says of it does not end with a line, or not
            with the checkpoint's step.
    """
    length = saved["bytes"]
    if not path.exists():
        return Kept(0, (f"{path} is missing: a new one is begun after step {step}",))
    content = path.read_bytes()
    content, after = content[:length], content[length:]
    lines = [parsed(line) for line in content.splitlines(keepends=True)]
    said, whole = [], length
    if len(content) < length:
        said.append(f"{path} is shorter than its checkpoint says: it goes on after its last whole line")
        whole = content.rfind(b"\n") + 1
        lines = lines[: content.count(b"\n")]
    elif not content.endswith(b"\n") or _last_step(lines) > step or 0 < _first_step(after) <= step:
        raise CheckpointError(
            f"checkpoint.pt does not fit {path}: log.bytes, {length}, is not where the lines of step {step} end "
            f"(move {path.name} away to go on without it)"
        )
    damaged = [i for i, entry in enumerate(lines, 1) if entry is None]
    said += [f"{path}: line {i} is damaged, the report leaves it out" for i in damaged[:5]]
    if len(damaged) > 5:
        said.append(f"{path}: so are {len(damaged) - 5} more lines")
    if not said and hashlib.sha256(content).hexdigest() != saved["sha256"]:
        said.append(f"{path} has been changed since its checkpoint was written")
    return Kept(whole, tuple(said))


def _last_step(entries: list[dict[str, Any] | None]) -> int:
    return max((entry["step"] for entry in entries if entry is not None and "event" not in entry), default=0)


def _first_step(content: bytes) -> int:
    """The step of the first whole line of a step, or 0."""
    entries = map(parsed, content.splitlines(keepends=True))
    return next((entry["step"] for entry in entries if entry is not None and "event" not in entry), 0)


def cut_log(path: Path, kept: Kept) -> None:
    """Cut the log to what is kept of it."""
    if path.exists():
        with naming(path):
            os.truncate(path, kept.bytes)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
