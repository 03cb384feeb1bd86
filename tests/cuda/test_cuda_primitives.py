"""tests/cuda/primitives_device.cu, which checks the device primitives on a GPU (``make gpu``), on the emulator."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import emulation, recorded

SOURCE = emulation.TESTS / "primitives_device.cu"
NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc"))


@pytest.mark.skipif(emulation.compiler() is None, reason="needs g++ (or CXX)")
def test_the_emulator_meets_what_is_expected_of_a_gpu(request: pytest.FixtureRequest) -> None:
    flags = ("-x", "c++")
    with recorded.outcome(f"emulator: {SOURCE.name}", emulation.key(SOURCE, *flags, optimize="-O1")):
        folder = Path(request.config.cache.mkdir("cuda"))
        done = emulation.run_program(emulation.compile_program(SOURCE, folder, *flags, optimize="-O1"))
        assert done.returncode == 0, done.stdout
        assert "on the emulator: 3178 checks, 0 failures" in done.stdout


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_it_compiles_for_a_gpu(tmp_path: Path) -> None:
    assert NVCC is not None
    program = tmp_path / "primitives"
    flags = ["-std=c++17", "-O3", "-arch=sm_90"]
    key = recorded.digest(recorded.version(NVCC), str(flags), SOURCE, emulation.KERNELS, emulation.TESTS)
    with recorded.outcome(f"nvcc: {SOURCE.name}", key):
        command = [NVCC, *flags, f"-I{emulation.KERNELS}", str(SOURCE), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert program.is_file()
