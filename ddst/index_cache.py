"""Lists derived from a topology tensor, made once, kept while it lives, and rewritten in place when it is.

They are kept under the tensor itself, by weak reference, each with the version of the tensor that it was made of. Where
the tensor was written to since, the next call that asks for a list makes it anew *into the memory of the old one*
(its sizes follow from the number of slots alone), and :func:`refresh` does that at once for every list: a captured CUDA
graph that walks lists from here goes on with those of the new blocks, and needs no new capture. On a device with Triton
each takes one launch; no list has the host wait for the device.

Two kinds of lists are made anew at every call: those of an inference tensor, which counts no versions, and those that
are missing or outdated while a CUDA graph is captured. The latter belong to that graph, which makes them anew at every
replay: right as well, but slower. Lists are made on the stream of the call that needs them first, and rewritten on that
of the call that finds them outdated; another stream has to wait for it, as for any tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_Lists = TypeVar("_Lists", bound=Tensor | tuple[Tensor, ...])


@dataclass
class _Entry:
    build: Callable[[Tensor], Any]
    rewrite: Callable[[Tensor, Any], None] | None
    lists: Any
    length: int  # of the topology that they were made of
    version: int


_cache = WeakTensorKeyDictionary()  # topology -> key -> _Entry


def cached(
    topology: Tensor,
    key: Hashable,
    build: Callable[[Tensor], _Lists],
    rewrite: Callable[[Tensor, _Lists], None] | None = None,
) -> _Lists:
    """``build(topology)``, a tensor or a tuple of tensors, kept under ``key`` as long as the topology lives.

    ``rewrite(topology, lists)`` writes what ``build`` would return into the memory of lists of the same number of
    slots; without it they are built anew and copied there. Both are kept, too: they must hold no reference to the
    topology, nor return a view of it.

    >>> topology = torch.zeros(4, dtype=torch.int32)
    >>> first, again = (cached(topology, "name", lambda t: t + 1) for _ in range(2))
    >>> first is again, first is cached(topology.add_(5), "name", lambda t: t + 1), first.tolist()
    (True, True, [6, 6, 6, 6])
    """
    if topology.is_inference():
        return build(topology)
    entries = _cache.get(topology)
    entry = None if entries is None else entries.get(key)
    if entry is not None and entry.version == topology._version:
        return entry.lists
    if _is_captured(topology):
        return build(topology)
    if entry is None:
        entry = _Entry(build, rewrite, None, -1, -1)
        _cache.setdefault(topology, {})[key] = entry
    _rewrite(topology, entry)
    return entry.lists


def refresh(topology: Tensor) -> None:
    """Rewrites every list kept for a topology, in place: for graphs that walk them without asking :func:`cached`.

    Raises:
        RuntimeError: a CUDA graph is being captured, so that nothing would be rewritten now.

    >>> topology = torch.zeros(4, dtype=torch.int32)
    >>> kept = cached(topology, "name", lambda t: t + 1)
    >>> topology.add_(5), refresh(topology), kept.tolist()
    (tensor([5, 5, 5, 5], dtype=torch.int32), None, [6, 6, 6, 6])
    """
    if topology.is_inference():
        return
    if _is_captured(topology):
        raise RuntimeError("blocks cannot move while a CUDA graph is being captured: move them between replays")
    for entry in _cache.get(topology, {}).values():
        _rewrite(topology, entry)


def _rewrite(topology: Tensor, entry: _Entry) -> None:
    with torch.inference_mode(False):  # or what is made in inference mode could not be written to outside of it
        if entry.rewrite is not None and entry.length == topology.numel():
            entry.rewrite(topology, entry.lists)
            entry.version = topology._version
            return
        made = entry.build(topology)
        old, new = _tensors(entry.lists), _tensors(made)
        if [t.shape for t in old] == [t.shape for t in new]:
            for kept, fresh in zip(old, new, strict=True):
                kept.copy_(fresh)
        else:  # new, or the topology got another number of slots
            entry.lists = made
    entry.length, entry.version = topology.numel(), topology._version


def _tensors(lists: Any) -> tuple[Tensor, ...]:
    return () if lists is None else (lists,) if isinstance(lists, Tensor) else tuple(lists)


def _is_captured(tensor: Tensor) -> bool:
    """Whether operations on the tensor are being captured in a CUDA graph, and do not run now."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
