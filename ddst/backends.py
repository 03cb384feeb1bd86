"""Which implementation runs an operator, and why.

Each backend answers one question, ``supports(problem) -> (ok, reason)``, which the module that owns it registers here:
this one knows none of them. "auto" takes the first that says yes in :data:`AUTO_ORDER`; asking for a backend that says
no is an error with its reason, never a silent fallback.
"""

from __future__ import annotations

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
            raise ValueError(f"values must have the shape [slots, b_out, b_in], got {tuple(values.shape)}")
        block = (values.shape[1], values.shape[2])
        return cls(input.device.type, input.dtype, block, kernel, stride, dilation, linear)


Supports = Callable[[Problem], tuple[bool, str]]

#: What the operators take for a backend, as an int. The order is that in which messages name backends.
CODES = {"auto": 0, "cpu": 1, "triton": 2, "cuda": 3, "reference": 4}
BACKENDS = tuple(name for name in CODES if name != "auto")
_NAMES = {number: name for name, number in CODES.items()}
_supports: dict[str, Supports] = {}

#: What "auto" tries, in order. The reference is never chosen unasked; where "triton" is chosen, a pass that a kept
#: measurement of this device model says is faster in CUDA C++ runs there (:mod:`ddst.ops.cuda.preferred`).
AUTO_ORDER = ("cpu", "triton")


def register(name: str, supports: Supports) -> None:
    """Makes ``supports`` the answer of a backend: called once, by the module that owns it.

    Raises:
        ValueError: a name that :data:`CODES` lacks.
    """
    if name not in BACKENDS:
        raise ValueError(f"name must be one of {BACKENDS}, got {name!r}")
    _supports[name] = supports


def code(name: str) -> int:
    """The code by which the operators know a backend, or "auto".

    Raises:
        ValueError: an unknown backend.

    >>> code("auto"), code("triton")
    (0, 2)
    """
    return CODES[check_backend(name)]


def name_of(code: int) -> str:
    """The backend of a code; the inverse of :func:`code`.

    Raises:
        ValueError: a number that is no backend's.

    >>> name_of(3)
    'cuda'
    """
    if code not in _NAMES:
        raise ValueError(f"backend must be one of the codes {CODES}, got {code!r}")
    return _NAMES[code]


def supports(backend: str, problem: Problem) -> tuple[bool, str]:
    """``(ok, reason)``: whether a backend can run a problem.

    Raises:
        ValueError: an unknown backend, or "auto".

    >>> supports("cpu", Problem("cuda", torch.float32, (16, 16)))
    (False, "runs on CPU tensors only, got a tensor on 'cuda'")
    """
    if check_backend(backend) == "auto":
        raise ValueError("backend must name one, got 'auto': choose() says which one that is")
    return _supports[backend](problem)


def check_backend(backend: str) -> str:
    """Returns ``backend`` if it names one or is "auto", else raises TypeError or ValueError."""
    return check_one_of("backend", backend, tuple(CODES))


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
