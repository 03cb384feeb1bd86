"""Ahead-of-time compilation: no GPU is needed to see registers, spills, shared memory and tensor-core instructions."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ddst.kernels import compile as ahead
from ddst.kernels.configs import DTYPES, SIDES, candidates
from helpers import scale
from helpers.copies import Done, run_copies

TABLE = Path(__file__).with_name("compiled.json")


CALL = "import sys; from ddst.kernels.compile import main; sys.exit(main({!r}))"


class Calls(NamedTuple):
    """What came of calls of ``python -m ddst.kernels.compile``, and of a look at fingerprints."""

    checked: Done
    changed: Done
    recorded: Done
    codes: Done
    table: Path
    faults: list[str]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Calls:
    """In copies of one process: in this one, kernels are interpreted. An empty cache makes them compile."""
    folder = tmp_path_factory.mktemp("kernels")
    faults = changed_table(folder / "table.json")
    write_kernels(folder)
    everything = ["--all"] if scale.everything() else []
    one = ["--arch", "80", "--jobs", "1"]
    programs = [
        CALL.format(["--check", str(TABLE), *everything]),
        CALL.format(["--check", str(folder / "table.json"), *one]),
        CALL.format(["--json", str(folder / "table.json"), *one]),
        CODES.format(folder=str(folder), count=len(CHANGES)),
    ]
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables["TRITON_CACHE_DIR"] = str(folder / "cache")
    done = run_copies([("import ddst.kernels.compile", program) for program in programs], variables, timeout=7200)
    return Calls(*done, folder / "table.json", faults)


def kernels_of(table: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in table["kernels"].items() if name.startswith("sm_80 ")}


def changed_table(file: Path) -> list[str]:
    """Writes a table of which one kernel has changed, one is missing, and one has changed and is wrong; their names."""
    table = json.loads(TABLE.read_text())
    kernels = kernels_of(table)
    stale, missing, wrong = [name for name in kernels if "adding parts" in name][:3]
    kernels[stale] = kernels[stale] | {"key": "of another source"}
    kernels[wrong] = kernels[wrong] | {"key": "of another source", "registers": 0}
    del kernels[missing]
    file.write_text(json.dumps(table | {"kernels": kernels}))
    return [stale, missing, wrong]


def test_every_kernel_compiles_to_what_is_recorded(calls: Calls) -> None:
    """With the recorded version of triton the same kernels, with another one at least lawful ones. Compiled are those
    whose fingerprint is not the recorded one, in ``make test-all`` all. To record: make record-kernels
    """
    done = calls.checked
    assert done.returncode == 0, done.err[-5000:]
    compiled, unchanged = map(int, re.findall(r"(\d+) kernels compiled, (\d+) unchanged .* 0 problems", done.out)[0])
    assert compiled + unchanged == len(list(ahead.jobs(ahead.ARCHITECTURES)))
    assert not (scale.everything() and unchanged)


def test_what_changed_since_it_was_recorded_is_compiled(calls: Calls) -> None:
    kernels = kernels_of(json.loads(TABLE.read_text()))
    assert calls.changed.returncode == 1
    said = f"3 kernels compiled, {len(kernels) - 3} unchanged since they were recorded, "
    assert f"{said}3 problems" in calls.changed.out
    assert {line.partition(": recorded")[0] for line in calls.changed.err.splitlines()} == set(calls.faults)
    assert f"{said}0 problems" in calls.recorded.out
    assert json.loads(calls.table.read_text())["kernels"] == kernels


KERNELS = """
import triton
import triton.language as tl

FACTOR = tl.constexpr(2)
LIST = [1]

@triton.jit
def twice(x):
    # says nothing
    return x * FACTOR

@triton.jit
def kernel(x, y):
    \"\"\"A docstring.\"\"\"
    tl.store(y, twice(tl.load(x)))
"""
EQUAL = [
    ("# says nothing", "# says something else"),
    ("A docstring.", "Another one."),
    ("FACTOR = ", "\n\nFACTOR = "),
    ("x * FACTOR", "(x*FACTOR)"),
]
OTHERS = [
    ("constexpr(2)", "constexpr(3)"),
    ("x * FACTOR", "x + FACTOR"),
    ("twice(tl.load(x))", "twice(tl.load(x)) + 1"),
    ("x * FACTOR", "x * LIST[0]"),
]
CHANGES = [("", ""), *EQUAL, *OTHERS]
CODES = """
import importlib, json, sys
from ddst.kernels.fingerprint import code_of
sys.path.insert(0, {folder!r})
codes = []
for number in range({count}):
    try:
        codes.append(code_of(importlib.import_module(f"kernels{{number}}").kernel))
    except TypeError as error:
        codes.append(str(error))
