"""Which backend runs: what each one supports, what "auto" takes, and that nothing falls back silently."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import ddst
from ddst import backends
from ddst.backends import Problem
from ddst.nn import explain, set_backend
from ddst.ops.cuda import dispatch


@pytest.mark.parametrize(
    "backend, device, dtype, block, supported",
    [
        ("cpu", "cpu", torch.float32, (16, 16), True),
        ("cpu", "cpu", torch.float64, (16, 16), True),
        ("cpu", "cpu", torch.float32, (1, 1), True),
        ("cpu", "cpu", torch.float32, (64, 64), True),
        ("cpu", "cpu", torch.float32, None, True),
        ("cpu", "cuda", torch.float32, (16, 16), False),
        ("cpu", "cpu", torch.float16, (16, 16), False),
        ("cpu", "cpu", torch.int32, (16, 16), False),
        ("reference", "cpu", torch.float32, (3, 5), True),
        ("reference", "cuda", torch.float64, (16, 16), True),
        ("triton", "cpu", torch.float32, (16, 16), False),
        ("cuda", "cpu", torch.float32, (16, 16), False),
        ("cuda", "cuda", torch.float64, (16, 16), False),
        ("cuda", "cuda", torch.bfloat16, None, False),
    ],
)
def test_supports_answers_with_a_reason(
    backend: str, device: str, dtype: torch.dtype, block: tuple[int, int] | None, supported: bool
) -> None:
    ok, reason = backends.supports(backend, Problem(device, dtype, block))
    assert ok == supported
    assert reason


def test_slow_blocks_say_so() -> None:
    fast = backends.supports("cpu", Problem("cpu", torch.float32, (16, 8)))[1]
    slow = backends.supports("cpu", Problem("cpu", torch.float32, (3, 8)))[1]
    assert "slow" not in fast
    assert "slow" in slow
    assert "b_out" in slow


def test_auto_takes_the_cpu_kernels_and_never_the_reference() -> None:
    problem = Problem("cpu", torch.float32, (16, 16))
    assert backends.choose("auto", problem) == "cpu"
    assert backends.choose("cpu", replace(problem, block=(3, 5))) == "cpu"
    assert backends.choose("reference", problem) == "reference"
    with pytest.raises(RuntimeError, match="float16"):
        backends.choose("auto", replace(problem, dtype=torch.float16))
    with pytest.raises(RuntimeError, match="meta"):
        backends.choose("cpu", replace(problem, device="meta"))
    with pytest.raises(RuntimeError, match=r"cpu: .*triton: .*reference"):
        backends.choose("auto", replace(problem, device="meta"))


def test_problem_is_read_off_the_tensors() -> None:
    found = Problem.of(torch.zeros(1, 8, 4, 4), torch.zeros(2, 4, 8), (3, 3), (2, 1), (1, 1))
    assert found == Problem("cpu", torch.float32, (4, 8), (3, 3), (2, 1))
    for values in (torch.zeros(4, 8), torch.zeros(2, 0, 8)):
        with pytest.raises(ValueError, match=r"values.*\[slots, b_out, b_in\]"):
            Problem.of(torch.zeros(1), values)


def test_triton_says_when_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    dispatch.supports_triton.cache_clear()
    with pytest.raises(RuntimeError, match=r"triton.*pip install"):
        backends.choose("auto", Problem("cuda", torch.float32, (16, 16)))
    dispatch.supports_triton.cache_clear()


def test_codes_are_names_for_operators() -> None:
    assert [backends.name_of(backends.code(name)) for name in backends.CODES] == list(backends.CODES)
    assert backends.code("auto") == 0, "the operators' default"
    with pytest.raises(ValueError, match=r"codes.*'auto': 0.*got 9"):
        backends.name_of(9)
    with pytest.raises(ValueError, match=r"name must be one of .*'cpu'.*got 'auto'"):
        backends.register("auto", lambda problem: (True, ""))
    with pytest.raises(ValueError, match="got 'auto'"):
        backends.supports("auto", Problem("cpu", torch.float32, None))


def test_importing_ddst_registers_every_backend_and_imports_neither_triton_nor_the_compiler() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None; import ddst\n"
        "from ddst.backends import BACKENDS, Problem, supports\n"
        "print(*[supports(name, Problem('cpu', torch.float32, (16, 16)))[0] for name in BACKENDS])\n"
        "print('ddst.kernels' in sys.modules, 'torch._dynamo' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "False", "False", "True", "False", "False"]


@pytest.mark.parametrize("name", ["", "CPU", "tpu"])
def test_unknown_backend_is_an_error_that_lists_the_known_ones(name: str) -> None:
    for call in (
        lambda: backends.supports(name, Problem("cpu", torch.float32, None)),
        lambda: backends.choose(name, Problem("cpu", torch.float32, None)),
        lambda: backends.check_backend(name),
        lambda: backends.code(name),
        lambda: set_backend(torch.nn.Sequential(ddst.SparseLinear(8, 8, density=1.0)), name),
    ):
        with pytest.raises(ValueError, match=r"backend.*auto.*cpu.*reference"):
            call()


def test_set_backend_reaches_nested_layers_and_the_layers_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(
        torch.nn.Sequential(ddst.SparseConv2d(3, 8, 3, density=0.5, block=4)),
        torch.nn.Flatten(),
        ddst.SparseLinear(8 * 4 * 4, 5, density=0.5, block=4),
    )
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    used: list[str] = []
    asked = backends.choose
    monkeypatch.setattr(backends, "choose", lambda *args: used.append(asked(*args)) or used[-1])
    set_backend(model, "reference")
    assert torch.allclose(model(x), expected, atol=1e-5)
    set_backend(model, "auto")
    assert torch.equal(model(x), expected)
    assert used == ["reference", "reference", "cpu", "cpu"]


@pytest.mark.parametrize("asked, chosen, refused", [("auto", "cpu", "reference"), ("reference", "reference", "cpu")])
def test_explain_says_what_runs_and_why_not_the_others(asked: str, chosen: str, refused: str) -> None:
    layer = ddst.SparseConv2d(16, 16, 3, density=0.5)
    layer.backend = asked
    found = explain(layer, torch.zeros(1, 16, 5, 5))
    assert found.backend == chosen
    assert found.reason
    assert set(found.refused) == {refused, "triton", "cuda"}
    assert found.refused[refused]
    text = str(found)
    assert "SparseConv2d" in text
    assert f"runs on {chosen}" in text
    assert f"not {refused}" in text
    assert bool(found.capability) == (chosen == "cpu")
    assert found.capability in ("", "portable", "avx2", "avx512", "neon")


def test_explain_refuses_dense_layers_and_unsupported_inputs() -> None:
    with pytest.raises(TypeError, match="layer"):
        explain(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    layer = ddst.SparseLinear(16, 16)
    layer.backend = "cpu"
    with pytest.raises(RuntimeError, match="meta"):
        explain(layer, torch.zeros(1, 16, device="meta"))
