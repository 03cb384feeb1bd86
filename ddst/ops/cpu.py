"""What the compiled CPU kernels (``csrc/cpu``) take: they register themselves as operators, and here as a backend."""

from __future__ import annotations

import torch

from .. import backends


def supports(problem: backends.Problem) -> tuple[bool, str]:
    """``(ok, reason)``: whether the CPU kernels run a problem.

    >>> supports(backends.Problem("cpu", torch.float32, (16, 16)))
    (True, 'fast: block sides are multiples of 8')
    """
    if problem.device != "cpu":
        return False, f"runs on CPU tensors only, got a tensor on {problem.device!r}"
    if problem.dtype not in (torch.float32, torch.float64):
        return False, f"computes in float32 and float64, got {problem.dtype}"
    slow = [n for n, b in zip(("b_out", "b_in"), problem.block or (), strict=False) if b % 8]
    if slow:
        return True, f"{' and '.join(slow)} of the block {problem.block} not a multiple of 8: slower than it could be"
    return True, "fast: block sides are multiples of 8"


backends.register("cpu", supports)
