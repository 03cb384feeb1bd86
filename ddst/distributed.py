"""Several processes on torch.distributed: what sparse training says to the other ranks, and nothing else.

Packed gradients are ordinary tensors, which ``DistributedDataParallel`` or a loop's own ``all_reduce`` averages. What
moves blocks needs more: that all ranks hold the same blocks, and that growth is decided by the gradient of the joined
batch. With one process every function here returns what it was given.

Whatever goes to a backend is a contiguous copy: gloo adds memory, not entries, and ignores strides without a word.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ._arguments import check_module
from .nn import SparseLayer, sparse_layers
from .nn.data_parallel import is_sharded, move_fault, resize_fault, watch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["average", "average_gradients", "ranks", "synchronize", "watch"]

_BUCKET = 1 << 22  # entries averaged in one call


def ranks(process_group: ProcessGroup | None = None) -> int:
    """Number of processes that train together: 1 before ``init_process_group``."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return max(1, dist.get_world_size(process_group))


def average(tensor: Tensor, process_group: ProcessGroup | None = None) -> Tensor:
    """``Σ over ranks of tensor / ranks``, the same bits on every rank.

    Args:
        tensor: any shape, strides and floating dtype, the same shape on all ranks, each of which must call this.
        process_group: None: the default group.

    Returns:
        A new contiguous tensor; with one process ``tensor`` itself.

    Numerics: summed in float32, float64 in float64. On more than two ranks the order of the sum depends on the entry's
        place in the tensor.

    >>> average(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    count = ranks(process_group)
    if count == 1:
        return tensor
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    device = _home(tensor.device, process_group)
    total = tensor.detach().to(device, wide, copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=process_group)
    return total.div_(count).to(tensor.device, tensor.dtype)


def average_numbers(numbers: Sequence[float], process_group: ProcessGroup | None = None) -> list[float]:
    """The means over the ranks of some numbers.

    >>> average_numbers([1.0, 2.0])
    [1.0, 2.0]
    """
    if ranks(process_group) == 1:
        return list(numbers)
    mean: list[float] = average(torch.tensor(numbers, dtype=torch.float64), process_group).tolist()
    return mean


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], process_group: ProcessGroup | None = None) -> None:
    """``p.grad ← mean over ranks``, for a loop without DistributedDataParallel; to be called by every rank.

    Parameters without a gradient are left out, and must be the same ones on all ranks.

    Cost: the bytes of the packed gradients, a share ``d`` of the dense ones, in pieces of at most 16 MB.
    """
    if ranks(process_group) == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    while grads:
        piece = [grads.pop(0)]
        while grads and _same_kind(piece[0], grads[0]) and sum(g.numel() for g in [*piece, grads[0]]) <= _BUCKET:
            piece.append(grads.pop(0))
        flat = average(torch.cat([g.reshape(-1) for g in piece]), process_group)
        for grad, mean in zip(piece, flat.split([g.numel() for g in piece]), strict=True):
            grad.copy_(mean.view(grad.shape))


def _same_kind(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device


def of_first_rank(tensor: Tensor, process_group: ProcessGroup | None = None) -> Tensor:
    """Rank 0's tensor, bit for bit: shape and dtype must be the same on all ranks; any dtype."""
    if ranks(process_group) == 1:
        return tensor
    # As bytes: backends do not know every dtype.
    copy = tensor.detach().to(_home(tensor.device, process_group), copy=True, memory_format=torch.contiguous_format)
    if copy.numel():
        dist.broadcast(copy.view(-1).view(torch.uint8), group=process_group, group_src=0)
    return copy.to(tensor.device)


def sums(flags: Sequence[int], process_group: ProcessGroup | None = None) -> list[int]:
    """Sums over the ranks of whole numbers."""
    if ranks(process_group) == 1:
        return list(flags)
    total = torch.tensor(flags, dtype=torch.int64).to(_home(torch.device("cpu"), process_group))
    dist.all_reduce(total, group=process_group)
    added: list[int] = total.tolist()
    return added


