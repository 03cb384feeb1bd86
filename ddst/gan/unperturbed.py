"""Forward passes that leave no trace in the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

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
    devices = {p.device for root in modules for p in root.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for owner, name, buffer, copy in saved:
                owner[name] = buffer.copy_(copy)
