"""What a run of `make gpu` lets "auto" run in CUDA C++: only what was faster than Triton and dense on every layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddst.benchmarks import prefer
from ddst.benchmarks.__main__ import main
from ddst.ops.cuda import preferred


def row(backend: str, seconds: float, *, density: float = 0.1, dense: float = 9.0, **change: Any) -> dict[str, Any]:
    return {
        "layer": "conv3x3-256-256-16",
        "batch": 64,
        "kind": "bf16",
        "block": [32, 32],
        "density": density,
        "backend": backend,
        "wrong": None,
        "pass": "dgrad",
        "cold": {"seconds": seconds, "dense_seconds": dense},
    } | change


KIND = preferred.kind("X1", "conv2d_input_grad", torch.bfloat16, (32, 32), (3, 3))


@pytest.mark.parametrize(
    "rows, found",
    [
        ([row("cuda", 1.0), row("triton", 2.0)], {KIND: (0.1, 0.1)}),
        ([row("cuda", 1.0)], {KIND: (0.1, 0.1)}),  # Triton refused it or was wrong
        ([row("cuda", 2.0), row("triton", 1.0)], {}),
        ([row("cuda", 9.5), row("triton", 9.9)], {}),  # dense is the fastest
        ([row("triton", 1.0)], {}),
        ([row("cuda", 1.0, wrong="NaN"), row("triton", 2.0)], {}),
        (
            [row("cuda", 1.0, kind="fp32"), row("triton", 2.0, kind="fp32"),
             row("cuda", 3.0, kind="tf32"), row("triton", 2.0, kind="tf32")],
            {KIND._replace(dtype="float32"): (0.1, 0.1)},
        ),
        ([row("cuda", 1.0, kind="tf32"), row("triton", 2.0, kind="tf32")], {KIND._replace(dtype="tf32"): (0.1, 0.1)}),
        (
            [*(row("cuda", s, density=d) for s, d in ((1, 0.1), (1, 0.3), (3, 0.2))), row("triton", 2.0, density=0.2)],
            {KIND: (0.1, 0.1)},
        ),
        (
            [row("cuda", 1.0), row("cuda", 3.0, layer="conv3x3-256-256-32"),
             row("triton", 2.0), row("triton", 2.0, layer="conv3x3-256-256-32")],
            {},
        ),
    ],
)  # fmt: skip
def test_only_what_won_everywhere(rows: list[dict[str, Any]], found: dict[Any, Any]) -> None:
    assert prefer.fastest(rows, "X1") == found


def test_the_command_rewrites_the_lines_of_its_device(tmp_path: Path) -> None:
    results, table = tmp_path / "results.json", tmp_path / "preferred.json"
    table.write_text('{"lines": []}')
    for device, seconds in (("X1", 1.0), ("X2", 1.0), ("X1", 5.0)):
        rows = [row("cuda", seconds), row("triton", 2.0)]
        results.write_text(json.dumps({"environment": {"device": device}, "kernels": {"rows": rows}}))
        assert main(["prefer", str(results), "--file", str(table)]) == 0
    assert preferred.read(table) == {KIND._replace(device="X2"): (0.1, 0.1)}
    results.write_text("{}")
    with pytest.raises(SystemExit):
        main(["prefer", str(results), "--file", str(table)])