def gather_numbers(
    numbers: Sequence[float | None], process_group: ProcessGroup | None = None
) -> list[list[float | None]]:
    """Every rank's numbers, by rank, bit for bit; None where a rank has none. No number may be NaN.

    >>> gather_numbers([1.0, None])
    [[1.0, None]]
    """
    own = torch.tensor([math.nan if number is None else number for number in numbers], dtype=torch.float64)
    rows = _gathered(own.view(torch.int64).tolist(), process_group) if ranks(process_group) > 1 else [own]
    every = torch.stack([torch.as_tensor(row).view(torch.float64) for row in rows]).tolist()
    return [[None if math.isnan(number) else number for number in row] for row in every]


def check_same(fingerprints: Mapping[str, bytes], what: str, remedy: str, process_group: ProcessGroup | None) -> None:
    """Raises on every rank unless all ranks hold the same.

    Args:
        fingerprints: by name, the bytes that must be equal. what, remedy: of the message.

    Raises:
        RuntimeError: names the ranks and the first names that differ from rank 0's.

    Cost: 16 bytes a rank where they are the same.
    """
    count = ranks(process_group)
    if count == 1:
        return
    digests = [_digest(name.encode() + b"\0" + content) for name, content in fingerprints.items()]
    whole = _gathered([len(digests), _digest(repr(digests).encode())], process_group)
    others = [rank for rank in range(count) if whole[rank] != whole[0]]
    if not others:
        return
    where = ""
    if all(row[0] == whole[0][0] for row in whole):
        every = _gathered(digests, process_group)
        names = [n for i, n in enumerate(fingerprints) if any(row[i] != every[0][i] for row in every)]
        where = f" (in {', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
    raise RuntimeError(
        f"torch.distributed: {what} on rank {', '.join(map(str, others))} and on rank 0 are not the same{where}. "
        + remedy
    )


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True)


def _gathered(numbers: Sequence[int], process_group: ProcessGroup | None) -> list[list[int]]:
    mine = torch.tensor(numbers, dtype=torch.int64).to(_home(torch.device("cpu"), process_group))
    parts = [torch.empty_like(mine) for _ in range(ranks(process_group))]
    dist.all_gather(parts, mine, group=process_group)
    return [part.tolist() for part in parts]


def _home(device: torch.device, process_group: ProcessGroup | None) -> torch.device:
    """``device`` where the group has a backend for it, else the one that it has a backend for."""
    backends = dict(pair.split(":") for pair in dist.get_backend_config(process_group).split(","))
    if device.type in backends:
        return device
    if device.type != "cpu" and "cpu" in backends:
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type not in backends:
        raise RuntimeError(f"torch.distributed: the process group has no backend for {device.type}: {backends}")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


