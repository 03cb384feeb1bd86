"""Which implementation runs an operator, and why.

Each backend answers one question, ``supports(problem) -> (ok, reason)``. "auto" takes the first that says yes in
:data:`AUTO_ORDER`; asking for a backend that says no is an error with its reason, never a silent fallback.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """What a backend has to know to say yes or no.

    Attributes:
        device: device type, such as "cpu".
        dtype: the compute dtype.
        block: ``(b_out, b_in)``, or None for an operator without packed values.
    """

    device: str
    dtype: torch.dtype
    block: tuple[int, int] | None


def _supports_cpu(problem: Problem) -> tuple[bool, str]:
    if problem.device != "cpu":
        return False, f"runs on CPU tensors only, got a tensor on {problem.device!r}"
    if problem.dtype not in (torch.float32, torch.float64):
        return False, f"computes in float32 and float64, got {problem.dtype}"
    slow = [n for n, b in zip(("b_out", "b_in"), problem.block or (), strict=False) if b % 8]
    if slow:
        return True, f"{' and '.join(slow)} of the block {problem.block} not a multiple of 8: slower than it could be"
    return True, "fast: block sides are multiples of 8"


def _supports_reference(problem: Problem) -> tuple[bool, str]:
    return True, "dense arithmetic on the unpacked weight: right, but saves neither time nor memory"


BACKENDS: dict[str, Callable[[Problem], tuple[bool, str]]] = {
    "cpu": _supports_cpu,
    "reference": _supports_reference,
}

#: What "auto" tries, in order. The reference is never chosen unasked.
AUTO_ORDER = ("cpu",)


def supports(backend: str, problem: Problem) -> tuple[bool, str]:
    """``(ok, reason)``: whether a backend can run a problem.

    Raises:
        ValueError: an unknown backend.

    >>> supports("cpu", Problem("cuda", torch.float32, (16, 16)))
    (False, "runs on CPU tensors only, got a tensor on 'cuda'")
    """
    check_backend(backend)
    return BACKENDS[backend](problem)


def check_backend(backend: str) -> str:
    """Returns ``backend`` if it names one or is "auto", else raises ValueError."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    return backend


def choose(backend: str, input: Tensor, values: Tensor | None) -> str:
    """The backend that runs an operator on these tensors.

    Raises:
        ValueError: an unknown backend, or values that are no list of blocks.
        RuntimeError: the backend asked for, or with "auto" every one of them, says no; the message holds the reasons.

    >>> choose("auto", torch.zeros(1), None)
    'cpu'
    """
    if values is not None and (values.dim() != 3 or 0 in values.shape[1:]):
        raise ValueError(f"values must have the shape [nnz, b_out, b_in], got {tuple(values.shape)}")
    block = None if values is None else (values.shape[1], values.shape[2])
    problem = Problem(input.device.type, input.dtype, block)
    refusals = []
    for name in AUTO_ORDER if backend == "auto" else (backend,):
        ok, reason = supports(name, problem)
        if ok:
            return name
        refusals.append(f"{name}: {reason}")
    hint = "; backend='reference' runs anywhere, as dense arithmetic" if backend == "auto" else ""
    raise RuntimeError(f"no block-sparse backend for this input ({'; '.join(refusals)}){hint}")
