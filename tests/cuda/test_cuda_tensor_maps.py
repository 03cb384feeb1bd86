"""Tensor maps as csrc/cuda/tensor_maps.cu hands them to the driver, which tests/cuda/driver_tensor_maps.cpp plays."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import emulation, recorded

SOURCE = emulation.TESTS / "driver_tensor_maps.cpp"
NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc"))


def headers() -> Path | None:
    """The CUDA toolkit's header folder as nvcc says it, None if there is none."""
    if NVCC is None:
        return None
    command = [NVCC, "--dryrun", "-E", "-x", "cu", os.devnull]
    said = re.search(r'INCLUDES="-I(.+?)"', subprocess.run(command, capture_output=True, text=True).stderr)
    folder = Path(said[1]).resolve() if said else None
    return folder if folder is not None and (folder / "cudaTypedefs.h").is_file() else None


@pytest.mark.skipif(emulation.compiler() is None or headers() is None, reason="needs g++ (or CXX) and CUDA's headers")
def test_what_the_driver_is_asked_and_what_the_cache_keeps(request: pytest.FixtureRequest) -> None:
    include = headers()
    assert include is not None
    flags = ("-isystem", str(include))
    version = recorded.digest(include / "cuda.h", include / "cudaTypedefs.h")
    with recorded.outcome(f"emulator: {SOURCE.name}", emulation.key(SOURCE, version)):
        program = emulation.compile_program(SOURCE, Path(request.config.cache.mkdir("cuda")), *flags)
        for arguments in ((), ("without",)):
            done = emulation.run_program(program, *arguments)
            assert done.returncode == 0 and " checks, 0 failures" in done.stdout, done.stdout