@torch.no_grad()
def synchronize(model: nn.Module, process_group: ProcessGroup | None = None) -> None:
    """Gives every rank the blocks, slots, parameters and buffers of rank 0. To be called by every rank.

    ``ddst.sparsify`` draws the same masks on all ranks where the process group exists when it is called; where it was
    called before ``init_process_group``, or a mask was changed by hand or loaded on one rank only, this line makes
    the ranks equal: before DistributedDataParallel is made, which takes over values, but not slots. With one process
    it does nothing.

    Args:
        model: the same network on all ranks; its sparse layers may hold other blocks, and another number of them.
        process_group: None: the default group.

    Raises:
        RuntimeError: the ranks have other layers or parameters; nothing is changed then. Or the storage of a layer
            changes size that is wrapped in a DistributedDataParallel which :func:`watch` was not told of.
        ValueError: the model is sharded (fully_shard), so that ranks hold other parts of it.

    Cost: the bytes of the packed model.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    >>> import ddst
    >>> report = ddst.sparsify(model, 0.5)
    >>> synchronize(model)
    """
    if ranks(process_group) == 1:
        check_module("model", model)
        return
    layers = sparse_layers(check_module("model", model))
    if is_sharded(*model.parameters()):
        raise ValueError("model is sharded (fully_shard, DTensor): call ddst.synchronize(model) before fully_shard")
    packed = {id(layer.values) for layer in layers.values()}
    parts = {
        name: repr((None if id(tensor) in packed else tuple(tensor.shape), tensor.dtype)).encode()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    grids = {name: repr((layer.weight_shape, layer.block)).encode() for name, layer in layers.items()}
    remedy = "Build and sparsify the same network on every rank, with the same density, block and reserve"
    check_same({**parts, **grids}, "the model's parts", remedy, process_group)
    if layers:
        sizes = torch.tensor([(layer.slots, layer.reserve) for layer in layers.values()])
        sizes = of_first_rank(sizes, process_group)
        maps = [
            layer.slot_blocks if layer.slots == slots else layer.slot_blocks.new_zeros(slots)
            for layer, slots in zip(layers.values(), sizes[:, 0].tolist(), strict=True)
        ]
        maps = list(of_first_rank(torch.cat(maps), process_group).split(sizes[:, 0].tolist()))
        for layer, slot_blocks, reserve in zip(layers.values(), maps, sizes[:, 1].tolist(), strict=True):
            layer.reserve = reserve
            layer._adopt_slots(slot_blocks)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.copy_(of_first_rank(tensor, process_group))


def check_movable(
    layers: Mapping[str, SparseLayer], resizes: str = "", process_group: ProcessGroup | None = None
) -> None:
    """Raises unless blocks of these layers may move: before training, not at its first update.

    Args:
        resizes: what may change the number of a layer's slots; "" where all changes keep it.
    """
    for name, layer in layers.items():
        if is_sharded(layer.values):
            raise ValueError(
                f"{name}.values is a DTensor, of which each rank holds a part (fully_shard): masks stay as they are "
                'there. Use method="static", or DistributedDataParallel'
            )
    fault = resize_fault(layers.values(), resizes) if resizes else move_fault(layers.values())
    if fault:
        raise ValueError(fault)


def check_same_slots(
    layers: Mapping[str, SparseLayer], changes: Mapping[str, Tensor], process_group: ProcessGroup | None
) -> None:
    """Raises on every rank unless all ranks hold the same blocks in the same slots and are to take the same masks."""
    if ranks(process_group) == 1:
        return
    fingerprints = {
        name: layer.slot_blocks.numpy().tobytes() + (changes[name].numpy().tobytes() if name in changes else b"")
        for name, layer in layers.items()
    }
    remedy = (
        "Call ddst.synchronize(model) on every rank before training and after a change by hand, give all ranks the "
        "same averaged gradients (DistributedDataParallel, ddst.distributed.average_gradients) and the same "
        "settings; for models that do not train together pass process_group"
    )
    check_same(fingerprints, "the blocks of sparse layers", remedy, process_group)


def same_masks(masks: Mapping[str, Tensor], process_group: ProcessGroup | None) -> dict[str, Tensor]:
    """Rank 0's masks on every rank; an error on all of them where their layers differ."""
    if ranks(process_group) == 1 or not masks:
        return dict(masks)
    grids = {name: repr(tuple(mask.shape)).encode() for name, mask in masks.items()}
    remedy = "Give every rank the same network and settings; only_if_faster the same ddst.Advice of one rank"
    check_same(grids, "the layers to be made sparse", remedy, process_group)
    joined = of_first_rank(torch.cat([mask.reshape(-1) for mask in masks.values()]), process_group)
    parts = joined.split([mask.numel() for mask in masks.values()])
    return {name: part.view(mask.shape).clone() for (name, mask), part in zip(masks.items(), parts, strict=True)}


def follow_first_rank(generator: torch.Generator, process_group: ProcessGroup | None) -> None:
    """Makes every rank's generator draw what rank 0's draws."""
    if ranks(process_group) > 1:
        generator.set_state(of_first_rank(generator.get_state(), process_group))
