"""The memory of many iterations: what is read, what counts as flat, and the command."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap

import pytest
import torch

from ddst.benchmarks import __main__ as command
from ddst.benchmarks import memory_over_time as module
from ddst.benchmarks import registry
from ddst.benchmarks.memory_over_time import Memory, allocated_bytes, growth, memory_now

MIB = 2**20


def test_both_figures_see_a_tensor_that_is_kept() -> None:
    before = memory_now(1)
    kept = torch.ones(64 * MIB, dtype=torch.uint8)
    between = memory_now(2)
    # Fresh pages: what is allocated may lie in memory that the process had freed and kept.
    pages = mmap.mmap(-1, 64 * MIB)
    pages.write(b"1" * (64 * MIB))
    after = memory_now(3)
    assert kept.numel() == len(pages) == 64 * MIB
    assert 60 * MIB < after.resident - between.resident < 150 * MIB
    assert before.allocated is not None
    assert between.allocated is not None
    assert 63 * MIB < between.allocated - before.allocated < 66 * MIB


def test_allocated_bytes_see_small_blocks() -> None:
    if allocated_bytes() is None:
        pytest.skip("no glibc 2.33")
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    before = allocated_bytes()
    blocks = [libc.malloc(1000) for _ in range(4000)]
    grown = allocated_bytes()
    for block in blocks:
        libc.free(block)
    assert before is not None
    assert grown is not None
    assert 4_000_000 < grown - before < 4_500_000


def test_growth_is_judged_from_a_step_on_by_the_means_of_quarters() -> None:
    resident = [50, 100, 102, 90, 110, 101, 101, 100, 106]
    samples = [Memory(100 * i, value, 2 * value) for i, value in enumerate(resident)]
    assert growth(samples, 100) == {"resident": 0.019802, "allocated": 0.019802}  # 206 / 202
    assert growth([Memory(1, 100, None), Memory(2, 100, None)], 1) == {"resident": 0.0}


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.GANS, "tiny", {"preset": "sngan32", "resolution": 16, "width_g": 16, "width_d": 16})


@pytest.mark.usefixtures("_tiny")
@pytest.mark.skipif(importlib.util.find_spec("ddst.train") is None, reason="this build holds no training")
def test_the_command_runs_iterations_and_judges(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["memory-over-time", "--layer", "tiny", "--block", "8x8", "--density", "0.5", "--steps", "6", "--every", "2"]
    code = command.main([*line, "--from-step", "4"])
    printed = capsys.readouterr().out.splitlines()
    assert [text.split(":")[0].split() for text in printed[1:-1]] == [["step", "2"], ["step", "4"], ["step", "6"]]
    assert all("MiB resident" in text for text in printed[1:-1])
    assert printed[-1].startswith("flat" if code == 0 else "NOT flat")

    grows = iter(range(100))
    monkeypatch.setattr(module, "memory_now", lambda step: Memory(step, 100 * MIB + next(grows) * 2 * MIB, MIB))
    assert command.main([*line, "--from-step", "4"]) == 1
    assert "NOT flat to 1 % from step 4 on: resident 1.96 %, allocated 0.00 %" in capsys.readouterr().out
    monkeypatch.setattr(module, "memory_now", lambda step: Memory(step, 100 * MIB, MIB))
    assert command.main([*line, "--from-step", "4"]) == 0


@pytest.mark.parametrize("line", [["--steps", "250"], ["--from-step", "2000"], ["--every", "0"], ["--layer", "none"]])
def test_options_that_leave_nothing_to_judge_are_refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["memory-over-time", *line])
    assert line[0] in capsys.readouterr().err
