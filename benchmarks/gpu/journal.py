"""What runs have found, one line each, written at once: so a run that is cut off loses nothing, and none proves twice.

A line says which part found it, of what, from which sources and with which versions. A later run takes over what was
right and what would still come from the same: the rest it does again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddst.benchmarks.report import ROOT, rounded

#: What a part's results come from, beside the part itself: files and folders of the tree. Tuning tables are left out
#: where they only choose among configurations that are proven on their own.
OPERATORS = ("csrc", "kernels/*.py", "ddst/*.py", "ddst/ops")
LAYERS = (*OPERATORS, "ddst/nn")
NETWORKS = (*LAYERS, "kernels/tables", "ddst/convert", "ddst/models", "ddst/sparsity", "ddst/gan", "ddst/train")
CHECKS = ("correctness", "problems", "half_blocks", "calls", "timing")
SOURCES = {
    "primitives": ("csrc/cuda/device", "csrc/cuda/tensor_map*", "tests/cuda/*_device.cu", "tests/cuda/*_probes.hpp"),
    "correctness": (*LAYERS, *(f"benchmarks/gpu/{name}.py" for name in CHECKS)),
    "kernels": (*OPERATORS, "kernels/tables", "benchmarks/gpu/kernel_rows.py", "benchmarks/gpu/timing.py"),
    "iteration": (*NETWORKS, "benchmarks/gpu/iteration.py", "benchmarks/gpu/networks.py", "benchmarks/gpu/timing.py"),
    "tune": ("kernels/*.py", "benchmarks/tune.py", "benchmarks/gpu/timing.py"),
    "host": (*LAYERS, "kernels/tables", "benchmarks/gpu/host_time.py"),
    "train": (*NETWORKS, "benchmarks/gpu/training.py"),
    "candidates": ("kernels/*.py", "benchmarks/gpu/sweep.py", "benchmarks/gpu/problems.py"),
}


class Progress:
    """Where a part takes earlier results from and tells new ones; by itself it knows none and keeps none.

    Args:
        journal, part: whose results. tell: is given the part so far, after each result.
    """

    def __init__(
        self, journal: Journal | None = None, part: str = "", tell: Callable[[dict[str, Any]], None] = lambda part: None
    ) -> None:
        self._journal, self._part, self.tell = journal, part, tell

    def earlier(self, key: str) -> Any | None:
        """What an earlier run found right, with ``earlier`` in it: when that was. None: it is to be done."""
        return None if self._journal is None else self._journal.earlier(self._part, key)

    def keep(self, key: str, found: Any, part: dict[str, Any], right: bool = True) -> None:
        """Keeps a result for later runs, if it is ``right``, and tells the part so far."""
        if self._journal is not None:
            self._journal.add(self._part, key, found, right)
        self.tell(part)


NOTHING = Progress()


class Journal:
    """Results by part and key, in a file of lines.

    Args:
        file: it need not be there; what of it is no line of a journal, as the end of one that was cut off, is passed
            over. circumstances: what results depend on beside the sources: the device, versions.
        when: of this run, for its lines. anew: leaves earlier runs' results unused.
    """

    def __init__(self, file: Path, circumstances: Mapping[str, Any], when: str, anew: bool = False) -> None:
        self._file, self._when = file, when
        self._digests = {part: digest_of(part, circumstances) for part in SOURCES}
        self._known: dict[tuple[str, str], Any] = {}
        if file.is_file() and not anew:
            for line in file.read_text(errors="replace").splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
            part, key, found, when = (entry[name] for name in ("part", "key", "found", "when"))
            holds = entry["right"] and entry["sources"] == self._digests[part]
        except (ValueError, KeyError, TypeError):
            return
        if holds:
            self._known[part, key] = _marked(found, when)
        else:
            self._known.pop((part, key), None)  # the newest word counts

    def of(self, part: str, tell: Callable[[dict[str, Any]], None]) -> Progress:
        """The journal as one part sees it."""
        return Progress(self, part, tell)

    def earlier(self, part: str, key: str) -> Any | None:
        return self._known.get((part, key))

    def add(self, part: str, key: str, found: Any, right: bool) -> None:
        """Appends a line and flushes it."""
        entry = {"part": part, "key": key, "sources": self._digests[part], "when": self._when, "right": right}
        with self._file.open("a") as file:
            file.write("\n" * self._is_cut_off() + json.dumps({**entry, "found": rounded(found)}, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _is_cut_off(self) -> bool:
        """Whether the last line has no end."""
        with self._file.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            return size > 0 and file.read() != b"\n"


def digest_of(part: str, circumstances: Mapping[str, Any], root: Path = ROOT) -> str:
    """A digest of all that a part's results come from."""
    digest = hashlib.sha256(json.dumps(circumstances, sort_keys=True, default=str).encode())
    for pattern in SOURCES[part]:
        for found in sorted(root.glob(pattern)):
            for file in sorted(found.rglob("*")) if found.is_dir() else [found]:
                if file.is_file() and file.suffix not in (".pyc", ".so"):
                    digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _marked(found: Any, when: str) -> Any:
    return [_marked(one, when) for one in found] if isinstance(found, list) else {**found, "earlier": when}
