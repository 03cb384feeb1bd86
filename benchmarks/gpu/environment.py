"""What the figures depend on: device, versions, and the rates this device reaches."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import ddst
from ddst.benchmarks.gpu.timing import Program, precision, watch_of
from ddst.benchmarks.report import commit, cpu_model
from ddst.measure import Peak

#: How products are computed, by the name of the rows: dtype and torch's precision flag.
KINDS = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}


def describe(device: str) -> dict[str, Any]:
    """Names and versions; nothing is measured."""
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": os.environ.get("DDST_COMMIT") or commit(),
        "device": "cpu",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "versions": {
            "ddst": ddst.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _installed("triton"),
            "numpy": _installed("numpy"),
        },
        "build": {name: said for name, said in ddst.build_info().items() if name != "library"},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
        facts["versions"] |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
            "nvcc": _said(["nvcc", "--version"], "release"),
        }
    return facts


def measure(device: str, size: int = 8192, copied: int = 2**31) -> dict[str, Any]:
    """The rates that floors are made of, on random data.

    ``copy_bytes_per_s``: of a large copy, read plus written. ``l2_bytes_per_s``: the same for tensors that stay in the
    L2 cache, from the *difference* of two sizes, as at these much of the time is the gap between two kernels (None
    where the larger took no longer). ``flops_per_s``: of ``size³`` matrix products, by the names of :data:`KINDS`.

    Args:
        size: side of the matrices. copied: bytes of the large copy.
    """
    watch = watch_of(device)

    def median(work: Callable[[], object], rounds: int = 9) -> float:
        program = Program(watch, [work])
        return statistics.median(program.seconds() for _ in range(rounds))

    def pass_over(elements: int) -> float:
        source = torch.rand(elements, device=device)
        target = torch.empty_like(source)
        return median(lambda: torch.add(source, 1.0, out=target))

    rates = {}
    for name, (dtype, mode) in KINDS.items():
        with precision(mode):
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            rates[name] = 2 * size**3 / median(lambda a=a, b=b: a @ b)
    source = torch.rand(copied // 4, device=device)
    target = torch.empty_like(source)
    small, large = (mebibytes * 2**18 for mebibytes in (4, 12))  # elements; source and target of both fit into L2
    longer = pass_over(large) - pass_over(small)
    return {
        "copy_bytes_per_s": 2 * 4 * source.numel() / median(lambda: target.copy_(source)),
        "l2_bytes_per_s": 2 * 4 * (large - small) / longer if longer > 0 else None,
        "flops_per_s": rates,
    }


def peak_of(environment: dict[str, Any], kind: str) -> Peak:
    """What the measured environment allows products of a kind: operations and bytes per second."""
    return Peak(environment["flops_per_s"][kind], environment["copy_bytes_per_s"])


def slug(name: str) -> str:
    """A device's name as a folder's.

    >>> slug("NVIDIA H200")
    'nvidia-h200'
    """
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(command: list[str], line_with: str = "") -> str | None:
    """The line of a program's output that holds a word, or None where there is no such program."""
    if shutil.which(command[0]) is None:
        return None
    output = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    return next((line.strip() for line in output.splitlines() if line_with in line), None)
