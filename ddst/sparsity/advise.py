"""Which layers of a model are worth being sparse on this machine: measured, not assumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import topology as tp
from .._arguments import check_int
from ..backends import check_backend
from ..measure import Spread, clock_of, interleaved
from ..nn import SparseConv2d, SparseLayer, SparseLinear
from .advice import Advice, BlockAdvice, LayerAdvice
from .candidates import Candidate, check_no_layer, find_candidates
from .distribution import check_density
from .shares import share_out

DENSITIES = (0.1, 0.3, 1.0)
BLOCKS = ((16, 16), (32, 32))


@dataclass(frozen=True)
class Seen:
    """What a layer was called with when the model ran: its first input, how often, whether that needs a gradient."""

    input: Tensor
    calls: int
    input_grad: bool

    @property
    def key(self) -> tuple[Any, ...]:
        x = self.input
        return (tuple(x.shape), x.stride(), x.dtype, str(x.device), self.input_grad)


def advise(
    model: nn.Module,
    sample: Tensor | Sequence[Any],
    *,
    density: float = 0.1,
    blocks: Sequence[tuple[int, int] | int] = BLOCKS,
    densities: Sequence[float] = DENSITIES,
    distribution: str | Mapping[str, float] = "erk",
    exclude: Iterable[str | nn.Module | type] = (),
    backend: str = "auto",
    repeats: int = 7,
) -> Advice:
    """``gain = T / (T − Σ (dense − sparse))``: measures each layer dense and sparse, here, at the sizes the model uses.

    A layer's time is that of its training step: forward, and the gradients of weight, bias and (unless the layer is
    the first) input. Both sides run in turn on the input that the layer gets in the model, in its memory format, with
    the threads torch has now. Between the measured densities sparse time is interpolated linearly. Spectral norm is
    left out on both sides. The model is run as it is, but keeps its parameters, gradients, buffers and hooks, and
    torch's random numbers stay as they were.

    Args:
        model: a module on the device it trains on; nothing of it is changed.
        sample: what a training step calls it with: a tensor, or a sequence of arguments.
        density, distribution, exclude, backend: as :func:`ddst.sparsify` would get them.
        blocks: the block sizes to compare, each ``(b_out, b_in)`` or one int.
        densities: to measure at, ascending.
        repeats: pairs of measurements for each layer, block and density.

    Returns:
        For each layer and block the density from which on sparse wins and the time at the density asked for, and for
        the model its gain and the block to choose; prints as a table.

    Raises:
        ValueError, TypeError: an argument does not fit, or no layer would be sparse.

    Numerics: times spread by some per cent between calls, more on a busy machine; so do decisions that are close.
    Cost: ``layers of different shape × blocks × densities × repeats`` training steps of a layer: seconds to minutes.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> found = advise(model, torch.randn(4, 64), density=0.5, blocks=[16], densities=(0.5, 1.0), repeats=1)
    >>> [layer.name for layer in found.blocks[0].layers]
    ['0', '2']
    """
    check_no_layer(model)
    check_backend(backend)
    check_density(density)
    densities = sorted({check_density(d, "densities") for d in _listed("densities", densities)})
    check_int("repeats", repeats, 1)
    sizes = [tp.check_block(block, "blocks") for block in _listed("blocks", blocks)]
    if not isinstance(sample, Tensor | tuple | list):
        raise TypeError(f"sample must be a tensor or a sequence of arguments, got {type(sample).__name__}")
    arguments = (sample,) if isinstance(sample, Tensor) else tuple(sample)
    exclude = list(exclude) if isinstance(exclude, Iterable) and not isinstance(exclude, str) else exclude
    shares = _shares(model, density, sizes, distribution, exclude)
    model_seconds, seen = watch(model, arguments, find_candidates(model, exclude), repeats)
    known: dict[tuple[Any, ...], tuple[float, float]] = {}
    found = []
    for block in shares:
        layers = []
        for candidate in find_candidates(model, exclude):
            if candidate.name in shares[block] and candidate.name in seen:
                where = seen[candidate.name]
                times = [_times(candidate, where, block, d, backend, repeats, known) for d in densities]
                asked = shares[block][candidate.name]
                points = tuple(zip(densities, *zip(*times, strict=True), strict=True))
                layers.append(LayerAdvice(candidate.name, candidate.shape, where.calls, asked, points))
        found.append(BlockAdvice(block, tuple(layers), model_seconds))
    return Advice(density, tuple(found))


def _listed(name: str, values: Any) -> list[Any]:
    """A list of at least one."""
    if isinstance(values, str | Tensor) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence, got {type(values).__name__}")
    listed = list(values)
    if not listed:
        raise ValueError(f"{name} must hold at least one")
    return listed


def _shares(
    model: nn.Module,
    density: float,
    blocks: list[tuple[int, int]],
    distribution: str | Mapping[str, float],
    exclude: Iterable[str | nn.Module | type],
) -> dict[tuple[int, int], dict[str, float]]:
    """Block -> layer -> the density that ``sparsify`` would give it; without blocks that leave every layer dense."""
    found, errors = {}, []
    for block in blocks:
        try:
            densities = share_out(find_candidates(model, exclude), density, block, distribution)
        except ValueError as error:  # with "uniform", a block too large for every layer
            errors.append(error)
        else:
            if densities:
                found[block] = densities
    if not found:
        raise errors[0] if errors else ValueError(f"no layer would be sparse at density {density} with these blocks")
    return found


def watch(
    model: nn.Module, arguments: tuple[Any, ...], candidates: list[Candidate], repeats: int
) -> tuple[float, dict[str, Seen]]:
    """Seconds of the model's training step (forward and all gradients), and what each candidate was called with."""
    seen: dict[str, Seen] = {}
    handles = []
    for candidate in candidates:

        def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], name: str = candidate.name) -> None:
            input, before = inputs[0] if inputs else named.get("input"), seen.get(name)
            if not isinstance(input, Tensor):  # the layer itself says what is wrong with it
                return
            first = before.input if before else input.detach()
            needed = input.requires_grad or (before is not None and before.input_grad)
            seen[name] = Seen(first, (before.calls if before else 0) + 1, needed)

        handles.append(candidate.module.register_forward_pre_hook(note, with_kwargs=True))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        outputs = [t for t in tensors_in(model(*arguments)) if t.requires_grad]
        if outputs and parameters:
            torch.autograd.grad(outputs, parameters, [torch.ones_like(t) for t in outputs], allow_unused=True)

    with undisturbed(model), torch.enable_grad():
        try:
            step()
        finally:
            for handle in handles:
                handle.remove()
        device = next((p.device.type for p in parameters), "cpu")
        seconds = interleaved([step], repeats, clock_of(device))[0]
    return Spread.of(seconds).median, seen


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts back the buffers that running a model changes (batch norm, spectral norm), and the random numbers."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, copy in before:
                    buffer.copy_(copy)


