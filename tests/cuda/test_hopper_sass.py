"""What nvcc makes of the kernels for sm_90a: nothing that takes back what makes them fast, registers as recorded.

Kernels with each fault in them (tests/cuda/planted_hopper.cu) show that it would be found.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import cuda_resources, emulation, hopper_sass, recorded

PLANTED = emulation.TESTS / "planted_hopper.cu"
SOURCES = sorted(cuda_resources.KERNELS.glob(cuda_resources.HOPPER))
#: What a kernel must have: bulk copies, the products of its kind, and registers that the copying warps hand over (which
#: the compiler leaves out where launch bounds do not say how many blocks there are).
HAS = {"planted": ("UTMALDG", "HGMMA", "USETMAXREG")}
HAS |= {"hopper_gather": HAS["planted"], "hopper_weight_grad": ("UTMALDG", "HMMA", "USETMAXREG")}
HAS |= {"hopper_fused_weight_grad": HAS["hopper_weight_grad"]}
pytestmark = [
    pytest.mark.skipif(cuda_resources.nvcc() is None, reason="needs nvcc"),
    pytest.mark.skipif(cuda_resources.tool() is None, reason="needs cuobjdump (CUDA toolkit, or triton's package)"),
]


def key(source: Path) -> str:
    """What the compiled kernels of a file depend on, and what is asked of them."""
    nvcc = cuda_resources.nvcc()
    assert nvcc is not None
    helper = Path(hopper_sass.__file__)
    return recorded.digest(
        source, cuda_resources.KERNELS, recorded.version(nvcc), str(hopper_sass.FLAGS), helper, Path(__file__)
    )


@pytest.fixture(scope="module")
def planted() -> dict[str, hopper_sass.Kernel]:
    return hopper_sass.compile_kernels(PLANTED)


@pytest.mark.parametrize(
    ("slip", "fault"),
    [
        ("thread", "a loop over lanes"),
        ("print", "serialized due to wgmma pipeline crossing function boundary"),
        ("cluster", "drops the first-level cache"),
        ("spill", "spills"),
        ("registers", "has no USETMAXREG"),
        ("no_copy", "has no UTMALDG"),
        ("no_product", "has no HGMMA"),
    ],
)
def test_a_planted_fault_is_found(planted: dict[str, hopper_sass.Kernel], slip: str, fault: str) -> None:
    found = hopper_sass.faults(planted[f"planted_{slip}"], HAS["planted"])
    assert any(fault in text for text in found), found


def test_none_is_found_where_none_is_planted(planted: dict[str, hopper_sass.Kernel]) -> None:
    assert hopper_sass.faults(planted["planted_none"], HAS["planted"]) == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_kernels_are_compiled_without_a_fault_and_with_the_recorded_registers(source: Path) -> None:
    with recorded.outcome(f"sass: {source.name}", key(source)):
        kernels = hopper_sass.compile_kernels(source)
        record = json.loads(cuda_resources.RECORD.read_text())
        assert kernels
        for name, kernel in kernels.items():
            assert hopper_sass.faults(kernel, HAS[name.partition("<")[0]]) == [], name
        if cuda_resources.compiler() == record["compiler"]:
            assert {name: kernel.registers for name, kernel in kernels.items()}.items() <= record["registers"][
                "sm_90a"
            ].items()
