"""What sparsity saves, counted: parameters, bytes of weight state, floating-point operations of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddst._arguments import check_int, check_module, check_optimizer, check_state_keys, check_type
from ddst.convert import find_weights
from ddst.convert.watch import multiply_adds
from ddst.nn import SparseLayer
from ddst.nn.spectral_norm import SpectralNorm
from ddst.sparsity.density import NetworkDensity
from ddst.sparsity.wrapped import optimizers_of


@dataclass(frozen=True)
class WeightMemory:
    """Bytes a network's trainable state takes, and would take if all its layers were dense.

    Attributes:
        values: parameters (packed values, biases, normalisation). gradients: allocated ones.
        optimizer: state tensors with a parameter's shape. average: parameters of the averaged copy.
        scheduler: what one keeps for the weights between steps (:attr:`ddst.DDST.held`).
        index: masks and topology vectors of sparse layers and their spectral norms, of the averaged copy too, which
            dense networks do not have; not part of :attr:`total`.
        dense: values + gradients + optimizer + average of the same network with dense layers.
    """

    values: int
    gradients: int
    optimizer: int
    average: int
    index: int
    dense: int
    scheduler: int = 0

    @property
    def total(self) -> int:
        """``values + gradients + optimizer + average + scheduler``."""
        return self.values + self.gradients + self.optimizer + self.average + self.scheduler

    @property
    def relative(self) -> float:
        """``total`` over ``dense``."""
        return self.total / self.dense if self.dense else 1.0


@dataclass(frozen=True)
class NetworkStats:
    """Density and size of one network.

    Attributes:
        density: over all weights (:class:`~ddst.sparsity.density.NetworkDensity`). sparse_density: over the sparse
            layers only.
        parameters: trainable numbers held. dense_parameters: of the same network with dense layers.
        memory: bytes.
    """

    density: float
    sparse_density: float
    parameters: int
    dense_parameters: int
    memory: WeightMemory

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def network_stats(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    average: nn.Module | None = None,
    held: Iterable[Tensor] = (),
) -> NetworkStats:
    """Density, parameter count and weight-state bytes of a network, by counting what it holds now.

    Args:
        model: the network.
        optimizer: of its parameters; its state counts, and that of one that it holds.
        average: an averaged copy (``ddst.EMA(...).module``); its parameters and indices count.
        held: what a scheduler keeps for it beside these (:attr:`ddst.DDST.held`).

    Numerics: bytes are those of the allocated storages, so a small view of a large tensor counts with the large one.

    >>> import ddst
    >>> stats = network_stats(ddst.SparseLinear(64, 64, bias=False, density=0.25))
    >>> stats.parameters, stats.dense_parameters, stats.memory.values
    (1024, 4096, 4096)
    """
    check_module("model", model)
    if optimizer is not None:
        check_optimizer("optimizer", optimizer)
    if average is not None:
        check_module("average", average)
    optimizers = [] if optimizer is None else optimizers_of(optimizer)
    network = NetworkDensity(model)
    grow = {id(layer.values): math.prod(layer.weight_shape) for layer in network.layers.values()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    once = {id(p): p for p in parameters}
    states: list[Tensor] = []
    dense = 0
    for parameter in parameters:
        # Weights of the dense twin for each number this tensor holds one of.
        size = grow.get(id(parameter), parameter.numel()) * parameter.element_size()
        # By identity: an optimizer may show the state of one that it holds.
        own = {id(s): s for one in optimizers for s in one.state.get(parameter, {}).values() if isinstance(s, Tensor)}
        mine = [s for s in own.values() if s.shape == parameter.shape and s.dim()]
        states += mine
        copies = 1 + (parameter.grad is not None) + len(mine) + (average is not None)
        dense += copies * size
    memory = WeightMemory(
        values=storage_bytes(parameters),
        gradients=storage_bytes(p.grad for p in parameters if p.grad is not None),
        optimizer=storage_bytes(states),
        average=0 if average is None else storage_bytes(average.parameters()),
        index=storage_bytes(index for part in (model, average) if part is not None for index in _indices(part)),
        dense=dense,
        scheduler=storage_bytes(held),
    )
    sparse_total = sum(int(s.sum()) for s in network.sizes.values())
    sparse_active = sum(network.layer_weights(name) for name in network.layers)
    return NetworkStats(
        density=network.density,
        sparse_density=sparse_active / sparse_total if sparse_total else 1.0,
        parameters=sum(p.numel() for p in once.values()),
        dense_parameters=sum(grow.get(i, p.numel()) for i, p in once.items()),
        memory=memory,
    )


def _indices(model: nn.Module) -> Iterator[Tensor]:
    """What says where the active blocks are."""
    for module in model.modules():
        if isinstance(module, SparseLayer):
            yield from (module.slot_blocks, *module.topologies)
        elif isinstance(module, SpectralNorm):
            yield module.topology


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors; a storage that several of them share counts once.

    >>> storage_bytes([torch.zeros(4)])
    16
    """
    parts = [part for tensor in tensors for part in _strided_parts(tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts}.values())


