"""Kernels for sm_90a as nvcc compiles them: machine code, registers, what ptxas says; and what must not be in it.

The compiler takes back silently, or with a remark and exit code 0, what makes such a kernel fast. Each fault here is
one that it was seen to make (docs/notes/hopper.md).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ddst.benchmarks import sass
from helpers import cuda_resources

FLAGS = (*cuda_resources.FLAGS, "-arch=sm_90a")


class Kernel(NamedTuple):
    """One compiled kernel. said: what ptxas remarked about it."""

    code: list[sass.Instruction]
    registers: int
    local_bytes: int
    said: list[str]


def compile_kernels(source: Path) -> dict[str, Kernel]:
    """Every kernel of a file, compiled as CMakeLists.txt does it."""
    nvcc = cuda_resources.nvcc()
    assert nvcc is not None
    includes = [f"-I{folder}" for folder in (cuda_resources.KERNELS.parent, cuda_resources.KERNELS)]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc, *FLAGS, *includes, "-cubin", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        listings, resources = sass.listings(cubin), cuda_resources.of_cubin(cubin, "sm_90a")
        said = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout
    about = {line: re.search(r"function '(.+)'", line) for line in said.splitlines()}
    found = {}
    for name, listing in listings.items():
        its = [line for line, named in about.items() if named and sass.short(named[1]) == name]
        numbers = resources[name]
        found[name] = Kernel(sass.instructions(listing), numbers["REG"], numbers["STACK"] + numbers["LOCAL"], its)
    return found


def faults(kernel: Kernel, has: Sequence[str]) -> list[str]:
    """What is wrong with a kernel that must have these instructions."""
    names = [i.name for i in kernel.code]
    found = []
    if kernel.local_bytes or any(name.startswith(("LDL", "STL")) for name in names):
        found.append(f"spills, or has {kernel.local_bytes} bytes of local memory")
    found += [f"ptxas: {line}" for line in kernel.said if "serialized" in line]
    if any(name.startswith("BRA.U.ANY") for name in names):
        found.append("a loop over lanes around what one thread does: choose it by elect_one()")
    if names.count("CCTL.IVALL") > names.count("UCGABAR_WAIT"):  # each cluster_sync has one
        found.append("drops the first-level cache: an acquire at cluster scope")
    found += [f"has no {name}" for name in has if not any(n.startswith(name) for n in names)]
    return found
