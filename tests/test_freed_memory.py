"""Freed memory stays in the process: with page faults and resident memory to show it, and only where it holds."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_ddst

import ddst
from ddst import cli, freed_memory
from ddst.train import job

GLIBC = freed_memory.given_out() is not None
needs_glibc = pytest.mark.skipif(not GLIBC, reason="no glibc 2.33")

FAULTS = """
import json, resource, sys, torch
import ddst
kept = ddst.keep_freed_memory() if sys.argv[1] == "keep" else None
def round_():
    torch.ones(2**20 * 48, dtype=torch.uint8)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.set_num_threads(1)
for _ in range(3):
    round_()
before = faults()
for _ in range(5):
    round_()
print(json.dumps([kept, faults() - before]))
"""

KEPT_LOSSES = """
import json, os, sys
import ddst.benchmarks.freed_memory as module
import ddst, torch
ddst.keep_freed_memory()
torch.set_num_threads(1)
kept = []
def round_():
    block = torch.ones(2**20 * 32, dtype=torch.uint8)
    kept.append(torch.ones(100))
for _ in range(3):
    round_()
before = module.resident()
for _ in range(20):
    round_()
print(json.dumps((module.resident() - before) / 2**20))
"""


def run(program: str, *arguments: str, **environment: str) -> object:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "THP_"))
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *arguments],
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@needs_glibc
def test_with_it_a_tensor_that_is_made_again_needs_no_new_pages() -> None:
    # Aligned to pages: what is cut off in front of a block else keeps the first ones from being used again.
    kept, faults = run(FAULTS, "keep", THP_MEM_ALLOC_ENABLE="1")
    _, without = run(FAULTS, "not")
    assert kept is True
    assert faults < 500
    assert without > 5 * 48 * 256 / 2  # half of the pages of 4 KiB, at least


@needs_glibc
def test_pages_as_alignment_keep_a_list_of_losses_from_growing_the_process() -> None:
    assert run(KEPT_LOSSES, THP_MEM_ALLOC_ENABLE="1") < 40


def test_ddst_train_aligns_to_pages_where_nothing_else_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cli, "main", lambda: seen.append(os.environ["THP_MEM_ALLOC_ENABLE"]) or 0)
    for asked in ("0", None):
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
        if asked is not None:
            monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", asked)
        assert run_ddst.main() == 0
    assert seen == ["0", "1"]


def test_ddst_train_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: called.append("kept"))
    monkeypatch.setattr(job, "run", lambda given: called.append("ran") or 0)
    assert cli.main(["train", "--out", str(tmp_path)]) == 0
    assert called == ["kept", "ran"]


def test_without_glibc_or_with_another_allocator_it_says_false(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        """A C library, or an allocator in front of it, whose blocks glibc's books do not know."""

        def __init__(self, name: object) -> None:
            self.mallopt = lambda parameter, value: 1
            self.malloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(lambda size: 4096)
            self.free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda block: None)

    monkeypatch.setattr(freed_memory, "given_out", lambda: (100, 0))
    monkeypatch.setattr(ctypes, "CDLL", Other)
    assert ddst.keep_freed_memory() is False
    monkeypatch.setattr(freed_memory, "given_out", lambda: None)
    assert ddst.keep_freed_memory() is False


def test_no_mallinfo_is_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert freed_memory.given_out() is None


@needs_glibc
def test_a_setting_that_is_refused_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    before = freed_memory.given_out()
    monkeypatch.setattr(freed_memory, "given_out", lambda: before)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda parameter, value: 0))
    assert ddst.keep_freed_memory() is False
