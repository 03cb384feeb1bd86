"""Vector multiply-adds a cycle that the inner loops of the CPU kernels issue on an Arm Neoverse V2, as LLVM models it.

    python -m ddst.benchmarks.neoverse

Nothing runs: ``csrc/cpu/kernels_portable.cpp`` and ``kernels_neon.cpp`` are compiled to assembly for AArch64, and
llvm-mca takes the loops apart. Four multiply-adds a cycle are the peak; the model knows dependencies, units and
latencies of loads from L1, but no cache misses, no branches and no limit of eight instructions fetched a cycle.
Needs a checkout, ``aarch64-linux-gnu-g++`` (or ``--cxx``) and ``llvm-mca-19`` (or ``--mca``).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", f"-I{SOURCES}")
ITERATIONS = 200


@dataclass(frozen=True)
class Loop:
    """A hot loop: which function template it stands in, in each kernel set, and whether it is one over entries.

    ``whole`` loops run once an entry of the lists, with all steps of a block unrolled in them; of the others the
    innermost counts.
    """

    name: str
    portable: str | None
    neon: str
    whole: bool = False


LOOPS = (
    Loop("forward, input gradient, blocks of 16, fp32", "gather_tile<float, 4, 2, 5, 16>", "gather_tile<float, 4, 4, 6, 16>", True),
    Loop("the same, blocks of 8", "gather_tile<float, 4, 2, 5, 8>", "gather_tile<float, 4, 2, 12, 8>", True),
    Loop("the same, blocks of 4", "gather_tile<float, 4, 1, 8, 4>", "gather_tile<float, 4, 1, 16, 4>", True),
    Loop("the same, blocks of 16, fp64", "gather_tile<double, 2, 2, 5, 16>", "gather_tile<double, 2, 4, 6, 16>", True),
    Loop("from planes (16x1 forward), fp32", "row_tile<float, 4, 2, 5>", "row_tile<float, 4, 4, 6>", True),
    Loop("over pixels, blocks of 1 to 3 channels", "plane_tile<float, 4, 4, 2>", "plane_tile<float, 4, 4, 6>"),
    Loop("over pixels, blocks of 4, fp32", "plane_gather_tile<float, 4, 4, 2>", "plane_gather_tile<float, 4, 4, 6>"),
    Loop("over pixels, blocks of 4, fp64", "plane_gather_tile<double, 2, 4, 2>", "plane_gather_tile<double, 2, 4, 6>"),
    Loop("over the reduction, 1 channel", None, "dot_tile<float, 4, 1, 12>"),
    Loop("over the reduction, 2 channels", None, "dot_tile<float, 4, 2, 10>"),
    Loop("weight gradient, over input channels, V=1", "outer_tile<float, 4, 1, 14>", "outer_tile<float, 4, 1, 16>"),
    Loop("weight gradient, over input channels, fp32", "outer_tile<float, 4, 2, 6>", "outer_tile<float, 4, 2, 8>"),
    Loop("weight gradient, V=3", "outer_tile<float, 4, 3, 4>", "outer_tile<float, 4, 3, 8>"),
    Loop("weight gradient, fp64", "outer_tile<double, 2, 2, 6>", "outer_tile<double, 2, 2, 8>"),
    Loop("weight gradient, over output channels, fp32", "gather_outer_tile<float, 4, 8>", "gather_outer_tile<float, 4, 16>"),
    Loop("weight gradient, over output channels, fp64", "gather_outer_tile<double, 2, 8>", "gather_outer_tile<double, 2, 16>"),
)


def functions(assembly: str) -> dict[str, list[str]]:
    """Lines of each function, by the template and its arguments as C++ writes them."""
    found: dict[str, list[str]] = {}
    for match in re.finditer(r"^(_Z\w+):\n(.*?)^\t\.size\t\1", assembly, re.MULTILINE | re.DOTALL):
        name = re.search(r"\d([a-z_]+_tile)I([fd])((?:Li\d+E)+)E", match[1])
        if name is not None:
            numbers = ", ".join(re.findall(r"Li(\d+)E", name[3]))
            found[f"{name[1]}<{'float' if name[2] == 'f' else 'double'}, {numbers}>"] = match[2].splitlines()
    return found


def multiply_adds(lines: Sequence[str]) -> int:
    return sum(re.match(r"\tfmla\t", line) is not None for line in lines)


def hot_loop(lines: Sequence[str], whole: bool) -> list[str]:
    """Instructions of the loop with the most multiply-adds: the outermost or the innermost of those that hold them."""
    count = lambda loop: multiply_adds(lines[loop[0]:loop[-1]+1])
    at = {line[:-1]: i for i, line in enumerate(lines) if re.match(r"\.L\w+:$", line)}
    loops = []
    for end, line in enumerate(lines):
        branch = re.match(r"\t(?:b\.?\w*|cbn?z|tbn?z)\t(?:.*, *)?(\.L\w+)$", line)
        if branch is not None and at[branch[1]] < end:
            loops.append(range(at[branch[1]], end + 1))
    innermost = [a for a in loops if not any(a[0] <= b[0] and b[-1] < a[-1] or a[0] < b[0] and b[-1] <= a[-1] for b in loops)]
    hot = max(innermost, key=count)
    if whole:
        hot = max((a for a in loops if a[0] <= hot[0] and hot[-1] <= a[-1] and count(a) == count(hot)), key=len)
    return [line for line in lines[hot[0] : hot[-1]+1] if re.match(r"\t[a-z]", line)]


def issue_rate(mca: str, loop: Sequence[str]) -> float:
    """Vector multiply-adds a cycle."""
    command = [mca, "-mtriple=aarch64-linux-gnu", "-mcpu=neoverse-v2", f"-iterations={ITERATIONS}", "-summary-view", "-dispatch=8"]
    done = subprocess.run(command, input="\n".join(loop), capture_output=True, text=True, check=True)
    cycles = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert cycles is not None, done.stdout[:500]
    return multiply_adds(loop) * ITERATIONS / int(cycles[1])


def tool(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        sys.exit(f"neoverse: {name} is not on PATH (Debian's package {package})")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ddst.benchmarks.neoverse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cxx", default="aarch64-linux-gnu-g++", help="C++ compiler for AArch64")
    parser.add_argument("--mca", default="llvm-mca-19")
    parser.add_argument("--assembly", type=Path, help="folder of portable.s and neon.s, written where they are missing")
    parser.add_argument("--show", help="print the loop of this function template, too")
    options = parser.parse_args(arguments)
    if not SOURCES.is_dir():
        sys.exit(f"neoverse: needs the sources of a checkout, found no {SOURCES}")
    cxx, mca = tool(options.cxx, "g++-aarch64-linux-gnu"), tool(options.mca, "llvm-19")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.assembly or Path(temporary)
        loops = {}
        for kind in ("portable", "neon"):
            file = folder / f"{kind}.s"
            if not file.exists():
                source = SOURCES / "cpu" / f"kernels_{kind}.cpp"
                subprocess.run([cxx, *FLAGS, "-S", str(source), "-o", str(file)], check=True)
            loops[kind] = functions(file.read_text())
    print("| loop | portable | NEON |\n| --- | --- | --- |")
    for loop in LOOPS:
        cells = []
        for kind, template in (("portable", loop.portable), ("neon", loop.neon)):
            if template is None:
                cells.append("–")
                continue
            lines = hot_loop(loops[kind][template], loop.whole)
            cells.append(f"{issue_rate(mca, lines):.2f}")
            if template == options.show:
                print(*lines, sep="\n")
        print(f"| {loop.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
