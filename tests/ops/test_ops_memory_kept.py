"""No call of an operator keeps memory: what glibc counts as allocated is the same before and after 2,000 calls."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import pytest
import torch

from helpers.problems import ConvProblem, LinearProblem
from helpers.sparse import Problem, apply, call, op_arguments

CALLS = 2000
LEAST = 8  # bytes a call: a quarter of what one allocation takes, several times what the rest of the process adds
PROBLEMS: list[Problem] = [
    ConvProblem(batch=1, size=(4, 4), mask="full"),
    LinearProblem(batch=(2,), features=(16, 16), mask="full"),
]


class Heap(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()  # noqa: SIM905
    ]


@pytest.fixture
def allocated() -> Callable[[], int]:
    """Bytes that are allocated now."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs mallinfo2 of glibc 2.33 or later")
    libc.mallinfo2.restype = Heap
    return lambda: int(libc.mallinfo2().uordblks)


def bytes_kept(act: Callable[[], object], allocated: Callable[[], int]) -> float:
    """Bytes a call, without what Python's and torch's caches take once."""
    for _ in range(500):
        act()
    gc.collect()
    gc.disable()
    try:
        before = allocated()
        for _ in range(CALLS):
            act()
    finally:
        gc.enable()
    gc.collect()
    return (allocated() - before) / CALLS


OPERATORS = [
    (name, problem) for problem in PROBLEMS for name in op_arguments(problem, problem.build(torch.float32)) or ()
]


@pytest.mark.parametrize("name, problem", OPERATORS, ids=[name for name, _ in OPERATORS])
def test_operators_keep_nothing(name: str, problem: Problem, allocated: Callable[[], int]) -> None:
    arguments = (op_arguments(problem, problem.build(torch.float32)) or {})[name]
    assert bytes_kept(lambda: call(name, arguments), allocated) < LEAST


@pytest.mark.parametrize("problem", PROBLEMS, ids=["conv2d", "linear"])
def test_functions_and_their_gradients_keep_nothing(problem: Problem, allocated: Callable[[], int]) -> None:
    case = problem.build(torch.float32)
    leaves = {name: getattr(case, name).requires_grad_() for name in ("x", "values", "bias")}

    def step() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        apply(case, "auto", **leaves).backward(case.grad)

    assert bytes_kept(step, allocated) < LEAST


def test_the_count_sees_what_is_kept(allocated: Callable[[], int]) -> None:
    libc = ctypes.CDLL(None)
    assert 16 <= bytes_kept(lambda: libc.malloc(ctypes.c_size_t(20)), allocated) <= 64
    assert bytes_kept(lambda: torch.zeros(64), allocated) < LEAST
