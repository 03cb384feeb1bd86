"""Which backend runs a layer, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import BACKENDS, Problem, choose, supports
from .base import SparseLayer


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. ``str()`` gives the text.

    Attributes:
        backend: the backend that runs.
        capability: the instruction set of its kernels ("portable", "avx2", "avx512"), or "" where it has none.
        reason: why it runs.
        refused: every other backend and why it was not taken.
    """

    layer: str
    backend: str
    capability: str
    reason: str
    refused: dict[str, str]

    def __str__(self) -> str:
        kernel = f" ({self.capability} kernels)" if self.capability else ""
        lines = [self.layer, f"  runs on {self.backend}{kernel}: {self.reason}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def explain(layer: SparseLayer, input: Tensor) -> Explanation:
    """``explain(layer, x)``: the backend that ``layer(x)`` runs on, its kernels, and why the others are not taken.

    Args:
        layer: a block-sparse layer.
        input: what it would be called with.

    Raises:
        TypeError: not a block-sparse layer.
        RuntimeError: no backend takes this input; the message holds the reasons.

    >>> from ddst.nn import SparseLinear
    >>> explain(SparseLinear(32, 32), torch.zeros(1, 32)).backend
    'cpu'
    """
    if not isinstance(layer, SparseLayer):
        raise TypeError(f"layer must be a block-sparse layer, got {type(layer).__name__}")
    computed = torch.float64 if input.dtype == torch.float64 else torch.float32
    chosen = choose(layer.backend, input.to(computed), layer.values)
    problem = Problem(input.device.type, computed, layer.block)
    asked = f"backend={layer.backend!r} asked for, " if layer.backend != "auto" else ""
    refused = {}
    for name in BACKENDS:
        if name != chosen:
            ok, reason = supports(name, problem)
            refused[name] = reason if not ok or name == "reference" else f"backend={layer.backend!r} asked for"
    capability = torch.ops.ddst.cpu_capability() if chosen == "cpu" else ""
    return Explanation(repr(layer), chosen, capability, asked + supports(chosen, problem)[1], refused)
