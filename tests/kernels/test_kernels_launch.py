"""What a launch costs in compilations, and that the short way to the device is the long one.

On a machine without a device: helpers/check_launches.py compiles for one, and writes down what would be launched there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ddst import kernels
from ddst.kernels import gather as module
from ddst.kernels.gather import gather
from ddst.kernels.launch import Launch
from helpers.dense import topology_of

ONE = torch.ones(1, 1, 1, 1, dtype=torch.bool)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program = Path(__file__).parents[1] / "helpers" / "check_launches.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_repeated_launch_hands_over_what_triton_itself_does(report: dict[str, Any]) -> None:
    """The same kernel, grid, stream, numbers and operands; only memory made by the call may lie elsewhere."""
    pairs = [*report["pairs"], report["box"]]
    assert len(pairs) == 9
    for first, again in pairs:
        # The lists that kernels walk are written once.
        first = [launch for launch in first if not launch[0].startswith(("row_lists_kernel", "groups_kernel"))]
        assert len(first) == len(again) > 0
        for (*launch, arguments), (*launch_again, arguments_again) in zip(first, again, strict=True):
            assert launch == launch_again
            assert [kind for kind, _ in arguments] == [kind for kind, _ in arguments_again]
            moved = [a for a, b in zip(arguments, arguments_again, strict=True) if a != b]
            assert all(kind.startswith("*") for kind, _ in moved) and len(moved) <= 2
    assert any(kind.startswith("tensordesc") for kind, _ in report["box"][0][0][-1])


def test_neither_density_nor_sizes_compile_a_kernel(report: dict[str, Any]) -> None:
    """Other divisors of the channel counts do: the proof that compilations are counted."""
    compiled = report["compiled"]
    assert 0 < compiled["before"] == compiled["density"] == compiled["sizes"] < compiled["channels"]
    few, *many = report["shared"]
    assert few not in many and len(set(many)) == 1, "high density has a kernel of its own, compiled with the other"


def test_operands_at_odd_addresses_get_a_kernel_of_their_own(report: dict[str, Any]) -> None:
    aligned, odd, again = report["odd"]
    assert aligned == again != odd


@pytest.mark.parametrize("allowed", [False, True])
def test_float32_products_follow_torch(
    allowed: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The switch for convolutions and the one for matrix products, each for its own; 16-bit types have no choice."""
    for switch, value in ((torch.backends.cudnn, allowed), (torch.backends.cuda.matmul, not allowed)):
        request.addfinalizer(partial(setattr, switch, "allow_tf32", switch.allow_tf32))
        switch.allow_tf32 = value
    seen = []
    plan = module.plan
    monkeypatch.setattr(module, "plan", lambda *args: seen.append(args[2]) or plan(*args))
    for dtype in (torch.float32, torch.bfloat16):
        x, values, topology = torch.ones(2, 16, dtype=dtype), torch.ones(1, 16, 16, dtype=dtype), topology_of(ONE)
        kernels.conv2d(x[:, :, None, None], values, None, topology, (16, 16, 1, 1), (1, 1), (0, 0), (1, 1), True)
        kernels.linear_input_grad(x, values, topology, (16, 16))
    assert seen == [["ieee", "tf32"][allowed], ["tf32", "ieee"][allowed], "ieee", "ieee"]


def test_grids_that_no_device_takes_are_refused() -> None:
    Launch(gather, (2**31 - 1,), (), {}, 4, 3)
    for grid in ((2**31,), (2**20, 2**16), (1, 2**16)):
        with pytest.raises(ValueError, match="more than a device can launch"):
            Launch(gather, grid, (), {}, 4, 3)
