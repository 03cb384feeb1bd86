"""Compiles the test programs of tests/cuda: CUDA kernels that g++ builds on an emulator of the device."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from helpers import recorded

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "cuda"
TESTS = ROOT / "tests" / "cuda"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes")


def compiler() -> str | None:
    """The C++ compiler, None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def key(source: Path, *flags: str, optimize: str = "-O2", kernels: Path = KERNELS) -> str:
    """What a test program and its outcome depend on: every source that it may include, the compiler, the options."""
    cxx = compiler()
    assert cxx is not None, "no C++ compiler: install g++ or set CXX"
    return recorded.digest(source, kernels, TESTS, recorded.version(cxx), " ".join((optimize, *flags, *WARNINGS)))


def compile_program(source: Path, folder: Path, *flags: str, kernels: Path = KERNELS, optimize: str = "-O2") -> Path:
    """Compiles one test program into ``folder``, unless an equal one is there; a compiler error is an AssertionError.

    Args:
        kernels: the folder of the kernels' sources, another one to test a changed copy.
    """
    cxx = compiler()
    assert cxx is not None, "no C++ compiler: install g++ or set CXX"
    program = folder / f"{source.stem}-{key(source, *flags, optimize=optimize, kernels=kernels)}"
    partial = program.with_suffix(".partial")
    command = [cxx, "-std=c++20", optimize, "-g1", *WARNINGS, *flags, f"-I{kernels}", f"-I{TESTS}"]
    with program.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process that wants the same waits for it
        if not program.exists():
            done = subprocess.run(
                [*command, str(source), "-o", str(partial)], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{source.name} does not compile:\n{done.stderr[:8000]}"
            partial.rename(program)
    return program


def run_program(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a test program; its exit status is 0 if all its checks hold."""
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
