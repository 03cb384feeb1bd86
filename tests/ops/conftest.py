"""Operator tests run on one thread; what depends on the number of threads is tested by setting it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from helpers.guard_pages import build_guarded_heap


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small problems run faster so, and the results do not depend on the machine's number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def guarded_heap(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library to preload that guards what is allocated, and lets allocations fail (guard_heap.cpp)."""
    return str(build_guarded_heap(tmp_path_factory.mktemp("guard_heap")))
