"""Lists derived from a topology tensor, made once and kept while it lives unchanged."""

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

    Not kept while a CUDA graph is being captured, as what is captured has not run, nor for inference tensors, which
    have no version counter.
    """
    if topology.is_inference() or (topology.is_cuda and torch.cuda.is_current_stream_capturing()):
        return build()
    version, lists = _cache.get(topology, (None, {}))
    if version != topology._version:
        lists = {}
        _cache[topology] = (topology._version, lists)
    if key not in lists:
        lists[key] = build()
    return lists[key]
