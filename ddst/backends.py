"""Which implementation runs an operator, and why.

Each backend answers one question, ``supports(problem) -> (ok, reason)``. "auto" takes the first that says yes in
:data:`AUTO_ORDER`; asking for a backend that says no is an error with its reason, never a silent fallback.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._arguments import check_one_of


@dataclass(frozen=True)
class Problem:
    """What a backend has to know to say yes or no.

    Attributes:
        device: device type, such as "cpu".
        dtype: the compute dtype.
        block: ``(b_out, b_in)``, or None for an operator without packed values.
        kernel, stride, dilation: of a convolution; a linear layer is a 1×1 convolution.
        linear: whether it is a linear layer.
    """

    device: str
    dtype: torch.dtype
    block: tuple[int, int] | None
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    linear: bool = False

    @classmethod
    def of(
        cls,
        input: Tensor,
        values: Tensor,
        kernel: tuple[int, int] = (1, 1),
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        *,
        linear: bool = False,
    ) -> Problem:
        """The problem of these tensors.

        Raises:
            ValueError: values that are no list of blocks.
        """
        if values.dim() != 3 or 0 in values.shape[1:]:
            raise ValueError(f"values must have the shape [nnz, b_out, b_in], got {tuple(values.shape)}")
        block = (values.shape[1], values.shape[2])
        return cls(input.device.type, input.dtype, block, kernel, stride, dilation, linear)


def _supports_cpu(problem: Problem) -> tuple[bool, str]:
    if problem.device != "cpu":
        return False, f"runs on CPU tensors only, got a tensor on {problem.device!r}"
    if problem.dtype not in (torch.float32, torch.float64):
        return False, f"computes in float32 and float64, got {problem.dtype}"
    slow = [n for n, b in zip(("b_out", "b_in"), problem.block or (), strict=False) if b % 8]
    if slow:
        return True, f"{' and '.join(slow)} of the block {problem.block} not a multiple of 8: slower than it could be"
    return True, "fast: block sides are multiples of 8"


@functools.lru_cache(maxsize=1024)  # asked at every call of an operator
def _supports_triton(problem: Problem) -> tuple[bool, str]:
    if problem.device != "cuda":
        return False, f"runs on CUDA tensors only, got a tensor on {problem.device!r}"
    if importlib.util.find_spec("triton") is None:
        return False, "needs the package triton, which is not installed: pip install 'ddst[gpu]'"
    kernels = importlib.import_module("ddst.kernels")  # imports triton
    return kernels.supports(problem.dtype, problem.block)


def _supports_cuda(problem: Problem) -> tuple[bool, str]:
    if problem.device != "cuda":
        return False, f"runs on CUDA tensors only, got a tensor on {problem.device!r}"
    cuda = importlib.import_module("ddst.ops.cuda")
    return cuda.supports_all(problem)


def _supports_reference(problem: Problem) -> tuple[bool, str]:
    return True, "dense arithmetic on the unpacked weight: right, but saves neither time nor memory"


BACKENDS: dict[str, Callable[[Problem], tuple[bool, str]]] = {
    "cpu": _supports_cpu,
    "triton": _supports_triton,
    "cuda": _supports_cuda,
    "reference": _supports_reference,
}

#: What "auto" tries, in order. The reference is never chosen unasked; where "triton" is chosen, a pass that a kept
#: measurement of this device model says is faster in CUDA C++ runs there (:mod:`ddst.ops.preferred`).
AUTO_ORDER = ("cpu", "triton")


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
    """Returns ``backend`` if it names one or is "auto", else raises TypeError or ValueError."""
    return check_one_of("backend", backend, ("auto", *BACKENDS))


def choose(backend: str, problem: Problem) -> str:
    """The backend that runs a problem.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: the backend asked for, or with "auto" every one of them, says no; the message holds the reasons.

    >>> choose("auto", Problem("cpu", torch.float32, (16, 16)))
    'cpu'
    """
    refusals = []
    for name in AUTO_ORDER if backend == "auto" else (backend,):
        ok, reason = supports(name, problem)
        if ok:
            return name
        refusals.append(f"{name}: {reason}")
    hint = "; backend='reference' runs anywhere, as dense arithmetic" if backend == "auto" else ""
    raise RuntimeError(f"no block-sparse backend for this input ({'; '.join(refusals)}){hint}")