print(json.dumps(codes))
"""


def write_kernels(folder: Path) -> None:
    for number, (old, new) in enumerate(CHANGES):
        assert old in KERNELS
        (folder / f"kernels{number}.py").write_text(KERNELS.replace(old, new))


def test_a_fingerprint_is_of_what_the_compiler_reads(calls: Calls) -> None:
    assert calls.codes.returncode == 0, calls.codes.err
    first, *codes = (re.sub(r"kernels\d+\.", "", code) for code in json.loads(calls.codes.out))
    assert [code == first for code in codes] == [True] * len(EQUAL) + [False] * len(OTHERS)
    assert "reads LIST = [1]" in codes[-1]


def test_all_that_tuning_may_choose_is_compiled() -> None:
    """With every kind of product, for every architecture."""
    jobs = ahead.jobs((80, 90, 100))
    compiled = {(j.arch, j.problem.op, j.problem.dtype, j.precision, j.problem.block, j.config) for j in jobs}
    kinds = [(dtype, "ieee") for dtype in DTYPES] + [(torch.float32, "tf32")]
    for op, block in itertools.product(("forward", "input_grad", "weight_grad"), itertools.product(SIDES, SIDES)):
        for arch, (dtype, precision) in itertools.product((80, 90, 100), kinds):
            for config in candidates(op, dtype, block):
                tiles = replace(config, waves=4) if hasattr(config, "waves") else config
                assert (arch, op, dtype, precision, block, tiles) in compiled


def test_fused_multiply_adds_are_asked_for() -> None:
    """Whatever a version of triton takes without being asked (docs/notes/triton.md)."""
    assert all(ahead.launch_of(job).options["enable_fp_fusion"] is True for job in ahead.jobs([90]))


LOOPS = {  # what the variable of every loop in a kernel begins with, none of which is below zero
    "cuda_lists.py": ["0"] * 6,
    "gather.py": ["TAPS", "start", "start", "start", "2"],
    "gather_norm.py": ["start"],
    "half_block.py": ["0"],
    "lists.py": ["0"] * 8 + ["ROWS"] * 2,
    "moments.py": ["0"],
    "weight_grad.py": ["0", "first"],
    "weight_grad_norm.py": ["first"],
    "block_scores.py": ["0"],
}


def test_no_loop_variable_is_below_zero() -> None:
    """There a quotient is rounded down in the interpreter and towards zero when compiled (docs/notes/triton.md)."""
    found = {}
    for file in sorted(Path(ahead.__file__).parent.glob("*.py")):
        functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        kernels = [f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]
        loops = [node.iter for f in kernels for node in ast.walk(f) if isinstance(node, ast.For)]
        if loops:
            assert all(isinstance(loop, ast.Call) and "range" in ast.unparse(loop.func) for loop in loops)
            found[file.name] = sorted(ast.unparse(loop.args[0]) for loop in loops if isinstance(loop, ast.Call))
    assert found == {name: sorted(first) for name, first in LOOPS.items()}


def test_interpreted_kernels_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ahead.main([])
    assert ended.value.code == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


LAWFUL = {"registers": 64, "spilled": 0, "shared": 49152, "loop": 100, "products": {"HGMMA.64x64x16": 4}, "copies": {}}


@pytest.mark.parametrize(
    "change, text",
    [
        ({}, None),
        ({"spilled": 8}, "spills 8 bytes"),
        ({"shared": 240000}, "needs 240000 bytes"),
        ({"products": {"HMMA.16816": 4}}, "not HGMMA"),
        ({"products": {"HGMMA.64x64x16": 4, "HMMA.16816": 4}}, "not HGMMA"),
        ({"products": {}}, "not HGMMA"),
    ],
)
def test_laws(change: dict[str, object], text: str | None) -> None:
    job = next(ahead.jobs([90]))
    found = ahead.violations(job, LAWFUL | change)
    assert found == [] if text is None else len(found) == 1 and text in found[0]


def test_differences_are_told_in_both_directions() -> None:
    recorded = {"sm_80 a": LAWFUL, "sm_90 a": LAWFUL, "sm_90 b": LAWFUL}
    assert ahead.differences(recorded, {"sm_90 a": LAWFUL, "sm_90 b": LAWFUL}, [90]) == []
    found = ahead.differences(recorded, {"sm_90 a": LAWFUL | {"registers": 65}, "sm_90 c": LAWFUL}, [90])
    assert [line.split(":")[0] for line in found] == ["sm_90 a", "sm_90 b", "sm_90 c"]


def test_the_innermost_loop_is_found() -> None:
    code = """
    .L_x_1:
        /*0000*/                   LDG.E R1, [R2] ;
    .L_x_2:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], [R2] ;
        /*0020*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4] ;
        /*0030*/              @P0  BRA `(.L_x_2) ;
        /*0040*/                   STG.E [R2], R1 ;
        /*0050*/             @!UP1 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
    """
    everything, loop = ahead._instructions(code)
    assert everything[0] == "LDG.E"
    assert everything[-1] == "EXIT"
    assert loop == ["LDGSTS.E.BYPASS.128", "HGMMA.64x16x16.F32.BF16", "BRA"]
