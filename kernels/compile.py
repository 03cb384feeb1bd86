"""Compiles the kernels ahead of time, without a GPU, and says what came out.

    python -m ddst.kernels.compile [--arch 80 90 100] [--json FILE | --check FILE] [--all] [--jobs N]

Every configuration that tuning may choose is compiled for every architecture with every kind of product: bfloat16,
float16, TF32 and full float32. The table holds registers, spilled bytes, shared memory, tensor-core instructions, the
number of instructions in the innermost loop around them, and how that loop loads. What is compiled is taken from the
launches themselves, of a 3×3 convolution of 256 channels at 10 % (and one of ragged channels with stride 2); the fused
half block's with what :data:`FUSED` names, in the configuration that runs untuned. ``--json``
writes the table, ``--check`` compares with one; both exit with 1 where a law of :func:`violations` is broken.

The table keeps the :mod:`.fingerprint` of each kernel. What has the recorded one is not compiled again but taken from
the table, unless ``--all`` asks for it; ``--check`` finds fault with every other, which ``--json`` records anew.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ddst.topology import block_count

from . import block_scores, cuda_lists, gather, gather_norm, half_block, lists, moments, weight_grad, weight_grad_norm
from .configs import SIDES, GatherConfig, Problem, WeightGradConfig, candidates
from .fingerprint import fingerprint
from .gather_norm import Fusion
from .launch import INTERPRETED, Launch

ARCHITECTURES = (80, 90, 100)
#: Bytes of shared memory that one program may have.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: Tensor-core instructions with at least 64 rows: warps on sm_80, warp groups on sm_90, a whole program on sm_100.
PRODUCTS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
#: What the kernels' tensors hold where it is not the operator's dtype.
HOLDS = dict.fromkeys(
    ("partial", "squares", "mean", "scale", "offset", "shift", "moments", "per_pixel", "sums"), "fp32"
)
HOLDS |= dict.fromkeys(("bounds", "ids", "row", "col", "tap", "ptr", "entries", "order"), "i32")
HOLDS |= dict.fromkeys(("topology", "held", "starts", "firsts", "records", "units"), "i32")
#: What the kernels of the fused half block are compiled with; others are cases of less.
FUSED = {
    "batch norm": Fusion(1, 0.0, 1, 1, bias=True, residual=1, moments=True, sums=True),
    "sample norm, upsampled": Fusion(2, 0.2, 2, 1, bias=True, residual=2, moments=True, sums=True),
    "ReLU, pooled": Fusion(0, 0.0, 1, 2, bias=True, residual=1),
}
#: Its kernels that multiply nothing.
PASSES = ("tile moments", "merge moments", "statistics", "sample sums")
#: Kernels that write index lists.
LISTS = ("row lists", "unions of rows", "lists of phases", "groups by row", "groups by column")
LISTS += ("records", "records of phases", "records and order", "records of unions", "units")


class Job(NamedTuple):
    """One kernel to compile: the one that does a problem's products, or else the one that ``adds`` parts of sums.

    ``precision`` is that of float32 products. ``fused``: one of :data:`FUSED`, of :data:`PASSES`, or of :data:`LISTS`.
    """

    arch: int
    problem: Problem
    config: GatherConfig | WeightGradConfig | None
    precision: str
    adds: bool = False
    fused: str = ""

    def __str__(self) -> str:
        problem = self.problem
        dtype = TYPES[problem.dtype] + (f" {self.precision}" if problem.dtype == torch.float32 else "")
        kind = " adding parts" if self.adds else " ragged" if problem.weight_shape[0] % 16 else ""
        kind += f" fused: {self.fused}" if self.fused else ""
        settings = {} if self.config is None else dataclasses.asdict(self.config)
        settings.pop("waves", None)  # says how many programs there are, not what they are
        text = " ".join(f"{name}={value}" for name, value in settings.items()).replace(", ", "x")
        return f"sm_{self.arch} {problem.op}{kind} {dtype} {problem.block[0]}x{problem.block[1]} {text}".rstrip()


def example(op: str, dtype: torch.dtype, block: tuple[int, int], ragged: bool) -> Problem:
    """The problem that a kernel is compiled for."""
    shape, stride = ((248, 232, 3, 3), 2) if ragged else ((256, 256, 3, 3), 1)
    side = 32
    rows, cols = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    blocks = block_count(0.1, rows * cols * 9)
    strides, size = (stride, stride), (side // stride, side // stride)
    return Problem(op, False, dtype, block, shape, strides, (1, 1), (1, 1), 64, (side, side), size, blocks)


def jobs(architectures: Sequence[int]) -> Iterator[Job]:
    """Everything that is compiled, each kernel once."""
    seen = set()
    for job in _all_jobs(architectures):
        if str(job) not in seen:
            seen.add(str(job))
            yield job


def _all_jobs(architectures: Sequence[int]) -> Iterator[Job]:
    kinds = ((torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))
    for arch, (dtype, precision) in itertools.product(architectures, kinds):
        yield Job(arch, example("block_scores", dtype, (16, 16), False), None, precision)
        for op in ("block_scores", "weight_grad"):
            yield Job(arch, example(op, dtype, (16, 16), False), None, precision, adds=True)
        for op, block in itertools.product(("forward", "input_grad", "weight_grad"), itertools.product(SIDES, SIDES)):
            chosen = candidates(op, dtype, block)
            yield from (Job(arch, example(op, dtype, block, False), config, precision) for config in chosen)
            if arch == 90 and block[0] == block[1]:
                yield Job(arch, example(op, dtype, block, True), chosen[0], precision)
            for fused in FUSED if block[0] == block[1] else ("sample norm, upsampled",):
                problem = example(op, dtype, block, False)
                config = (
                    weight_grad_norm.config_of(problem, "cpu")
                    if op == "weight_grad"
                    else gather_norm.config_of(problem, FUSED[fused], "cpu")
                )
                yield Job(arch, problem, config, precision, fused=fused)
        if precision == "ieee":
            problem = example("forward", dtype, (16, 16), False)
            names = (*PASSES, *LISTS) if dtype == torch.float32 else PASSES
            yield from (Job(arch, problem, None, precision, adds=True, fused=fused) for fused in names)


def launch_of(job: Job) -> Launch:
    """The launch whose kernel a job compiles."""
    if job.fused in (*PASSES, *LISTS):
        rows, groups, ones = (16, 16, 9, 3, 230, 16, 16, 1, 16), (16, 16, 9, 230, 100, 4), (1, 1, 0, 0, 1, 1)
        lines, units = (16, 16, 9, 3, 230, 2, 16, 1, 1, 32, 88), (16, 16, 9, 230, 1, 2, 16, 8, 1280)
        launches = {
            "row lists": lambda: lists.row_lists_launch((*rows, *ones), False, 1, 5),
            "unions of rows": lambda: lists.row_lists_launch((*rows, *ones), False, 4, 5),
            "lists of phases": lambda: lists.row_lists_launch((*rows, *ones), True, 1, 5),
            "groups by row": lambda: lists.groups_launch(groups, True),
            "groups by column": lambda: lists.groups_launch(groups, False),
            "records": lambda: cuda_lists.gather_records_launch((*lines, 16), False, 8, 1, 4),
            "records of phases": lambda: cuda_lists.gather_records_launch((*lines, 16), True, 8, 1, 4),
            "records and order": lambda: cuda_lists.hopper_records_launch((*lines, 16, 16), True, 8, 1, 4, 1),
            "records of unions": lambda: cuda_lists.hopper_records_launch((*lines, 16, 16), False, 8, 1, 4, 4),
            "units": lambda: cuda_lists.units_launch(units, 1, 16, 8),
            "tile moments": lambda: moments.tile_launch(65536, 256),
            "merge moments": lambda: moments.merge_launch(512, 128, 65536, 256),
            "statistics": lambda: half_block.statistics_launch(64, 1024, 256, 2),
            "sample sums": lambda: half_block.sums_launch(64, 1024, 256),
        }
        return launches[job.fused]()
    if job.fused:
        fusion = FUSED[job.fused]
        if isinstance(job.config, WeightGradConfig):
            return weight_grad_norm.plan(job.problem, fusion, job.config, job.precision, -1).launches[0]
        assert isinstance(job.config, GatherConfig)
        return gather_norm.plan(job.problem, fusion, job.config, job.precision)
    if job.adds:
        scores = job.problem.op == "block_scores"
        return block_scores.adding(144, 4) if scores else weight_grad.add_parts(job.problem, 4)
    if isinstance(job.config, GatherConfig):
        return gather.plan(job.problem, job.config, job.precision, bias=False, relu=False)
    if isinstance(job.config, WeightGradConfig):
        return weight_grad.plan(job.problem, job.config, job.precision, -1).launches[0]
    return block_scores.plan(job.problem, job.precision, -1)[1][0]


def source_of(launch: Launch, dtype: torch.dtype) -> ASTSource:
    """What the compiler is given for a launch, as it is when run: addresses are known to be multiples of 16."""
    numbers = iter(launch.scalars)
    signature: dict[str, str] = {}
    for name, parameter in zip(launch.kernel.arg_names, launch.kernel.params, strict=True):
        if name in launch.constants:
            signature[name] = "constexpr"
        elif parameter.do_not_specialize:
            signature[name] = "i32" if -(2**31) <= next(numbers) < 2**31 else "i64"
        elif name == "x" and "BOX_N" in launch.constants:
            box = ",".join(str(launch.constants[side]) for side in ("BOX_N", "BOX_H", "BOX_W", "BK"))
            signature[name] = f"tensordesc<{TYPES[dtype]}[{box}]>"
        else:
            signature[name] = "*" + HOLDS.get(name, TYPES[dtype])
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=launch.constants, attrs=aligned)


def target_of(job: Job) -> GPUTarget:
    """The architecture that a job is compiled for."""
    return GPUTarget("cuda", job.arch, 32)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(machine code, resource usage) of a compiled kernel, by the programs inside triton's package."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # Without analysing data flow (-ndf), whose findings are not asked for: two thirds of the time.
        listing = [tools / "nvdisasm", "-c", "-ndf", file.name]
        code = subprocess.check_output(listing, text=True, stderr=subprocess.STDOUT)
        usage = subprocess.check_output(
            [tools / "cuobjdump", "-res-usage", file.name], text=True, stderr=subprocess.STDOUT
        )
    return code, usage


def _instructions(code: str) -> tuple[list[str], list[str]]:
    """(all instructions, those of the smallest loop around a tensor-core instruction)."""
    found: list[str] = []
    targets: list[str | None] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(found)
        instruction = re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*?);", line)
        if instruction:
            target = re.search(r"\.L_x_\d+", instruction[2])
            found.append(instruction[1])
            targets.append(target[0] if target and instruction[1].startswith("BRA") else None)
    loops = [
        found[labels[target] : at + 1]
        for at, target in enumerate(targets)
        if target is not None and labels.get(target, at + 1) <= at
    ]
    return found, min((loop for loop in loops if any(_is_product(i) for i in loop)), key=len, default=[])


def _is_product(instruction: str) -> bool:
    return re.match(r"(HG|UTC\w*|[HIQ])MMA\b", instruction) is not None


def _count(instructions: Sequence[str]) -> dict[str, int]:
    return dict(sorted(collections.Counter(instructions).items()))


def run(job: Job) -> dict[str, Any]:
    """Compiles one job: registers, spilled and shared bytes, products and copies, length of the loop."""
    launch = launch_of(job)
    kernel = triton.compile(source_of(launch, job.problem.dtype), target=target_of(job), options=launch.options)
    code, usage = _disassemble(kernel.asm["cubin"])
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()  # type: ignore[union-attr]
    found, loop = _instructions(code)
    return {
        "registers": int(registers),
        "spilled": int(stack) + int(local),
        "shared": kernel.metadata.shared,
        "loop": len(loop),
        "products": _count([re.sub(r"\.(F32|BF16|TF32|gdesc).*", "", i) for i in found if _is_product(i)]),
        "copies": _count([i for i in loop if re.match(r"LDGSTS|UTMALDG|LDG\.", i)]),
    }


def key(job: Job) -> str:
    """The fingerprint of what :func:`run` says about a job."""
    launch = launch_of(job)
    measure = (source_of, run, _disassemble, _instructions, _is_product, _count)
    return fingerprint(source_of(launch, job.problem.dtype), target_of(job), launch.options, measure)


def violations(job: Job, result: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel, whatever the compiler's version.

    Nothing is spilled; shared memory suffices; products run on the architecture's tensor cores at full height, except
    in full float32, for which there are none. What only adds has no products.
    """
    found = []
    if result["spilled"]:
        found.append(f"spills {result['spilled']} bytes")
    if result["shared"] > SHARED_LIMIT[job.arch]:
        found.append(f"needs {result['shared']} bytes of shared memory, {SHARED_LIMIT[job.arch]} are there")
    exact = job.problem.dtype == torch.float32 and job.precision == "ieee"
    right = bool(result["products"]) and all(name.startswith(PRODUCTS[job.arch]) for name in result["products"])
    if not exact and not job.adds and not right:
        found.append(f"has the products {result['products']}, not {PRODUCTS[job.arch]}")
    return found


