"""Vector multiply-adds a cycle that the CPU kernels' inner loops issue on an Arm Neoverse V2, in LLVM's model of it.

    python -m ddst.benchmarks.neoverse

Nothing runs: ``csrc/cpu/kernels_portable.cpp`` and ``kernels_neon.cpp`` are compiled for AArch64 to assembly, and
llvm-mca works out how the loops' instructions follow each other. Four multiply-adds a cycle are the peak. The model
knows units, latencies and dependencies, finds all data in the first cache, predicts every branch, and is told that
eight instructions a cycle are taken in.

Needs a checkout, ``aarch64-linux-gnu-g++`` and ``llvm-mca-19`` (``--cxx``, ``--mca``: others).
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
#: As CMakeLists.txt compiles them.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
ITERATIONS = 200


@dataclass(frozen=True)
class Loop:
    """A hot loop: the function templates that hold it in the two kernel sets, with the arguments of a full tile.

    ``entries``: the loop over an entry list, where one pass takes all steps of a block; else the innermost loop counts.
    """

    name: str
    portable: str | None
    neon: str
    entries: bool = False


GATHER, PLANES, GRAD = "forward and input gradient", "vectors over pixels", "weight gradient"
LOOPS = (
    Loop(f"{GATHER}, blocks of 16", "gather_tile<float, 4, 2, 5, 16>", "gather_tile<float, 4, 4, 6, 16>", True),
    Loop(f"{GATHER}, fp64", "gather_tile<double, 2, 2, 5, 16>", "gather_tile<double, 2, 4, 6, 16>", True),
    Loop(f"{GATHER}, blocks of 8", "gather_tile<float, 4, 2, 5, 8>", "gather_tile<float, 4, 2, 12, 8>", True),
    Loop(f"{GATHER}, blocks of 4", "gather_tile<float, 4, 1, 8, 4>", "gather_tile<float, 4, 1, 16, 4>", True),
    Loop(f"{GATHER}, blocks of 16x1", "row_tile<float, 4, 2, 5>", "row_tile<float, 4, 4, 6>", True),
    Loop(f"{GATHER}, 1 channel, few pixels", None, "dot_tile<float, 4, 1, 12>"),
    Loop(f"{GATHER}, 2 channels, few pixels", None, "dot_tile<float, 4, 2, 10>"),
    Loop("linear layers, panels of pixels", "panel_tile<float, 4, 4, 3>", "panel_tile<float, 4, 8, 3>"),
    Loop("linear layers, fp64", "panel_tile<double, 2, 4, 3>", "panel_tile<double, 2, 8, 3>"),
    Loop(f"{PLANES}, 1 to 3 channels", "plane_tile<float, 4, 4, 2>", "plane_tile<float, 4, 4, 6>"),
    Loop(f"{PLANES}, blocks of 4", "plane_gather_tile<float, 4, 4, 2>", "plane_gather_tile<float, 4, 4, 6>"),
    Loop(f"{PLANES}, fp64", "plane_gather_tile<double, 2, 4, 2>", "plane_gather_tile<double, 2, 4, 6>"),
    Loop(f"{GRAD}, blocks of 16", "outer_tile<float, 4, 2, 6>", "outer_tile<float, 4, 2, 8>"),
    Loop(f"{GRAD}, fp64", "outer_tile<double, 2, 2, 6>", "outer_tile<double, 2, 2, 8>"),
    Loop(f"{GRAD}, blocks of 4", "outer_tile<float, 4, 3, 4>", "outer_tile<float, 4, 3, 4>"),
    Loop(f"{GRAD}, over output channels", "gather_outer_tile<float, 4, 8>", "gather_outer_tile<float, 4, 16>"),
    Loop(f"{GRAD}, the same, fp64", "gather_outer_tile<double, 2, 8>", "gather_outer_tile<double, 2, 16>"),
)


def tile_functions(assembly: str) -> dict[str, list[str]]:
    """Lines of every function ``…_tile``, by its name and template arguments as C++ writes them."""
    found: dict[str, list[str]] = {}
    for symbol, body in re.findall(r"^(_Z\w+):\n(.*?)^\t\.size\t\1", assembly, re.MULTILINE | re.DOTALL):
        name = re.search(r"\d([a-z_]+_tile)I([fd])((?:Li\d+E)+)E", symbol)
        if name is not None:
            arguments = ["float" if name[2] == "f" else "double", *re.findall(r"Li(\d+)E", name[3])]
            found[f"{name[1]}<{', '.join(arguments)}>"] = body.splitlines()
    return found


def multiply_adds(lines: Sequence[str]) -> int:
    """How many of these instructions multiply and add vectors."""
    return sum(line.startswith("\tfmla\t") for line in lines)


def hot_loop(lines: Sequence[str], *, entries: bool = False) -> list[str]:
    """Instructions of the innermost loop with the most multiply-adds, or of the largest loop with no more than it."""
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.match(r"\.L\w+:$", line)}
    loops: list[tuple[int, int]] = []
    for end, line in enumerate(lines):
        branch = re.match(r"\t(?:b|b\.?[a-z]{2}|cbn?z|tbn?z)\t(?:.*, *)?(\.L\w+)$", line)
        if branch is not None and labels[branch[1]] < end:
            loops.append((labels[branch[1]], end + 1))
    innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    begin, end = max(innermost, key=lambda loop: multiply_adds(lines[loop[0] : loop[1]]))
    if entries:
        work = multiply_adds(lines[begin:end])
        around = [a for a in loops if a[0] <= begin and end <= a[1] and multiply_adds(lines[a[0] : a[1]]) == work]
        begin, end = max(around, key=lambda loop: loop[1] - loop[0])
    return [line for line in lines[begin:end] if re.match(r"\t[a-z]", line)]


def issue_rate(mca: str, loop: Sequence[str]) -> float:
    """Vector multiply-adds a cycle."""
    command = [mca, "-mtriple=aarch64-linux-gnu", "-mcpu=neoverse-v2", "-dispatch=8", f"-iterations={ITERATIONS}"]
    done = subprocess.run(command, input="\n".join(loop), capture_output=True, text=True, check=True)
    cycles = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert cycles is not None, done.stdout[:500]
    return multiply_adds(loop) * ITERATIONS / int(cycles[1])


def rates(cxx: str, mca: str) -> list[tuple[Loop, float | None, float]]:
    """Every loop with its rates: portable (None where that set has no such form), NEON."""
    functions: dict[str, dict[str, list[str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("portable", "neon"):
            assembly, source = Path(folder, f"{kind}.s"), SOURCES / "cpu" / f"kernels_{kind}.cpp"
            subprocess.run([cxx, *FLAGS, f"-I{SOURCES}", "-S", str(source), "-o", str(assembly)], check=True)
            functions[kind] = tile_functions(assembly.read_text())

    def rate(kind: str, template: str, entries: bool) -> float:
        return issue_rate(mca, hot_loop(functions[kind][template], entries=entries))

    return [
        (loop, loop.portable and rate("portable", loop.portable, loop.entries), rate("neon", loop.neon, loop.entries))
        for loop in LOOPS
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ddst.benchmarks.neoverse", description=__doc__.partition("\n")[0])
    parser.add_argument("--cxx", default="aarch64-linux-gnu-g++", help="a C++ compiler for AArch64 (%(default)s)")
    parser.add_argument("--mca", default="llvm-mca-19", help="LLVM's machine code analyser (%(default)s)")
    options = parser.parse_args(arguments)
    if not SOURCES.is_dir():
        sys.exit(f"neoverse: needs the C++ sources of a checkout, which are not at {SOURCES}")
    for program in (options.cxx, options.mca):
        if shutil.which(program) is None:
            sys.exit(f"neoverse: no {program}: apt-get install g++-aarch64-linux-gnu llvm-19, or --cxx and --mca")
    print("| multiply-adds a cycle, of 4 | portable | NEON |\n| --- | --- | --- |")
    for loop, portable, neon in rates(options.cxx, options.mca):
        print(f"| {loop.name} | {'–' if portable is None else f'{portable:.2f}'} | {neon:.2f} |")


if __name__ == "__main__":
    main()
