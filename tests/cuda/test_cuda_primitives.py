"""tests/cuda/*_device.cu, which check the device primitives on a GPU (``make gpu``), on the emulator."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ddst.benchmarks.gpu import primitives
from helpers import emulation, recorded

#: What each says at its end, and the architecture that it is for.
PROGRAMS = {
    "primitives_device.cu": ("on the emulator: 3178 checks, 0 failures", "sm_90"),
    "hopper_device.cu": ("on the emulator: 35 checks, 0 failures", "sm_90a"),
    "hopper_assumptions_device.cu": ("on the emulator: 28 checks, 0 failures", "sm_90a"),
}
NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc"))


def test_these_are_all() -> None:
    assert {source.name for source in primitives.SOURCES.glob("*_device.cu")} == PROGRAMS.keys()


@pytest.mark.skipif(emulation.compiler() is None, reason="needs g++ (or CXX)")
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_emulator_meets_what_is_expected_of_a_gpu(request: pytest.FixtureRequest, name: str) -> None:
    source, flags = emulation.TESTS / name, ("-x", "c++")
    with recorded.outcome(f"emulator: {name}", emulation.key(source, *flags, optimize="-O1")):
        folder = Path(request.config.cache.mkdir("cuda"))
        done = emulation.run_program(emulation.compile_program(source, folder, *flags, optimize="-O1"))
        assert done.returncode == 0, done.stdout
        assert PROGRAMS[name][0] in done.stdout


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("name", PROGRAMS)
def test_it_compiles_for_a_gpu(tmp_path: Path, name: str) -> None:
    assert NVCC is not None
    source, program = emulation.TESTS / name, tmp_path / "primitives"
    flags = ["-std=c++17", "-O3", primitives.code_for(PROGRAMS[name][1])]
    key = recorded.digest(recorded.version(NVCC), str(flags), source, emulation.KERNELS, emulation.TESTS)
    with recorded.outcome(f"nvcc: {name}", key):
        command = [NVCC, *flags, f"-I{emulation.KERNELS}", str(source), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert program.is_file()
