"""What every test gets: fixed seeds, at most two threads, exact float32 products, hypothesis without randomness."""

from __future__ import annotations

import os

# Triton's own functions, like ddst's kernels, are decorated at import, and torch may import triton at any time.
# Programs that compile kernels are started without it.
os.environ["TRITON_INTERPRET"] = "1"
# Reports fit the terminal.
os.environ["COLUMNS"] = "100"

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("ddst", derandomize=True, deadline=None, print_blob=False)
settings.load_profile("ddst")

torch.set_num_threads(min(2, os.cpu_count() or 1))
torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poison_outputs() -> Iterator[None]:
    """Fills every tensor that is allocated without being written with NaN (integers: their largest value).

    An op that forgets a part of its output then fails its comparison instead of passing by luck. Reaches the C++
    kernels too: tests/test_poison.py proves it.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lists what tests counted: ``record_property("tally", ...)``."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "tally":
                terminalreporter.write_line(value)
