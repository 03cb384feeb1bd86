"""Which layers of a model are worth being sparse on this machine: measured, not assumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import topology as tp
from .._arguments import check_int
from ..backends import check_backend
from ..measure import TIGHT, MedianInterval, clock_of, paired
from ..nn import SparseLayer
from ..nn.kinds import SPARSE_KINDS, shell_of
from .advice_report import Advice, BlockAdvice, LayerAdvice, Measured
from .candidates import Candidate, check_no_layer
from .distribution import check_density
from .shares import share_out
from .watch import Seen, arguments_of, multiply_adds, run_of, undisturbed, watch
from .weights import find_weights

DENSITIES = (0.1, 0.3, 1.0)
BLOCKS = ((16, 16), (32, 32))


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
    left out on both sides. The model is run as it is, but keeps its parameters, gradients, buffers, attributes and
    hooks, and torch's random numbers stay as they were.

    A ratio is measured again, up to eight times as often, until its 95 % interval is no wider than a factor of 1.25.
    Where other programs keep the machine so busy that it stays wider, the interval is shown instead; a layer of which
    it does not tell which side is faster is left dense, and what the model gains is stated as "at least".

    Args:
        model: a module on the device it trains on; nothing of it is changed.
        sample: what a training step calls it with: a tensor, or a sequence of arguments.
        density, distribution, exclude, backend: as :func:`ddst.sparsify` would get them; "work" counts with ``sample``.
        blocks: the block sizes to compare, each ``(b_out, b_in)`` or one int.
        densities: to measure at, ascending.
        repeats: pairs of measurements for each layer, block and density, at least six, at first.

    Returns:
        For each layer and block the density from which on sparse wins and the time at the density asked for, and for
        the model its gain and the block to choose; prints as a table.

    Raises:
        ValueError, TypeError: an argument does not fit, or no layer would be sparse.

    Numerics: times spread by some per cent between calls, more on a busy machine; so do decisions that are close.
    Cost: ``layers of different shape × blocks × densities × repeats`` training steps of a layer: seconds to minutes, on
    a busy machine up to eight times as long. Memory: a copy of the layers' weights.

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
    arguments = arguments_of(sample)
    candidates = find_weights(model, exclude)
    work = multiply_adds(model, run_of(model, sample), candidates) if distribution == "work" else None
    shares = _shares(candidates, density, sizes, distribution, work)
    step, seen = watch(model, arguments, candidates)
    known: dict[tuple[Any, ...], tuple[float, MedianInterval]] = {}
    found = []
    for block in shares:
        layers = []
        for candidate in (c for c in candidates if c.name in shares[block] and c.name in seen):
            where = seen[candidate.name]
            points = []
            for d in densities:
                seconds, ratio = _times(candidate, where, block, d, backend, repeats, known)
                points.append(Measured(d, seconds, seconds / ratio.median, ratio.low, ratio.high))
            asked = shares[block][candidate.name]
            layers.append(LayerAdvice(candidate.name, candidate.shape, where.calls, asked, tuple(points)))
        found.append(BlockAdvice(block, tuple(layers), 0.0))
    return Advice(density, _on_one_scale(model, step, candidates, seen, found, repeats))


def _on_one_scale(
    model: nn.Module,
    step: Callable[[], object],
    candidates: list[Candidate],
    seen: Mapping[str, Seen],
    found: list[BlockAdvice],
    repeats: int,
) -> tuple[BlockAdvice, ...]:
    """What was found, with the layers' seconds as they are within the model's step.

    The layers were measured one by one, at moments that may have been busier than those of the model: their share of
    its step is measured in pairs.
    """
    layers = {layer.name: layer for block in found for layer in block.layers}
    if not layers:
        raise ValueError(
            "sample must reach a layer that would be swapped, but running the model with it reached none: weights that "
            "are packed in modules which compute in their own way cannot be measured"
        )
    with undisturbed(model), torch.enable_grad():
        twins = [(_dense(c.module, c), seen[c.name]) for c in candidates if c.name in layers]
        model_seconds, ratio = time_model(step, twins, repeats)
    known = ratio.high <= TIGHT * ratio.low
    share = min(1.0 / (ratio.median if known else ratio.high), 1.0)
    scale = share * model_seconds / sum(layer.calls * layer.dense_seconds for layer in layers.values())

    def scaled(layer: LayerAdvice) -> LayerAdvice:
        points = (p._replace(dense=scale * p.dense, sparse=scale * p.sparse) for p in layer.points)
        return replace(layer, points=tuple(points))

    return tuple(BlockAdvice(b.block, tuple(map(scaled, b.layers)), model_seconds, known) for b in found)


def _listed(name: str, values: Any) -> list[Any]:
    """A list of at least one."""
    if isinstance(values, str | Tensor) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence, got {type(values).__name__}")
    listed = list(values)
    if not listed:
        raise ValueError(f"{name} must hold at least one")
    return listed


def _shares(
    candidates: list[Candidate],
    density: float,
    blocks: list[tuple[int, int]],
    distribution: str | Mapping[str, float],
    work: Mapping[str, float] | None,
) -> dict[tuple[int, int], dict[str, float]]:
    """Block -> layer -> the density that ``sparsify`` would give it; without blocks that leave every layer dense."""
    found, errors = {}, []
    for block in blocks:
        try:
            densities = share_out([replace(c) for c in candidates], density, block, distribution, work)
        except ValueError as error:  # with "uniform", a block too large for every layer
            errors.append(error)
        else:
            if densities:
                found[block] = densities
    if not found:
        raise errors[0] if errors else ValueError(f"no layer would be sparse at density {density} with these blocks")
    return found


def _times(
    candidate: Candidate,
    seen: Seen,
    block: tuple[int, int],
    density: float,
    backend: str,
    repeats: int,
    known: dict[tuple[Any, ...], tuple[float, MedianInterval]],
) -> tuple[float, MedianInterval]:
    """Dense seconds of a layer's step, and dense over sparse time; layers that are alike are measured once."""
    module = candidate.module
    names = ("stride", "padding", "output_padding", "dilation", "groups", "padding_mode")
    settings = [getattr(module, name, None) for name in names]
    key = (candidate.plain, candidate.shape, *map(str, settings), module.bias is None, seen.key, block, density)
    if key not in known:
        with torch.random.fork_rng():
            dense = _dense(module, candidate)
            own, plain = candidate.own_block(block), candidate.plain
            count = tp.block_count(density, math.prod(tp.mask_shape(candidate.shape, own)))
            mask = tp.random_mask(candidate.shape, own, count, groups=candidate.groups)
            assert plain is not None
            sparse: SparseLayer = SPARSE_KINDS[plain].from_dense(dense, block_mask=mask, block=own)
            sparse.backend = backend
            known[key] = time_pair(dense, sparse, seen, repeats)
    return known[key]


