"""Lists derived from a topology tensor, made once and kept while it lives unchanged.

They are kept under the tensor itself, by weak reference, and its version counter: an in-place change makes new ones.
Two kinds of lists are made anew at every call: those of an inference tensor, which counts no versions, and those
missing while a CUDA graph is captured, whose contents would exist only after its first replay. A graph that finds its
lists here keeps their addresses: after a change of the mask it has to be captured again. Lists are made on the stream
of the call that needs them first; another stream has to wait for it, as for any tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_Lists = TypeVar("_Lists")
_cache = WeakTensorKeyDictionary()


def cached(topology: Tensor, key: Hashable, build: Callable[[], _Lists]) -> _Lists:
    """``build()``, kept under ``key`` until the topology dies or is written to.

    >>> topology = torch.zeros(4, dtype=torch.int32)
    >>> first, again = (cached(topology, "name", lambda: object()) for _ in range(2))
    >>> first is again, first is cached(topology.zero_(), "name", lambda: object())
    (True, False)
    """
    if topology.is_inference():
        return build()
    version, lists = _cache.get(topology, (None, {}))
    if version != topology._version:
        version, lists = topology._version, {}
    if key in lists:
        return lists[key]
    made = build()
    if not _is_captured(topology):
        lists[key] = made
        _cache[topology] = (version, lists)
    return made


def refresh(topology: Tensor) -> None:
    """placeholder"""
    _cache.pop(topology, None)


def _is_captured(tensor: Tensor) -> bool:
    """Whether operations on the tensor are being captured in a CUDA graph, and do not run now."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
