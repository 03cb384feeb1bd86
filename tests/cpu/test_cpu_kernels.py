"""The CPU kernels by their interface of raw pointers, without torch: on this machine, and on an emulated Arm processor.

Every operand, output and workspace ends at a page without permissions and begins as NaN (tests/helpers/guard_heap.cpp);
results lie within the bound of any order of summation around sums in float64.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ddst._extension import CPU_CAPABILITIES
from helpers import scale
from helpers.cpu_paths import skip_without
from helpers.cpu_program import ARM_BUILD, NATIVE_BUILD, build_program, compiled_kernels, cross_compile
from helpers.emulation import compiler

ARM_COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
SYSROOT = "/usr/aarch64-linux-gnu"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cxx = compiler()
    if cxx is None or not compiled_kernels(NATIVE_BUILD):
        pytest.skip(f"needs g++ (or CXX) and the build folder {NATIVE_BUILD}")
    return build_program(cxx, NATIVE_BUILD, tmp_path_factory.mktemp("native") / "kernels")


@pytest.fixture(scope="module")
def arm_library() -> Path:
    if not scale.everything():
        pytest.skip("cross-compiles for minutes: make test-arm or make test-all")
    missing = [program for program in (ARM_COMPILER, QEMU) if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}: apt-get install g++-aarch64-linux-gnu qemu-user")
    return cross_compile()


@pytest.fixture(scope="module")
def arm(arm_library: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    program = build_program(ARM_COMPILER, ARM_BUILD, tmp_path_factory.mktemp("arm") / "kernels")
    return [QEMU, "-L", SYSROOT, str(program)]


def check(command: list[str], least: int) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    name, results = done.stdout.split(": ")
    assert name in command and int(results.split()[0]) > least and results.endswith(" 0 wrong\n")


@pytest.mark.parametrize("capability", CPU_CAPABILITIES)
def test_every_form_against_float64(native: Path, capability: str) -> None:
    skip_without(capability)
    check([str(native), capability], 1500)


@pytest.mark.parametrize("capability", ["neon", "portable"])
def test_every_form_on_an_emulated_arm_processor(arm: list[str], capability: str) -> None:
    check([*arm, capability, "all"], 2500)


def test_the_cross_compiled_library_is_one_for_arm_and_names_torchs(arm_library: Path) -> None:
    image = arm_library.read_bytes()
    assert image[:4] == b"\x7fELF" and int.from_bytes(image[18:20], "little") == 183  # EM_AARCH64
    assert b"\0libtorch_cpu.so\0" in image


@pytest.mark.parametrize(
    "forced, expected",
    [
        ("", f"code {CPU_CAPABILITIES.index('neon')}"),
        ("neon", f"code {CPU_CAPABILITIES.index('neon')}"),
        ("portable", f"code {CPU_CAPABILITIES.index('portable')}"),
        ("avx2", "DDST_CPU_CAPABILITY is 'avx2', which this processor does not support"),
        ("sve", "DDST_CPU_CAPABILITY is 'sve', expected portable, avx2, avx512 or neon"),
    ],
)
def test_the_set_chosen_on_arm(arm: list[str], forced: str, expected: str) -> None:
    environment = os.environ | {"DDST_CPU_CAPABILITY": forced}
    done = subprocess.run(arm, env=environment, capture_output=True, text=True, check=False)
    assert expected in done.stdout and (done.returncode == 0) == expected.startswith("code")
