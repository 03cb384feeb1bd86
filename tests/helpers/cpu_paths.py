"""The instruction sets that the library holds, whether this machine has them, and programs that run on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ddst

CAPABILITIES = {
    "portable": set[str](),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "neon": {"asimd"},
}


def machine_flags() -> set[str]:
    """Features of this CPU as the kernel lists them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def skip_without(capability: str) -> None:
    """Skips the test where the machine lacks the instruction set."""
    if not CAPABILITIES[capability] <= machine_flags():
        pytest.skip(f"this CPU has no {capability}")


def environment_with(capability: str, **variables: str) -> dict[str, str]:
    """The environment of a program on an instruction set ("": the one that the library chooses)."""
    # glibc fills every allocation with 0x7f bytes (3e38 as float): scratch memory that is read unwritten shows.
    environment = {**os.environ, "DDST_CPU_CAPABILITY": capability, "MALLOC_PERTURB_": "128", **variables}
    # The folder that ddst was imported from, so that an uninstalled checkout is tested too.
    root = str(Path(ddst.__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return environment


def run_with(
    capability: str, *arguments: str, timeout: float | None = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments in such an environment."""
    environment = environment_with(capability, **variables)
    return subprocess.run(
        [sys.executable, "-P", *arguments], env=environment, capture_output=True, text=True, timeout=timeout
    )
