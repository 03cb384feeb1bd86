"""Which sparse layer is the twin of which layer of :mod:`torch.nn`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from .base import SparseLayer
from .conv import settings_of
from .conv1d import SparseConv1d
from .conv2d import SparseConv2d
from .conv_transpose1d import SparseConvTranspose1d
from .conv_transpose2d import SparseConvTranspose2d
from .linear import SparseLinear

#: Class of torch -> sparse class.
SPARSE_KINDS: dict[type[nn.Module], Any] = {
    kind.dense_kind: kind
    for kind in (SparseLinear, SparseConv1d, SparseConv2d, SparseConvTranspose1d, SparseConvTranspose2d)
}


def shell_of(module: Any, kind: Any, weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Module:
    """A plain layer of torch, of a kind, with a module's settings and mode around a weight and a bias."""
    if kind is nn.Linear:
        shell = nn.Linear(module.in_features, module.out_features, bias is not None, device="meta")
    else:
        sizes = (module.in_channels, module.out_channels, module.kernel_size)
        shell = kind(*sizes, bias=bias is not None, device="meta", **settings_of(module))
    shell.weight = weight
    shell.bias = bias  # type: ignore[assignment]
    return shell.train(module.training)


@functools.cache
def names_of(kind: Any) -> frozenset[str]:
    """Every attribute of a sparse layer of a kind, of its class and its own."""
    with torch.random.fork_rng(devices=[]):
        example: SparseLayer = kind(*[1] * (2 if kind is SparseLinear else 3), density=1.0, block=1, device="meta")
    return frozenset(dir(example))
