"""A network's weights as they were before its optimizer's last step, put back for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddst.sparsity.wrapped import optimizers_of


class EarlierWeights:
    """Copies a network's parameters before each step of its optimizer in which they are wanted.

    A step inside a CUDA graph is replayed without a word to Python: once captured, it copies in each replay, always
    into the same memory (not run on a device yet).

    Args:
        network, optimizer: whose parameters, before whose steps.
        wanted: whether they are, asked before each step.

    >>> layer = nn.Linear(1, 1)
    >>> sgd = torch.optim.SGD(layer.parameters(), lr=1.0)
    >>> earlier, before = EarlierWeights(layer, sgd, lambda: True), layer.weight.item()
    >>> layer(torch.ones(1, 1)).sum().backward()
    >>> sgd.step()
    >>> with earlier.in_place():
    ...     layer.weight.item() == before
    True
    >>> layer.weight.item() == before
    False
    """

    def __init__(self, network: nn.Module, optimizer: Optimizer, wanted: Callable[[], bool]) -> None:
        self._network, self._wanted = network, wanted
        self._held: list[Tensor] = []
        self._captured = False
        self._hook = optimizers_of(optimizer)[-1].register_step_pre_hook(lambda *_: self._keep())

    @torch.no_grad()
    def _keep(self) -> None:
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        self._captured |= capturing
        if not (capturing or self._wanted()):
            return
        parameters = list(self._network.parameters())
        held, now = ([(t.shape, t.dtype, t.device) for t in tensors] for tensors in (self._held, parameters))
        if held == now:
            _write(self._held, parameters)
        else:
            self._held = [parameter.clone() for parameter in parameters]

    @property
    def kept(self) -> bool:
        """Whether there are any: the optimizer has made a step since :meth:`forget`."""
        return bool(self._held)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The earlier weights are the network's inside of the block."""
        parameters = list(self._network.parameters())
        now = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            _write(parameters, self._held)
            try:
                yield
            finally:
                _write(parameters, now)

    def forget(self) -> None:
        """Lets the copies go, unless a graph writes them."""
        if not self._captured:
            self._held = []

    def close(self) -> None:
        """Removes the hook from the optimizer, and lets the copies go."""
        self._hook.remove()
        self._held = []


def _write(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(to, values, strict=True):
        tensor.copy_(value)