def _strided_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """What one of torch's sparse layouts is made of: it has no storage of its own."""
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


class FlopCounter:
    """``2 · active weights · output positions`` per image: the operations of one forward pass, at the present masks.

    Every weight counts that :class:`~ddst.sparsity.density.NetworkDensity` counts, sparse and dense; a backward pass
    costs twice as much again (input and weight gradient). One forward pass at construction finds the number of
    positions each is applied at (:func:`~ddst.convert.watch.multiply_adds`).

    Args:
        model: the network.
        sample: an input batch. forward: how to apply the model to it; ``model(sample)`` when None.

    Cost: one forward pass at construction, without gradients, in evaluation mode; then a sum over the layers.

    >>> import ddst
    >>> counter = FlopCounter(ddst.SparseLinear(64, 64, density=0.25), torch.zeros(2, 64))
    >>> counter.forward, counter.dense
    (2048.0, 8192.0)
    """

    def __init__(self, model: nn.Module, sample: Any, forward: Callable[[Any], Any] | None = None) -> None:
        check_module("model", model)
        if forward is not None and not callable(forward):
            raise TypeError(f"forward must be a function or None, got {type(forward).__name__}")
        batch = _batch_size(sample)
        self._network = NetworkDensity(model)
        weights = find_weights(nn.Sequential(model))  # the model may itself be a layer
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            work = multiply_adds(model, lambda: (forward or model)(sample), weights)
        finally:
            for module, training in modes:
                module.training = training
        layers = {id(layer): name for name, layer in self._network.layers.items()}
        self._positions = {
            layers[id(c.module)]: work[c.name] / (batch * c.size) for c in weights if id(c.module) in layers
        }
        self._dense = 2.0 * sum(work.values()) / batch
        self._dense_layers = 2.0 * sum(work[c.name] for c in weights if id(c.module) not in layers) / batch

    @property
    def forward(self) -> float:
        """Operations of one forward pass per image at the present masks."""
        active = sum(self._network.layer_weights(name) * at for name, at in self._positions.items())
        return 2.0 * active + self._dense_layers

    @property
    def dense(self) -> float:
        """Operations of one forward pass per image if every layer were dense."""
        return self._dense


class TrainingFlops:
    """Operations of GAN training, counted iteration by iteration at the masks of the moment, and relative to dense.

    Per iteration of ``n`` discriminator steps: ``G · (n + 3) + D · (3n + 1)`` forward passes, per image. G counts one
    pass per D batch and three (forward, two backward) per G batch, D three per D batch and one per G batch. A run makes
    ``batch · accumulate`` times as many operations, and those of its penalties, which are not counted: consistency
    three forward passes of D per D batch, a gradient penalty six.

    Args:
        generator, discriminator: their counters. d_steps: ``n``, at least 1.

    Source: the count of the published figures for DDST, which takes one of D's two batches.

    >>> import ddst
    >>> g = FlopCounter(ddst.SparseLinear(64, 64, density=0.25), torch.zeros(1, 64))
    >>> d = FlopCounter(nn.Linear(64, 64), torch.zeros(1, 64))
    >>> flops = TrainingFlops(g, d, d_steps=2)
    >>> flops.update()
    >>> flops.relative
    0.6875
    """

    def __init__(self, generator: FlopCounter, discriminator: FlopCounter, d_steps: int = 1) -> None:
        for name, counter in (("generator", generator), ("discriminator", discriminator)):
            check_type(name, counter, FlopCounter, "a FlopCounter")
        check_int("d_steps", d_steps, 1)
        self.generator, self.discriminator, self.d_steps = generator, discriminator, d_steps
        self.counted = 0.0
        self.counted_dense = 0.0

    def iteration(self) -> tuple[float, float]:
        """Operations of one iteration per image at the present masks, and of the dense networks."""
        g, d = self.d_steps + 3, 3 * self.d_steps + 1
        now = g * self.generator.forward + d * self.discriminator.forward
        return now, g * self.generator.dense + d * self.discriminator.dense

    def update(self) -> None:
        """Counts one iteration."""
        now, dense = self.iteration()
        self.counted += now
        self.counted_dense += dense

    @property
    def relative(self) -> float:
        """Counted so far over what dense training would have taken; 1.0 before the first update."""
        return self.counted / self.counted_dense if self.counted_dense else 1.0

    def state_dict(self) -> dict[str, float]:
        """The two sums."""
        return {"counted": self.counted, "counted_dense": self.counted_dense}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores :meth:`state_dict`."""
        check_state_keys(state, ("counted", "counted_dense"))
        self.counted, self.counted_dense = state["counted"], state["counted_dense"]


def _batch_size(sample: Any) -> int:
    first = sample[0] if isinstance(sample, tuple | list) and sample else sample
    if not isinstance(first, Tensor) or first.dim() < 2 or first.shape[0] < 1:
        raise TypeError("sample must be a batch, a tensor of at least two dimensions (or a tuple that starts with one)")
    return first.shape[0]
