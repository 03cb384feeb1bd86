"""The instruction sets that the library holds, and whether this machine has them."""

from __future__ import annotations

from pathlib import Path

import pytest

CAPABILITIES = {
    "portable": set[str](),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


def machine_flags() -> set[str]:
    """Features of this CPU as the kernel lists them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def skip_without(capability: str) -> None:
    """Skips the test where the machine lacks the instruction set."""
    if not CAPABILITIES[capability] <= machine_flags():
        pytest.skip(f"this CPU has no {capability}")