def _dense(module: nn.Module, candidate: Candidate) -> nn.Module:
    """A plain layer with a copy of the raw weight, in its memory format."""
    weight, bias, plain = candidate.weight, module.bias, candidate.plain
    assert weight is not None and plain is not None
    copied = None if bias is None else nn.Parameter(bias.detach().clone())  # type: ignore[operator]
    return shell_of(module, plain, nn.Parameter(weight.detach().clone()), copied)


def layer_step(layer: nn.Module, seen: Seen) -> Callable[[], object]:
    """A training step of a layer on the input it got: forward, gradients of its parameters and of that input."""
    x = seen.input.detach().requires_grad_(seen.input_grad)
    wanted = [*layer.parameters(), *([x] if seen.input_grad else [])]
    gradient = torch.ones_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), wanted, gradient)


def time_pair(dense: nn.Module, sparse: nn.Module, seen: Seen, repeats: int) -> tuple[float, MedianInterval]:
    """Dense seconds of a training step, and dense over sparse time, measured in turn."""
    with torch.enable_grad():
        clock = clock_of(seen.input.device.type)
        return paired(layer_step(dense, seen), layer_step(sparse, seen), repeats, clock)


def time_model(
    step: Callable[[], object], layers: Sequence[tuple[nn.Module, Seen]], repeats: int
) -> tuple[float, MedianInterval]:
    """Seconds of the model's step, and that over the time of these layers alone, called as often as the model does."""
    steps = [layer_step(layer, seen) for layer, seen in layers for _ in range(seen.calls)]

    def alone() -> None:
        for one in steps:
            one()

    return paired(step, alone, repeats, clock_of(layers[0][1].input.device.type if layers else "cpu"))
