"""The CUDA C++ primitives on the device itself: programs that test the wrappers the kernels are built on.

Every ``tests/cuda/*_device.cu`` is a program without arguments: it is compiled by nvcc for the device at hand, and must
end with exit code 0. The last line that it prints is kept. ``hopper_*`` are for sm_90a alone.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddst.benchmarks.gpu.budget import Deadline
from ddst.benchmarks.gpu.journal import NOTHING, Progress
from ddst.benchmarks.report import ROOT

SOURCES = ROOT / "tests" / "cuda"
INCLUDE = ROOT / "csrc" / "cuda"
FLAGS = ("-std=c++17", "-O2", "-lineinfo")


def code_for(architecture: str) -> str:
    """nvcc's option. ``-arch=sm_90a`` would compile a program for compute_90, too, which lacks instructions.

    >>> code_for("sm_90a")
    '-gencode=arch=compute_90a,code=sm_90a'
    """
    return f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"


def run_all(
    architecture: str,
    deadline: Deadline,
    sources: Path = SOURCES,
    compiler: Sequence[str] = ("nvcc",),
    progress: Progress = NOTHING,
) -> dict[str, Any]:
    """The part "primitives": program -> its last line; ``wrong``: those that failed or did not compile.

    Args:
        architecture: such as "sm_90a".
    """
    part: dict[str, Any] = {"programs": {}, "wrong": []}
    found = sorted(sources.glob("*_device.cu"))
    programs = [p for p in found if architecture == "sm_90a" or not p.name.startswith("hopper_")]
    if not programs:
        return part | {"missing": "no tests/cuda/*_device.cu in this tree"}
    if shutil.which(compiler[0]) is None:
        return part | {"missing": f"no {compiler[0]} on this machine: {len(programs)} programs were not compiled"}
    with tempfile.TemporaryDirectory() as folder:
        for source in programs:
            proven = progress.earlier(source.stem)
            if proven is not None:
                part["programs"][source.stem] = f"{proven['said']} ({proven['earlier']})"
                continue
            binary = Path(folder, source.stem)
            command = [*compiler, *FLAGS, code_for(architecture), f"-I{INCLUDE}", str(source), "-o", str(binary)]
            said, trouble = _run(command, deadline)
            if trouble is None:
                said, trouble = _run([str(binary)], deadline)
            part["programs"][source.stem] = said
            if trouble is not None:
                part["wrong"].append(f"{source.stem}: {trouble}: {said}")
            progress.keep(source.stem, {"said": said}, part, trouble is None)
    return part


def _run(command: Sequence[str], deadline: Deadline) -> tuple[str, str | None]:
    """``(last line of output, what went wrong or None)``."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, deadline.left))
    except subprocess.TimeoutExpired:
        return "", "did not end in time"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return (lines[-1] if lines else ""), None if done.returncode == 0 else f"exit code {done.returncode}"
