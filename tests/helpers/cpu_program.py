"""Builds tests/cpu's program: the CPU kernels and the glue that plans them, without torch's library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
TORCH_INCLUDE = Path(torch.__file__).parent / "include"
#: Where setup.py compiles, and where the toolchain file's own comment does.
NATIVE_BUILD = ROOT / "build" / f"cmake-{sysconfig.get_platform()}"
ARM_BUILD = ROOT / "build" / "cmake-linux-aarch64"
FLAGS = ("-std=c++17", "-O1", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")


def compiled_kernels(build: Path) -> list[Path]:
    """The kernel sets and their choice as CMake compiled them for libddst.so; empty where it has not."""
    folder = build / "CMakeFiles" / "ddst.dir" / "csrc" / "cpu"
    return sorted([*folder.glob("kernels_*.o"), *folder.glob("dispatch*.o")])


def build_program(cxx: str, build: Path, program: Path) -> Path:
    """Compiles the program with the kernels of a build folder; a compiler error is an AssertionError."""
    sources = [*sorted((ROOT / "tests" / "cpu").glob("*.cpp")), ROOT / "tests" / "helpers" / "guard_heap.cpp"]
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cpu'}", "-isystem", str(TORCH_INCLUDE)]
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    command = [cxx, *FLAGS, *include, target, *map(str, [*sources, *compiled_kernels(build)]), "-o", str(program)]
    run(command)
    return program


def cross_compile() -> Path:
    """libddst.so for AArch64, by the toolchain file as CONTRIBUTING says."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    assert cmake is not None, "no cmake"
    toolchain = ROOT / "cmake" / "aarch64-linux-gnu.cmake"
    options = ["-G", "Ninja", "--toolchain", str(toolchain), f"-DDDST_TORCH_INCLUDE={TORCH_INCLUDE}"]
    run([cmake, "-S", str(ROOT), "-B", str(ARM_BUILD), *options, "-DDDST_BUILD_CUDA=OFF"])
    run([cmake, "--build", str(ARM_BUILD), "--target", "ddst"])
    return ARM_BUILD / "libddst.so"


def run(command: list[str]) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout
