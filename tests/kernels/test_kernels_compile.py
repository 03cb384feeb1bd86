"""Ahead-of-time compilation: no GPU is needed to see registers, spills, shared memory and tensor-core instructions."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddst.kernels import compile as ahead
from ddst.kernels.configs import DTYPES, SIDES, candidates

TABLE = Path(__file__).with_name("compiled.json")


def command(*arguments: str, interpreted: bool = False, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``python -m ddst.kernels.compile`` in a process of its own: in this one, kernels are interpreted."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpreted:
        variables["TRITON_INTERPRET"] = "1"
    if cache is not None:
        variables["TRITON_CACHE_DIR"] = str(cache)
    call = [sys.executable, "-P", "-m", "ddst.kernels.compile", *arguments]
    return subprocess.run(call, env=variables, capture_output=True, text=True, check=False)


def test_every_kernel_compiles_to_what_is_recorded(tmp_path: Path) -> None:
    """With the recorded version of triton the same kernels, with another one at least lawful ones. An empty cache makes
    it compile. To record anew: python -m ddst.kernels.compile --json tests/kernels/compiled.json
    """
    done = command("--check", str(TABLE), cache=tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
    assert f"{len(list(ahead.jobs(ahead.ARCHITECTURES)))} kernels compiled, 0 problems" in done.stdout


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


def test_interpreted_kernels_are_refused() -> None:
    done = command(interpreted=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


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
