"""What the compiler made of every CUDA kernel: registers, local memory, instructions, read from libddst_cuda.so.

``python -P tests/helpers/cuda_resources.py > tests/cuda/resources.json`` records the built library's registers.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import ddst
from ddst import _extension


def tool() -> str | None:
    """``cuobjdump`` from the CUDA toolkit or from Triton's package."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = shutil.which("cuobjdump", path=str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    return found


def compiler() -> str:
    """The CUDA compiler that made the library."""
    return ddst.build_info()["cuda_architectures"].partition(" by ")[2]


def _dump(*options: str) -> str:
    program = tool()
    assert program is not None
    dump = subprocess.run(
        [program, *options, str(_extension.CUDA_LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    names = subprocess.run(["c++filt"], input=dump, capture_output=True, text=True, check=True).stdout
    return re.sub(r"ddst::(cuda|dev)::|void (?=ddst)", "", names)


def resources() -> dict[str, dict[str, dict[str, int]]]:
    """``{architecture: {kernel: {"REG": …, "STACK": …, "LOCAL": …}}}``."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    arch = kernel = ""
    for line in _dump("--dump-resource-usage").splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith(" Function "):
            kernel = line.removeprefix(" Function ").removeprefix("void ").partition("(")[0]
        elif "REG:" in line:
            numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
            found.setdefault(arch, {})[kernel] = numbers
    return found


def instructions(arch: str) -> dict[str, Counter[str]]:
    """``{kernel: how often each instruction stands in its machine code}``."""
    found: dict[str, Counter[str]] = {}
    kernel = ""
    for line in _dump("-arch", arch, "-sass").splitlines():
        if "Function : " in line:
            kernel = line.partition("Function : ")[2].removeprefix("void ").partition("(")[0]
            found[kernel] = Counter()
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", line):
            found[kernel][match[1]] += 1
    return found


if __name__ == "__main__":
    registers = {
        arch: {name: numbers["REG"] for name, numbers in sorted(kernels.items())}
        for arch, kernels in sorted(resources().items())
    }
    json.dump({"compiler": compiler(), "registers": registers}, sys.stdout, indent=1)
    print()
