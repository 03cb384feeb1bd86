"""The compiled CUDA kernels: no spills, registers as recorded, the instructions that make them fast.

Architectures that the built library holds no code for are compiled where sources, compiler or options are not those of
the record, and in ``make test-all``.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest

from ddst import _extension
from helpers import cuda_resources, scale

RECORD = json.loads(cuda_resources.RECORD.read_text())
pytestmark = [
    pytest.mark.skipif(not _extension.CUDA_LIBRARY.is_file(), reason="built without libddst_cuda.so"),
    pytest.mark.skipif(cuda_resources.tool() is None, reason="needs cuobjdump (CUDA toolkit, or triton's package)"),
]


def recorded_as_is(arch: str) -> bool:
    return bool(RECORD["keys"].get(arch) == cuda_resources.key(arch))


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, dict[str, int]]]:
    found = cuda_resources.resources()
    stale = [arch for arch in cuda_resources.ARCHITECTURES if scale.everything() or not recorded_as_is(arch)]
    if stale and cuda_resources.nvcc() is None:
        pytest.skip("needs nvcc: the kernels are not those that were recorded")
    return found | {arch: cuda_resources.compiled(arch) for arch in stale if arch not in found}


def test_no_spills_and_no_local_memory(resources: dict[str, dict[str, dict[str, int]]]) -> None:
    assert resources
    for kernels in resources.values():
        assert {name: numbers for name, numbers in kernels.items() if numbers["STACK"] or numbers["LOCAL"]} == {}


def test_registers_are_the_recorded_ones(resources: dict[str, dict[str, dict[str, int]]]) -> None:
    if cuda_resources.compiler() != RECORD["compiler"]:
        pytest.skip(f"recorded with {RECORD['compiler']}, built with {cuda_resources.compiler()}")
    for arch, kernels in resources.items():
        assert {name: numbers["REG"] for name, numbers in kernels.items()} == RECORD["registers"][arch]
    stale = [arch for arch in cuda_resources.ARCHITECTURES if not recorded_as_is(arch)]
    assert not stale, "the kernels are not those that were recorded: make record-kernels"


def test_the_record_is_whole() -> None:
    assert set(RECORD["registers"]) == set(cuda_resources.ARCHITECTURES)


def test_weight_gradients_leave_room_for_two_blocks_of_threads(
    resources: dict[str, dict[str, dict[str, int]]],
) -> None:
    for arch, kernels in resources.items():
        if arch == "sm_90a":
            continue  # whose kernels take a multiprocessor each
        starts = ("weight_grad<", "fused_weight_grad<")
        counts = {name: numbers["REG"] for name, numbers in kernels.items() if name.startswith(starts)}
        assert len(counts) == 24
        two = [count for name, count in counts.items() if "tf32x3" not in name]
        assert max(two) <= 128  # 2 · 256 threads · 128 registers are a multiprocessor's 65536


@pytest.fixture(scope="module")
def sass(resources: dict[str, dict[str, dict[str, int]]]) -> dict[str, Counter[str]]:
    return cuda_resources.instructions("sm_90" if "sm_90" in resources else next(iter(resources)))


def count(instructions: Counter[str], start: str, *parts: str) -> int:
    return sum(n for name, n in instructions.items() if name.startswith(start) and all(part in name for part in parts))


def test_tensor_cores_and_wide_copies(sass: dict[str, Counter[str]]) -> None:
    starts = ("conv2d_gather<", "weight_grad<", "fused_weight_grad<")
    kernels = {name: counts for name, counts in sass.items() if name.startswith(starts)}
    assert len(kernels) == 52
    for name, counts in kernels.items():
        wide = "float" in name or "tf32x3" in name
        assert count(counts, "HMMA.1688" if wide else "HMMA.16816", "TF32" if wide else "F32") >= 16, name
        assert count(counts, "LDGSTS", "128") >= 2, name
        assert count(counts, "LDL") == count(counts, "STL") == 0, name
        if not wide:
            assert count(counts, "LDSM", "88.4") >= 2, name
            if "weight_grad<" in name:
                assert count(counts, "LDSM", ".M88.4") == 0, name  # both operands are transposed on the way
