"""What the compiler made of every CUDA kernel: registers, local memory, instructions.

Read from libddst_cuda.so and, for architectures that it holds no code for, from the kernels compiled on the spot.
``make record-kernels`` writes tests/cuda/resources.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import ddst
from ddst import _extension
from helpers import recorded

RECORD = Path(__file__).parents[1] / "cuda" / "resources.json"
KERNELS = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("sm_100", "sm_80", "sm_90", "sm_90a")
#: Kernels in these files have code for sm_90a only, the others are recorded for the other architectures.
HOPPER = "hopper_*.cu"
#: What decides about registers in CMakeLists.txt's command.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG")


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


def nvcc() -> str | None:
    """The CUDA compiler, None if there is none."""
    return shutil.which(os.environ.get("CUDACXX", "nvcc"))


def key(arch: str) -> str:
    """What the recorded numbers depend on: the kernels' sources, the compiler, its options."""
    other = ("glue",) if arch == "sm_90a" else ("glue", "hopper", "tensor_map")  # files that decide nothing there
    used = sorted(p for p in KERNELS.rglob("*") if p.suffix in recorded.SOURCES and not p.name.startswith(other))
    return recorded.digest(*used, compiler(), " ".join(FLAGS))


def sources(arch: str) -> list[Path]:
    """The files whose kernels are recorded for an architecture."""
    hopper = set(KERNELS.glob(HOPPER))
    return sorted(hopper if arch == "sm_90a" else set(KERNELS.glob("*.cu")) - hopper)


def _dump(*options: str, file: Path = _extension.CUDA_LIBRARY) -> str:
    program = tool()
    assert program is not None
    dump = subprocess.run([program, *options, str(file)], capture_output=True, text=True, check=True).stdout
    names = subprocess.run(["c++filt"], input=dump, capture_output=True, text=True, check=True).stdout
    return re.sub(r"ddst::(cuda|dev)::|void (?=ddst)", "", names)


def _resources(dump: str) -> dict[str, dict[str, dict[str, int]]]:
    found: dict[str, dict[str, dict[str, int]]] = {}
    arch = kernel = ""
    for line in dump.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith(" Function "):
            kernel = line.removeprefix(" Function ").removeprefix("void ").partition("(")[0].rstrip(":")
        elif "REG:" in line:
            numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
            found.setdefault(arch, {})[kernel] = numbers
    return found


def of_cubin(cubin: Path, arch: str) -> dict[str, dict[str, int]]:
    """``{kernel: {"REG": …, "STACK": …, "LOCAL": …}}`` of a compiled file."""
    return _resources(f"arch = {arch}\n{_dump('--dump-resource-usage', file=cubin)}").get(arch, {})


def resources() -> dict[str, dict[str, dict[str, int]]]:
    """``{architecture: {kernel: {"REG": …, "STACK": …, "LOCAL": …}}}`` of the built library."""
    found = _resources(_dump("--dump-resource-usage"))
    if "sm_90a" in found:  # a library for sm_90a alone holds the others for it, too
        found["sm_90a"] = {name: numbers for name, numbers in found["sm_90a"].items() if name.startswith("hopper_")}
    return {arch: kernels for arch, kernels in found.items() if kernels}


def compiled(arch: str) -> dict[str, dict[str, int]]:
    """The same of the kernels compiled for one architecture, as the library's are."""
    program = nvcc()
    assert program is not None
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sources(arch):
            cubin = Path(folder) / f"{source.stem}.cubin"
            command = [program, *FLAGS, f"-I{KERNELS.parent}", "-cubin", f"-arch={arch}", str(source), "-o", str(cubin)]
            subprocess.run(command, check=True, capture_output=True)
            found |= of_cubin(cubin, arch)
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


def main() -> None:
    if not _extension.CUDA_LIBRARY.is_file() or nvcc() is None:
        sys.exit(f"{RECORD} cannot be recorded without nvcc and a library built by it")
    known, keys = json.loads(RECORD.read_text()), {arch: key(arch) for arch in ARCHITECTURES}
    changed = [arch for arch in ARCHITECTURES if known["keys"].get(arch) != keys[arch]]
    if not changed:
        return
    built = resources()
    numbers = {arch: built[arch] if arch in built else compiled(arch) for arch in changed}
    spills = [f"{a} {k}" for a, kernels in numbers.items() for k, n in kernels.items() if n["STACK"] or n["LOCAL"]]
    if spills:
        sys.exit(f"these kernels spill or use local memory, nothing was recorded: {spills}")
    registers = {arch: {name: n["REG"] for name, n in sorted(kernels.items())} for arch, kernels in numbers.items()}
    whole = {"compiler": compiler(), "keys": keys, "registers": known["registers"] | registers}
    RECORD.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
