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
from pathlib import Path

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


# Files of 20 seconds or more on two quiet cores, the longest first. Two processes share out files in this order, the
# others after them: a long one at the end would leave the other process with nothing to do.
LONG = """
kernels/test_kernels_gather.py distributed/test_ranks.py cuda/test_cuda_weight_grad.py ops/test_ops_cpu_paths.py
train/test_quality.py train/test_resume.py test_examples.py benchmarks/test_bench_gpu.py train/test_damage.py
kernels/test_kernels_half_block.py cuda/test_cuda_gather_mutants.py cuda/test_cuda_float32.py test_cli.py
ops/test_ops_norm_act_conv2d.py benchmarks/test_bench_goals.py kernels/test_kernels_weight_grad.py
kernels/test_kernels_layers.py kernels/test_kernels_launch.py distributed/test_processes.py ops/test_ops_guard_pages.py
benchmarks/test_bench_against.py benchmarks/test_bench_paper.py test_wheel.py test_doctests.py
kernels/test_kernels_index.py kernels/test_kernels_compile.py
"""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the order of ``LONG``; files stay whole, and the others in their order."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG.split())}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lists what tests counted: ``record_property("tally", ...)``."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "tally":
                terminalreporter.write_line(value)