def compile_all(todo: Sequence[Job], processes: int) -> dict[str, dict[str, Any]]:
    """:func:`run` of every job, in parallel, by the job's text."""
    if not todo or processes == 1:
        return {str(job): run(job) for job in todo}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        results = pool.map(run, todo, chunksize=4)
        return {str(job): result for job, result in zip(todo, results, strict=True)}


def differences(recorded: dict[str, Any], results: dict[str, Any], architectures: Sequence[int]) -> list[str]:
    """What a recorded table says otherwise, for the architectures that were compiled."""
    prefixes = tuple(f"sm_{arch} " for arch in architectures)
    names = {name for name in recorded if name.startswith(prefixes)} | set(results)
    return [
        f"{name}: recorded {recorded.get(name)}, got {results.get(name)}"
        for name in sorted(names)
        if recorded.get(name) != results.get(name)
    ]


def read(path: Path | None) -> dict[str, Any]:
    """The kernels of a table, none where there is no file or it is of another version of triton."""
    if path is None or not path.is_file():
        return {}
    table = json.loads(path.read_text())
    if table["triton"] != triton.__version__:
        print(f"{path} is of triton {table['triton']}, this is {triton.__version__}: not compared")
        return {}
    return table["kernels"]


def write(path: Path, results: dict[str, Any]) -> None:
    """A table as JSON, one line per kernel."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(result)}" for name, result in results.items())
    path.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{lines}\n }}\n}}\n')


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ddst.kernels.compile", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with a table of the same triton version")
    parser.add_argument("--all", action="store_true", help="compile also what has not changed since it was recorded")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="compilers at once")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("kernels cannot be compiled while TRITON_INTERPRET is set")
    todo = list(jobs(options.arch))
    keys = {str(job): key(job) for job in todo}
    recorded = read(options.check or options.json)
    fresh = {} if options.all else {n: r for n, r in recorded.items() if n in keys and r.get("key") == keys[n]}
    compiled = compile_all([job for job in todo if str(job) not in fresh], options.jobs)
    results = {n: fresh[n] if n in fresh else compiled[n] | {"key": keys[n]} for n in keys}
    problems = [f"{job}: {text}" for job in todo for text in violations(job, results[str(job)])]
    if options.check and recorded:
        problems += differences(recorded, results, options.arch)
    if options.json:
        write(options.json, results)
    else:
        for name, result in results.items():
            print(name, *(f"{what}={value}" for what, value in result.items()))
    print(*problems, sep="\n", file=sys.stderr)
    print(
        f"{len(compiled)} kernels compiled, {len(fresh)} unchanged since they were recorded, {len(problems)} problems"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
