"""The CUDA kernels, compiled by g++ on an emulator: every tests/cuda/test_*.cpp is a program that checks one thing.

The emulator runs a thread block as fibers and stops at a race, an access out of bounds or uninitialised, a read of a
copy in flight, a divergent warp operation or a second write of an output (tests/cuda/emulator). It proves the kernels'
logic; the instructions themselves (csrc/cuda/device/primitives_ptx.cuh) run on a GPU only.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import emulation, recorded

PROGRAMS = sorted(emulation.TESTS.glob("test_*.cpp"))

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="needs g++ (or CXX)")


@pytest.mark.parametrize("source", PROGRAMS, ids=lambda source: source.stem)
def test_program(request: pytest.FixtureRequest, source: Path) -> None:
    with recorded.outcome(f"emulator: {source.name}", emulation.key(source)):
        folder = Path(request.config.cache.mkdir("cuda"))
        done = emulation.run_program(emulation.compile_program(source, folder))
        print(done.stdout)
        assert done.returncode == 0, f"{source.name} failed:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
        assert " checks, 0 failures" in done.stdout
