"""How much a test does: little enough for ``make test``, everything in ``make test-all`` (DDST_TEST_ALL=1)."""

from __future__ import annotations

import os


def everything() -> bool:
    """Whether this run is to leave nothing out, whatever it takes."""
    value = os.environ.get("DDST_TEST_ALL", "0")
    if value not in ("0", "1"):
        raise ValueError(f"DDST_TEST_ALL must be 0 or 1, got {value!r}")
    return value == "1"


def problems(normal: int, all: int) -> int:
    """How many problems a randomised test is to try: ``normal`` in ``make test``, ``all`` in ``make test-all``."""
    return all if everything() else normal
