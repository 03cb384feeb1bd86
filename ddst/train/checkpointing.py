"""Activation checkpointing of a network's residual blocks, with the numbers of a network without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils.checkpoint import checkpoint


@contextmanager
def as_before(module: nn.Module) -> Iterator[None]:
    """Repeats a forward pass in here without a second update: of batch norm's statistics, of spectral norm's vectors.

    Sparse layers see to theirs themselves.
    """
    norms = [(m, m.momentum, m.num_batches_tracked) for m in module.modules() if isinstance(m, _BatchNorm)]
    spectral = [m for m in module.modules() if isinstance(m, _SpectralNorm) and m.training]
    for norm, _, _ in norms:
        # A share of 0 leaves the statistics as they are; saved are the same tensors as in the first pass.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    for vectors in spectral:
        vectors.eval()
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum, norm.num_batches_tracked = momentum, count
        for vectors in spectral:
            vectors.train()


class Checkpointed(nn.Module):
    """``block(...)``, of which only its inputs are saved for the backward pass; the rest is computed again there.

    Outputs, gradients, running statistics and spectral norm's vectors are those of the block alone.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Tensor) -> Any:
        return checkpoint(self.block, *inputs, use_reentrant=False, context_fn=partial(_contexts, self.block))


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _AsOftenAsBefore(block)


class _AsOftenAsBefore(AbstractContextManager[None]):
    """:func:`as_before`, entered for each of the times: the second derivative of a penalty repeats a block twice."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self.entered.append(as_before(self.block))
        self.entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)


def checkpoint_blocks(network: nn.Module) -> bool:
    """Puts each module of the network's list `blocks` into a :class:`Checkpointed`, in place; False: it has none."""
    blocks = getattr(network, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        return False
    for i, block in enumerate(blocks):
        blocks[i] = Checkpointed(block)
    return True
