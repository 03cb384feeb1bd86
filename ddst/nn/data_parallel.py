"""DistributedDataParallel around layers whose storage may change its size.

The reducer of a DistributedDataParallel holds autograd's accumulators of the parameters it was made with. An exchange
of blocks writes in place and leaves them alone. Where packed values get another shape, a reducer that lives on rejects
their gradients, or no longer sees them, silently. So it has to be let go before, and made anew after.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

if dist.is_available():
    from torch.nn.parallel import DistributedDataParallel

_watched: weakref.WeakSet[Any] = weakref.WeakSet()
_found: list[Any] | None = None  # All wrappers, inside of searched_once.


def watch(ddp: nn.Module) -> nn.Module:
    """Lets a DistributedDataParallel follow changes of storage inside it: one line, after wrapping.

    ``ddp = ddst.watch(DistributedDataParallel(model))``. Needed where the packed values may change their size: a
    density that is steered (``ddst.DDST``), ``scope="global"``, ``load_state_dict`` of another number of blocks,
    ``set_block_mask`` by hand, ``densify`` and ``sparsify`` of a wrapped model. Without it these raise, as torch would
    reject or lose gradients. Exchanges at a constant count need nothing.

    At such a change the reducer is let go; the next ``ddp(...)`` makes a new one on the same object, with the same
    settings, hooks and communication hooks. All ranks must change alike.

    Args:
        ddp: the wrapper itself. Returned as it is.

    Raises:
        TypeError: not a DistributedDataParallel.
        ValueError: it has a process group of its own or mixed_precision, which cannot be set up again.

    Numerics: a new reducer lays its buckets anew, and gloo's sums depend on the place in a bucket: on three ranks or
        more, gradients after a change of storage may differ in the last bit from those of a run that began with it.
    """
    if not (dist.is_available() and isinstance(ddp, DistributedDataParallel)):
        raise TypeError(f"ddp must be a torch.nn.parallel.DistributedDataParallel, got {type(ddp).__name__}")
    if ddp.process_group is not dist.group.WORLD:
        raise ValueError("ddp must have the default process group: torch sets up no other again")
    if ddp.mixed_precision is not None:
        raise ValueError("ddp must have mixed_precision=None: use torch.autocast, or reserve= instead of ddst.watch")
    if ddp not in _watched:
        _watched.add(ddp)
        ddp.register_forward_pre_hook(_renew)
    return ddp


def wrappers_of(modules: Iterable[nn.Module]) -> list[Any]:
    """The living DistributedDataParallel objects around any of some modules.

    A module does not know what it is wrapped in, so Python's objects are searched: for rare events only.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    wanted = {id(module) for module in modules}
    wrappers = _all_wrappers() if _found is None else _found
    return [ddp for ddp in wrappers if any(id(module) in wanted for module in ddp.modules())]


def _all_wrappers() -> list[Any]:
    return [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]


@contextmanager
def searched_once() -> Iterator[None]:
    """Inside, where no wrapper is made, Python's objects are searched once for all layers."""
    global _found
    before = _found
    if _found is None and dist.is_available() and dist.is_initialized():
        _found = _all_wrappers()
    try:
        yield
    finally:
        _found = before


def resize_fault(modules: Iterable[nn.Module], event: str) -> str:
    """Why parameters in some modules may not change their size, or ""."""
    return _resize_fault(wrappers_of(modules), event)


def _resize_fault(wrappers: list[Any], event: str) -> str:
    if all(ddp in _watched for ddp in wrappers):
        return _move_fault(wrappers)
    return (
        f"{event} inside a DistributedDataParallel that does not know of it and would reject or lose gradients: call "
        "ddst.watch(ddp) once, after wrapping; or change it before the DistributedDataParallel is made"
    )


def move_fault(modules: Iterable[nn.Module]) -> str:
    """Why blocks may not move in some modules, or ""."""
    return _move_fault(wrappers_of(modules))


def _move_fault(wrappers: list[Any]) -> str:
    for ddp in wrappers:
        if any(type(state).__name__ == "PowerSGDState" for _, state in ddp._comm_hooks):
            return (
                "DistributedDataParallel has a PowerSGD communication hook, which would add the residual of a block "
                "that left to the block that takes its slot: use another hook, or none, where blocks move"
            )
    return ""


def let_go(modules: Iterable[nn.Module], event: str) -> None:
    """Ends the reducers around some modules, before parameters of theirs change their size.

    Raises:
        RuntimeError: a wrapper does not know of it, see :func:`watch`; nothing is changed then.
    """
    wrappers = wrappers_of(modules)
    fault = _resize_fault(wrappers, event)
    if fault:
        raise RuntimeError(fault)
    for ddp in wrappers:
        ddp.reducer = ddp.logger = None


def _renew(ddp: Any, _: Any) -> None:
    """A new reducer where the former was let go, before the forward pass."""
    if ddp.reducer is None:
        # Not as a decorator, which imports the compiler: half of what `import ddst` would take.
        torch.compiler.disable(_make_reducer)(ddp)


def _make_reducer(ddp: Any) -> None:
    # What torch does for a wrapper that was pickled; it keeps settings, training mode and hooks.
    hooks, ddp._comm_hooks = ddp._comm_hooks, []
    ddp.__setstate__(ddp.__getstate__())
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)


def is_sharded(*tensors: Tensor) -> bool:
    """Whether one of them is a DTensor, of which each rank holds a part: fully_shard makes them."""
    module = sys.modules.get("torch.distributed.tensor")  # which takes a second to import; without it there are none
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be a DTensor; differentiable. Where it is one, all ranks must call this."""
    if is_sharded(tensor):
        gathered: Any = tensor
        full: Tensor = gathered.full_tensor()
        return full
    return tensor
