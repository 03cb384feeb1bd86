"""Index lists of the CUDA C++ kernels, kept for a topology as :mod:`ddst.index_cache` says.

On a CUDA device each is written by one launch of :mod:`ddst.kernels.cuda_lists`, the first time and, in place, whenever
blocks have moved. Elsewhere, and where Triton is missing, some dozen operations of torch make the same.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ...index_cache import cached

_Lists = TypeVar("_Lists", bound=Tensor | tuple[Tensor, ...])


class Listing(Protocol[_Lists]):
    """What decides on lists beside the topology; no two kinds are equal."""

    def __hash__(self) -> int: ...

    def by_operators(self, topology: Tensor) -> _Lists:
        """The lists, by operations of torch on the topology's device."""

    def empty(self, topology: Tensor) -> _Lists:
        """Memory for the lists of a topology of so many slots."""

    def rewrite(self, topology: Tensor, lists: _Lists) -> None:
        """Writes the lists there by one launch."""


def kept(topology: Tensor, listing: Listing[_Lists]) -> _Lists:
    """The lists of a topology, made, rewritten or as they are kept."""
    if is_launched(topology):
        return cached(topology, listing, functools.partial(_by_launch, listing), listing.rewrite)
    return cached(topology, listing, listing.by_operators)


def _by_launch(listing: Listing[_Lists], topology: Tensor) -> _Lists:
    lists = listing.empty(topology)
    listing.rewrite(topology, lists)
    return lists


def is_launched(topology: Tensor) -> bool:
    """Whether a launch writes lists, not operations of torch."""
    return topology.is_cuda and has_triton()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def kernels() -> Any:
    """The launches, which import triton."""
    return importlib.import_module("ddst.kernels.cuda_lists")
