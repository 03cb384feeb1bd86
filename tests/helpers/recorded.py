"""Checks whose outcome hangs on sources, compiler and options alone are run where one of these has changed.

``tests/recorded.json`` holds, by the check's name, the digest with which it last passed. ``make record-kernels`` writes
it, ``make test-all`` runs every check whatever it says.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import scale

FILE = Path(__file__).parents[1] / "recorded.json"
SOURCES = (".cpp", ".hpp", ".cu", ".cuh", ".h")


def digest(*parts: Path | str) -> str:
    """Of texts, files (name and content), and every C++ or CUDA source in folders."""
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            files = []
            whole.update(part.encode())
        else:
            files = sorted(p for p in part.rglob("*") if p.suffix in SOURCES) if part.is_dir() else [part]
        for file in files:
            whole.update(f"\0{file.name}\0".encode() + file.read_bytes())
        whole.update(b"\0")
    return whole.hexdigest()[:16]


@functools.cache
def version(program: str) -> str:
    """What a compiler says it is, without its path."""
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def outcome(name: str, key: str) -> Iterator[None]:
    """The body is the check; the test is skipped where it has passed with this digest. With DDST_TEST_RECORD=1 a
    check that passes is recorded (one process at a time).
    """
    known = json.loads(FILE.read_text()) if FILE.is_file() else {}
    if known.get(name) == key and not scale.everything():
        pytest.skip("passed with the same sources, compiler and options when it was recorded (make test-all runs it)")
    yield
    if os.environ.get("DDST_TEST_RECORD") == "1":
        text = json.dumps(known | {name: key}, indent=1, sort_keys=True)
        FILE.write_text(f"{text}\n")
