"""Memory that ends, and begins, at a page without permissions: a byte read or written beyond it kills the process.

AddressSanitizer does not see what inline assembly reads; the processor does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from helpers.dense import block_norms, pack_blocks, unpack_blocks
from helpers.problems import Case, ConvProblem, LinearProblem, large_problems, wide_problems

PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class GuardedArea:
    """At least `size` bytes between two pages without permissions."""

    def __init__(self, size: int) -> None:
        self.room = -(-size // PAGE) * PAGE
        self._memory = mmap.mmap(-1, self.room + 2 * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for guard in (base, base + PAGE + self.room):
            if _LIBC.mprotect(guard, PAGE, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def _view(self, dtype: torch.dtype, begin: int, count: int) -> Tensor:
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=PAGE + begin)

    def place(self, t: Tensor, at: str) -> Tensor:
        """A copy of `t` with its strides that starts ("start") or ends ("end") where the area does.

        Between its elements, and for a page on its other side, lie NaNs, or nonsense for integers.
        """
        span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        length = span * t.element_size()
        begin = 0 if at == "start" else self.room - length
        filler = float("nan") if t.is_floating_point() else -(2**30)
        first, last = max(0, begin - PAGE), min(self.room, begin + length + PAGE)
        first += (begin - first) % t.element_size()
        self._view(t.dtype, first, (last - first) // t.element_size()).fill_(filler)
        return self._view(t.dtype, begin, span).as_strided(t.shape, t.stride()).copy_(t)


@dataclass
class GuardedMemory:
    """Areas for the operands of one problem after the other, one a name, made larger where one does not fit."""

    areas: dict[str, GuardedArea] = field(default_factory=dict)

    def place(self, case: Case, at: str) -> Case:
        """The case with every operand at the start or the end of an area; tensors without elements as they are."""
        placed = {}
        for name in ("x", "values", "bias", "topology", "grad"):
            t = getattr(case, name)
            if t is None or t.numel() == 0:
                continue
            need = 2 * t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))
            if name not in self.areas or self.areas[name].room < need:
                self.areas[name] = GuardedArea(max(need, 1 << 20))
            placed[name] = self.areas[name].place(t, at)
        return replace(case, **placed)


def guarded_problem(seed: int) -> ConvProblem | LinearProblem:
    """A random problem; every second one has channels in whole vectors, so that operands are read where they lie.

    Seeds -1, -2, … are `large_problems`.
    """
    if seed < 0:
        return list(large_problems())[seed]
    problem = next(iter(wide_problems(1, seed)))
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return problem
    into, out = (rng.choice([4, 8, 16, 16]) * rng.randint(1, 6) for _ in range(2))
    if isinstance(problem, LinearProblem):
        return replace(problem, features=(into, out))
    return replace(problem, channels=(into, out))


def expected_results(case: Case) -> dict[str, Tensor]:
    """What the four ops must return, by the end of their names, in float64."""
    x = case.x.double().requires_grad_()
    weight = unpack_blocks(case.values.double(), case.slots, case.weight_shape).requires_grad_()
    dense = torch.nn.functional.conv2d if weight.dim() == 4 else torch.nn.functional.linear
    y = dense(x, weight, None if case.bias is None else case.bias.double(), **case.kwargs)
    dx, dweight = torch.autograd.grad(y, (x, weight), case.grad.double())
    return {
        "": y.detach(),
        "input_grad": dx,
        "weight_grad": pack_blocks(dweight, case.slots, case.block),
        "block_scores": block_norms(dweight, case.block),
    }


class GuardedHeap:
    """What operators allocate (outputs, workspaces) beside such pages, too; needs the library of build_guarded_heap.

    A byte written beside an allocation, which its alignment kept from the page, ends the process by SIGABRT.
    """

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        self.library.guard_heap_live.restype = ctypes.c_int64
        self.library.guard_heap_fail.argtypes = [ctypes.c_int64, ctypes.c_size_t]

    def __enter__(self) -> None:
        self.library.guard_heap(1)

    def __exit__(self, *_: object) -> None:
        self.library.guard_heap(0)


def build_guarded_heap(folder: Path) -> Path:
    """Compiles the library to preload (LD_PRELOAD)."""
    library = folder / "guard_heap.so"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*compiler, str(Path(__file__).with_name("guard_heap.cpp")), "-o", str(library)], check=True)
    return library