def tensors_in(value: Any) -> list[Tensor]:
    """The floating-point tensors of a nested output."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def _times(
    candidate: Candidate,
    seen: Seen,
    block: tuple[int, int],
    density: float,
    backend: str,
    repeats: int,
    known: dict[tuple[Any, ...], tuple[float, float]],
) -> tuple[float, float]:
    """``(dense, sparse)`` seconds of a layer's step; layers that are alike are measured once."""
    module = candidate.module
    settings = [getattr(module, name, None) for name in ("stride", "padding", "dilation", "padding_mode")]
    key = (candidate.shape, *map(str, settings), module.bias is None, seen.key, block, density)
    if key not in known:
        with torch.random.fork_rng():
            dense = _dense(module, candidate)
            mask = tp.random_mask(candidate.shape, block, max(1, round(density * _num_blocks(candidate.shape, block))))
            kind = SparseLinear if isinstance(module, nn.Linear) else SparseConv2d
            sparse: SparseLayer = kind.from_dense(dense, block_mask=mask, block=block)  # type: ignore[arg-type]
            sparse.backend = backend
            known[key] = time_pair(dense, sparse, seen, repeats)
    return known[key]


def _num_blocks(shape: Sequence[int], block: tuple[int, int]) -> int:
    total = 1
    for size in tp.mask_shape(shape, block):
        total *= size
    return total


def _dense(module: nn.Module, candidate: Candidate) -> nn.Module:
    """A plain layer with a copy of the raw weight, in its memory format."""
    weight = candidate.weight
    assert weight is not None
    has_bias = module.bias is not None
    plain: nn.Module
    if isinstance(module, nn.Linear):
        plain = nn.Linear(module.in_features, module.out_features, has_bias, device=weight.device, dtype=weight.dtype)
    else:
        assert isinstance(module, nn.Conv2d)
        size: Any = module.kernel_size
        plain = nn.Conv2d(module.in_channels, module.out_channels, size, bias=has_bias, device=weight.device)
        for name in ("stride", "padding", "dilation", "padding_mode", "_reversed_padding_repeated_twice"):
            setattr(plain, name, getattr(module, name))
    plain.weight = nn.Parameter(weight.detach().clone())
    if has_bias:
        plain.bias = nn.Parameter(module.bias.detach().clone())  # type: ignore[union-attr]
    return plain.train(module.training)


def time_pair(dense: nn.Module, sparse: nn.Module, seen: Seen, repeats: int) -> tuple[float, float]:
    """``(dense, sparse)`` seconds of a training step, measured in turn: their ratio is the median of paired ratios."""

    def step_of(layer: nn.Module) -> Callable[[], object]:
        x = seen.input.detach().requires_grad_(seen.input_grad)
        wanted = [*layer.parameters(), *([x] if seen.input_grad else [])]
        gradient = torch.ones_like(layer(x))
        return lambda: torch.autograd.grad(layer(x), wanted, gradient)

    with torch.enable_grad():
        samples = interleaved([step_of(dense), step_of(sparse)], repeats, clock_of(seen.input.device.type))
    median = Spread.of(samples[0]).median
    return median, median / Spread.of_ratios(*samples).median
