"""Forward passes that leave no trace in the training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ddst.nn import SparseLayer


@contextmanager
def unperturbed(*modules: nn.Module) -> Iterator[None]:
    """Puts buffers and the random state back at the end: forward passes inside leave no trace in the training."""
    saved = [
        (module._buffers, name, buffer, buffer.clone())
        for root in modules
        for module in root.modules()
        if not isinstance(module, SparseLayer)  # its buffers are masks and indices, which no forward pass changes
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with torch.random.fork_rng(devices=_cuda_devices(modules)):
        try:
            yield
        finally:
            for owner, name, buffer, copy in saved:
                owner[name] = buffer.copy_(copy)


def random_states(*modules: nn.Module) -> list[Tensor]:
    """The states of torch's default generators that forward passes of these may draw from.

    >>> before = random_states()
    >>> _ = torch.rand(1)
    >>> torch.equal(before[0], random_states()[0])
    False
    """
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _cuda_devices(modules))]


def _cuda_devices(modules: Sequence[nn.Module]) -> list[torch.device]:
    devices = {p.device for root in modules for p in root.parameters() if p.device.type == "cuda"}
    return sorted(devices, key=str)
