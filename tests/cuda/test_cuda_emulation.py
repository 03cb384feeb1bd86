"""The CUDA kernels, compiled by g++ on an emulator: every tests/cuda/test_*.cpp is a program that checks one thing.

The emulator runs a thread block as fibers and stops at a race, an access out of bounds or uninitialised, a read of a
copy in flight, a divergent warp operation or a second write of an output (tests/cuda/emulator). It proves the kernels'
logic; the instructions themselves (csrc/cuda/device/primitives_ptx.cuh) run on a GPU only.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import emulation

PROGRAMS = sorted(emulation.TESTS.glob("test_*.cpp"))

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="needs g++ (or CXX)")


@pytest.fixture(scope="module")
def programs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Path]]]:
    """Every program, being compiled two at a time, into pytest's cache."""
    folder = Path(request.config.cache.mkdir("cuda"))
    pool = ThreadPoolExecutor(2)
    yield {source.stem: pool.submit(emulation.compile_program, source, folder) for source in PROGRAMS}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", [source.stem for source in PROGRAMS])
def test_program(programs: dict[str, Future[Path]], name: str) -> None:
    done = emulation.run_program(programs[name].result())
    print(done.stdout)
    assert done.returncode == 0, f"{name} failed:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " checks, 0 failures" in done.stdout
