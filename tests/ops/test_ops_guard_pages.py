"""No operator touches a byte beside its operands, outputs and workspaces, on any instruction set."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.cpu_paths import CAPABILITIES, run_with, skip_without
from helpers.guard_pages import GuardedArea
from helpers.problems import large_problems

CHECK = str(Path(__file__).resolve().parents[1] / "helpers" / "check_guard_pages.py")
MOST_KILLS = 5  # then it is known well enough that it is broken


def check_seeds(first: int, last: int, capability: str, preload: str, folder: Path) -> str:
    """Runs the problems of the seeds first .. last - 1 in a process, in the next one where it is killed; the tally."""
    count, wrong, kills = last - first, [], []
    progress = folder / "now"
    while first < last and len(kills) < MOST_KILLS:
        progress.write_text("")
        arguments = CHECK, str(first), str(last), str(progress)
        done = run_with(capability, *arguments, timeout=None, LD_PRELOAD=preload, OMP_WAIT_POLICY="passive")
        if done.returncode == 0:
            report = json.loads(done.stdout)
            assert (report["capability"], report["problems"]) == (capability, last - first)
            wrong += report["wrong"]
            break
        at = progress.read_text().partition("\n")[0]
        assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT) and at, done.stderr[-3000:]
        kills.append(f"{signal.Signals(-done.returncode).name} in {at} {done.stderr[-300:]}")
        first = int(at.removeprefix("seed ").partition(":")[0]) + 1
    assert not wrong and not kills, "\n".join([f"{capability}:", *kills, *wrong[:20]])
    return f"guard pages, {capability}: {count} problems, 0 wrong, 0 stray reads or writes"


@pytest.mark.parametrize("number, capability", list(enumerate(CAPABILITIES)))
def test_nothing_beside_the_operands_is_touched(
    number: int, capability: str, guarded_heap: str, tmp_path: Path, record_property
) -> None:
    skip_without(capability)
    record_property("tally", check_seeds(1000 * number, 1000 * number + 800, capability, guarded_heap, tmp_path))


@pytest.mark.torture
@pytest.mark.parametrize("number, capability", list(enumerate(CAPABILITIES)))
def test_nothing_beside_the_operands_is_touched_in_50000_problems(
    number: int, capability: str, guarded_heap: str, tmp_path: Path, record_property
) -> None:
    skip_without(capability)
    first, last = 10_000 + 50_000 * number // 3, 10_000 + 50_000 * (number + 1) // 3
    record_property("tally", check_seeds(first, last, capability, guarded_heap, tmp_path))


@pytest.mark.torture
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_beside_the_operands_of_large_problems_is_touched(
    capability: str, guarded_heap: str, tmp_path: Path, record_property
) -> None:
    skip_without(capability)
    count = len(list(large_problems()))
    record_property("tally", check_seeds(-count, 0, capability, guarded_heap, tmp_path))


def ended_by(act: Callable[[], object]) -> int:
    """How a copy of this process that does only this ends."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # pytest's would write a traceback
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("at, inside, outside", [("end", 11, 12), ("start", 0, -1)])
def test_an_area_ends_at_a_byte(at: str, inside: int, outside: int) -> None:
    placed = GuardedArea(1).place(torch.zeros(3), at)
    first = placed.data_ptr()
    assert ended_by(lambda: ctypes.string_at(first + inside, 1)) == 0
    assert ended_by(lambda: ctypes.string_at(first + outside, 1)) == -signal.SIGSEGV


@pytest.mark.parametrize("at", ["end", "start"])
def test_an_area_holds_what_was_placed(at: str) -> None:
    t = torch.arange(12.0).view(3, 4).t()
    placed = GuardedArea(1).place(t, at)
    assert placed.stride() == t.stride() and torch.equal(placed, t)


WRITE_BESIDE = """
import ctypes, sys
heap = ctypes.CDLL(None)
heap.aligned_alloc.restype, heap.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
heap.guard_heap(1)
p = heap.aligned_alloc(ctypes.c_size_t(64), ctypes.c_size_t(12))
ctypes.memset(p + int(sys.argv[1]), 0, 1)
heap.free(p)
"""


@pytest.mark.parametrize(
    "offset, signal_number", [(11, 0), (12, signal.SIGABRT), (-1, signal.SIGABRT), (64, signal.SIGSEGV)]
)
def test_the_heap_sees_a_byte_written_beside_an_allocation(offset: int, signal_number: int, guarded_heap: str) -> None:
    done = run_with("portable", "-c", WRITE_BESIDE, str(offset), LD_PRELOAD=guarded_heap)
    assert done.returncode == -signal_number, done.stderr
