"""Dense models to sparse ones and back: ``sparsify``, ``densify``, ``dense_state_dict``."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import topology as tp
from .._arguments import check_bool, check_generator, check_module, check_number, check_one_of
from ..backends import check_backend
from ..distributed import same_masks
from ..nn import SparseLayer, sparse_layers
from ..nn.data_parallel import is_sharded, let_go, whole
from ..nn.kinds import SPARSE_KINDS, shell_of
from ..nn.plain import own_attributes
from ..nn.spectral_norm import DENSE_KEYS, SpectralNorm
from ..nn.weight_norm import DENSE_KEYS as WEIGHT_NORM_KEYS
from ..nn.weight_norm import WeightNorm, dense_parts, g_of_kept, torch_hook
from .advice_report import Advice, BlockAdvice
from .advise import advise
from .candidates import Candidate, DenseNorm, DenseWeightNorm, check_no_layer, places, spectral_hook
from .distribution import check_density
from .initial_masks import KINDS, initial_masks
from .report import LayerReport, SparsifyReport
from .shares import RULES, Plan, make_plan, why_dense
from .time_budget import DENSITIES, densities_to_measure, plan_within
from .watch import arguments_of, multiply_adds
from .weights import find_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Of spectral norms on blocks larger than single weights.
NOISE = 0.05

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def sparsify(
    model: nn.Module,
    density: float | None = None,
    *,
    block: tuple[int, int] | int = (16, 16),
    distribution: str | Mapping[str, float] = "erk",
    exclude: Iterable[str | nn.Module | type] = (),
    backend: str = "auto",
    generator: torch.Generator | None = None,
    mask: str = "random",
    spectral_norm_noise: float | None = None,
    reserve: float | None = None,
    only_if_faster: bool | Advice = False,
    sample: Tensor | Sequence[Any] | None = None,
    time_budget: float | None = None,
    process_group: ProcessGroup | None = None,
) -> SparsifyReport:
    """``Σ active / Σ weights = density``: swaps linear layers and convolutions for block-sparse ones in place.

    These are ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d``, ``nn.ConvTranspose1d``, ``nn.ConvTranspose2d``, and
    subclasses of them that add an ``__init__`` only.

    The density is met to within one block (unless ``only_if_faster`` leaves layers dense). Each new layer keeps device,
    dtype, training mode, ``requires_grad``, hooks, attributes that the instance was given, spectral norm and weight
    norm (both kinds of each) and the weight's values at the active blocks; its bias is the same Parameter object. Its
    weight is a new Parameter, ``values``, so **create the optimizer afterwards**. A module used in several places is
    swapped once and stays shared. References held outside the module tree (a plain list) keep the old layer.

    Left as they are, with the reason in the report: excluded layers; 3-D convolutions; grouped ones whose groups have
    channels that are no multiples of the block; subclasses and instances with methods of their own; layers with fewer
    channels than the block (they would store several times their weight); layers whose ERK density reaches 1; weights
    shared between modules; parametrizations other than spectral norm and weight norm, and these over other dimensions
    than torch's default (weight norm also over all).

    Args:
        model: a module that contains the layers.
        density: share of active weights (with "work", of multiply-adds), above 0 and at most 1; not given with
            ``time_budget``.
        block: ``(b_out, b_in)``, or one int for a square block. (The ``block`` of a transposed convolution is
            ``(b_in, b_out)`` afterwards, as its weight has the input channels first.)
        distribution: "erk" (:func:`~ddst.convert.distribution.erk_densities`): small layers stay denser; the density
            is that of all layers of these kinds which are not excluded, those left dense counting as 1. "work"
            (:func:`~ddst.convert.distribution.work_densities`): spread likewise, but the density is the share of
            *multiply-adds*, of all weights that are not excluded, met to within one block's work of the coarsest
            layer; needs ``sample``. "uniform": every swapped layer has the density. ``{name: density}``: these layers
            have theirs, all other swapped layers ``density``; a layer named here is swapped even if it has fewer
            channels than the block.
        exclude: names, modules or classes to leave alone, with everything inside them.
        backend: of the new layers: "auto", "cpu", "triton", "cuda" or "reference".
        generator: of random masks; torch's default generator by default.
        mask: "random" blocks (every block row and column covered where the count allows) or those of largest
            "magnitude" (L2 norm; under weight norm of ``g · v / ‖v‖``).
        spectral_norm_noise: ``noise`` of the spectral norms (:class:`~ddst.nn.spectral_norm.SpectralNorm`). None: 0 for
            1×1 blocks (torch's spectral norm of the masked weight, as in the paper), else 0.05.
        reserve: a density to come, for which slots are set aside in every layer as the distribution shares it out, so
            that no change of the masks up to there makes new tensors; they are part of ``values`` from the start (zero,
            as their gradients and optimizer state). Layers with room are grown first; where none has any, one is
            enlarged. None: none are set aside.
        only_if_faster: True measures every layer here (:func:`ddst.advise`, which needs ``sample``) and leaves those
            dense that were not found to be faster sparse; an :class:`~ddst.Advice` that holds this block is
            used instead of measuring. The other layers keep the density they would have had, so with "erk" the density
            over all layers comes out higher than asked for.
        sample: what a training step calls the model with, a tensor or a sequence of arguments. The model is run on it
            once more, undisturbed, and the report then shows what is left of its multiply-adds.
        time_budget: in place of ``density``: the share of the dense model's training step that may be left, above 0 and
            at most 1. Every layer is measured here (:func:`ddst.advise`; or ``only_if_faster`` is an Advice that says
            it), and of the distribution's densities the largest is taken whose step fits, layers that are not faster
            sparse staying dense (:func:`~ddst.convert.time_budget.plan_within`). Needs ``sample``, or an Advice.
        process_group: of torch.distributed: where there are several ranks, each must call this, and all get the masks
            of rank 0 of this group (None: the default group). Values stay each rank's own: DistributedDataParallel or
            :func:`ddst.synchronize` makes them equal.

    Returns:
        A report that prints as a table.

    Raises:
        ValueError: an argument out of range, an unknown name, a model that is itself a layer or has none to swap, or a
            density or time that cannot be met, with the smallest that can. Nothing has been changed then.
        TypeError: an argument of another type.

    >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 1))
    >>> print(sparsify(model, 0.25))
    layer  kind    weight     density  blocks
    -------------------------------------------------------------------------------------------------
    0      Conv2d  64x3x3x3    1.0000       -  left as it is: 3 to 64 channels, fewer than a block of
                                               16x16
    2      Conv2d  64x64x3x3   0.1319  19/144
    3      Conv2d  64x64x1x1   1.0000       -  left as it is: its ERK density is 1
    1 of 3 layers sparse; density 0.2504, of all weights 0.2504
    """
    check_no_layer(model)
    if (density is None) == (time_budget is None):
        given = "neither" if density is None else f"density={density!r} and time_budget={time_budget!r}"
        raise TypeError(f"density must be a number, or None with a time_budget in its place, got {given}")
    if density is not None:
        check_density(density)
    if time_budget is not None:
        check_density(time_budget, "time_budget")
    if reserve is not None:
        check_density(reserve, "reserve")
    if spectral_norm_noise is not None:
        check_number("spectral_norm_noise", spectral_norm_noise, 0)
    block = tp.check_block(block)
    check_backend(backend)
    check_one_of("mask", mask, KINDS)
    check_generator("generator", generator)
    if not isinstance(only_if_faster, Advice):
        check_bool("only_if_faster", only_if_faster)
    _check_whole(model, "ddst.sparsify")
    advice = only_if_faster if isinstance(only_if_faster, Advice) else None
    measuring = advice is None and (bool(only_if_faster) or time_budget is not None)
    if sample is None and (measuring or distribution == "work"):
        needs = "only_if_faster" if only_if_faster is True else "there is a time_budget"
        needs = needs if measuring else 'distribution="work"'
        raise ValueError(f"sample must be what a training step calls the model with if {needs}, got None")
    weights = find_weights(model, exclude)
    work = None if sample is None else multiply_adds(model, arguments_of(sample), weights)
    if measuring:
        assert sample is not None
        settings: dict[str, Any] = {"distribution": densities_to_measure(weights, block, distribution)}
        if density is None:
            settings["densities"] = DENSITIES
        else:
            settings["distribution"] = make_plan(weights, density, block, distribution, work).densities
        # Excluded by module, as an iterable of names may have been used up.
        left = [c.module for c in weights if c.slots and c.name not in settings["distribution"]]
        advice = advise(
            model, sample, density=density or 0.1, blocks=[block], exclude=left, backend=backend, **settings
        )
    measured = None if advice is None else advice.of(block)
    if time_budget is None:
        assert density is not None
        plan = make_plan(weights, density, block, distribution, work, measured)
    else:
        assert measured is not None
        plan = plan_within(weights, time_budget, block, distribution, work, measured)
    chosen = plan.chosen
    ranked = {name: c.ranked_weight if mask == "magnitude" else c.weight for name, c in chosen.items()}
    raw = {name: weight for name, weight in ranked.items() if weight is not None}
    densities = None if density is None else plan.densities
    transposed, groups = {n for n, c in chosen.items() if c.transposed}, {n: c.groups for n, c in chosen.items()}
    drafts = initial_masks(
        raw, plan.counts, densities, block, mask, generator, transposed=transposed, groups=groups, cost=plan.cost
    )
    masks = same_masks(drafts, process_group)
    noise = spectral_norm_noise
    if noise is None:
        noise = 0.0 if block == (1, 1) else NOISE
    reserves = {} if reserve is None else make_plan(weights, reserve, block, distribution, work).densities
    layers = {
        name: _sparse_twin(c, masks[name], block, backend, noise, None if reserve is None else reserves.get(name, 1.0))
        for name, c in chosen.items()
    }
    report = SparsifyReport(
        tuple(_report(c, layers.get(c.name), work, measured) for c in plan.candidates),
        None if measured is None else measured.model_seconds,
    )
    if density is not None:
        _check_met(report, plan, density if distribution in RULES and not plan.slower else None, block)

    let_go([c.module for c in chosen.values()], "layers are swapped for sparse ones")
    for name, candidate in chosen.items():
        for parent, attribute in candidate.slots:
            parent._modules[attribute] = layers[name]
        _carry_hooks(candidate.module, layers[name])
    return report


def _check_whole(model: nn.Module, call: str) -> None:
    if is_sharded(*model.parameters()):
        raise ValueError(
            f"model has parameters that are DTensors, of which each rank holds a part (fully_shard): call {call} "
            "first, then fully_shard"
        )


def _check_met(report: SparsifyReport, plan: Plan, density: float | None, block: tuple[int, int]) -> None:
    """Raises where the density, or else the sum of the layers' own, is missed by more than a block."""
    cost = plan.cost
    counted = [layer for layer in report.layers if layer.counted]
    reached = sum(layer.active * cost[layer.name] for layer in counted)
    total = sum(layer.size * cost[layer.name] for layer in counted)
    wanted = sum(plan.densities.get(layer.name, 1.0) * layer.size * cost[layer.name] for layer in counted)
    if density is not None:
        wanted = density * total
    coarsest = max((cost[name] for name in plan.densities), default=1.0)
    if abs(reached - wanted) > coarsest * block[0] * block[1]:
        smallest = math.ceil(reached / total * 1e4) / 1e4
        dense = why_dense((c for c in plan.candidates if c.counted), plan.cost)
        raise ValueError(
            f"density {wanted / total:.6g} cannot be met with blocks of {block[0]}x{block[1]}: "
            "the smallest that can is "
            f"{smallest} (layers left dense, and one block in each other); exclude layers or use smaller blocks"
            + (f". Left dense: {dense}" if dense else "")
        )


def _report(
    candidate: Candidate, layer: SparseLayer | None, work: Mapping[str, float] | None, measured: BlockAdvice | None
) -> LayerReport:
    c = candidate
    sparse = c.module if isinstance(c.module, SparseLayer) else layer
    times = {one.name: one for one in measured.layers} if measured is not None else {}
    dense_seconds = seconds = None
    if c.name in times:
        timed = times[c.name]
        dense_seconds = timed.calls * timed.dense_seconds
        seconds = dense_seconds - (0.0 if layer is None else timed.saved(layer.nnz / layer.num_blocks))
    return LayerReport(
        c.name,
        c.kind,
        c.shape,
        c.size if sparse is None else sparse.active_weights,
        c.size,
        0 if sparse is None else sparse.nnz,
        0 if sparse is None else sparse.num_blocks,
        0 if sparse is None else sparse.slots,
        c.reason,
        c.counted,
        None if work is None else work[c.name],
        dense_seconds,
        seconds,
    )


def _sparse_twin(
    candidate: Candidate, mask: Tensor, block: tuple[int, int], backend: str, noise: float, reserve: float | None
) -> SparseLayer:
    module, weight, plain = candidate.module, candidate.weight, candidate.plain
    assert isinstance(weight, nn.Parameter) and plain is not None
    # A shell around the raw weight: the layer's own attribute may be a product of its spectral norm.
    shell, kind = shell_of(module, plain, weight), SPARSE_KINDS[plain]
    layer: SparseLayer = kind.from_dense(shell, block_mask=mask, block=candidate.own_block(block), reserve=reserve)
    # The same object, as references to it elsewhere expect.
    layer.bias = module.bias  # type: ignore[assignment]
    layer.backend = backend
    attributes = own_attributes(module, plain)
    for name, value in attributes.items():
        setattr(layer, name, value)
    layer.carried = tuple(attributes)
    if isinstance(candidate.norm, DenseWeightNorm):
        layer.weight_norm = _sparse_weight_norm(layer, weight.detach(), candidate.norm)
    elif candidate.norm is not None:
        layer.spectral_norm = _sparse_norm(layer, candidate.norm, noise)
    return layer


def _sparse_weight_norm(layer: SparseLayer, weight: Tensor, dense: DenseWeightNorm) -> WeightNorm:
    norm = WeightNorm(layer.weight_shape, dense.dim, dense.style)
    g = g_of_kept(dense.g.detach(), weight, layer.dense_weight().detach(), dense.dim)
    norm.g = nn.Parameter(g, requires_grad=dense.g.requires_grad)
    return norm.train(layer.training)


def _sparse_norm(layer: SparseLayer, dense: DenseNorm, noise: float) -> SpectralNorm:
    norm = SpectralNorm(
        layer.weight_shape,
        layer.block,
        dense.n_power_iterations,
        dense.eps,
        noise,
        dense.style,
        device=layer.values.device,
        dtype=layer.values.dtype,
        dim=dense.dim,
    )
    norm.u.copy_(dense.u)
    norm.v.copy_(dense.v)
    norm.train(layer.training)
    norm.place(layer)
    norm.after_topology_change(layer)
    return norm


def _carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hands the user's hooks over, in the same dictionaries, so that the handles which remove them keep working."""
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
    for own in (spectral_hook(new), torch_hook(new)):
        for key in [key for key, hook in new._forward_pre_hooks.items() if hook is own and own is not None]:
            del new._forward_pre_hooks[key]
    if isinstance(new, SparseLayer) and new.weight_norm is not None:
        new.weight_norm.hook_up(new)


def densify(model: nn.Module) -> nn.Module:
    """Puts the dense layer with the same weight in the place of every sparse one: the inverse of :func:`sparsify`.

    Outputs stay equal to rounding (with spectral norm: in eval mode, or without noise). Device, dtype, training mode,
    ``requires_grad``, hooks, attributes and the kind of spectral norm with its vectors, or of weight norm with ``g``,
    are kept; biases are the same objects, weights new Parameters. The layers are torch's own, also where a subclass
    with an ``__init__`` was swapped. (A row of zeros under weight norm, which torch would divide by its length 0, gets
    a direction with ``g = 0``.)

    Args:
        model: a module that contains sparse layers; changed in place.

    Returns:
        The model.

    Raises:
        ValueError: the model is itself a sparse layer.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    >>> report = sparsify(model, 0.5)
    >>> x = torch.randn(4, 64)
    >>> y = model(x)
    >>> torch.allclose(densify(model)(x), y, atol=1e-5), type(model[0]).__name__
    (True, 'Linear')
    """
    if isinstance(check_module("model", model), SparseLayer):
        raise ValueError(
            f"model is itself a {type(model).__name__}, which cannot be swapped in place: use its to_dense()"
        )
    _check_whole(model, "ddst.densify")
    let_go(sparse_layers(model).values(), "layers are swapped for dense ones")
    twins: dict[int, nn.Module] = {}
    for _, parent, attribute, module in list(places(model)):
        if isinstance(module, SparseLayer):
            if id(module) not in twins:
                twins[id(module)] = _dense_twin(module)
            parent._modules[attribute] = twins[id(module)]
    return model


def _dense_twin(layer: SparseLayer) -> nn.Module:
    with_class: Any = layer  # which has _plain_dense
    dense: nn.Module = with_class._plain_dense()
    dense.bias = layer.bias  # type: ignore[assignment]
    for name in layer.carried:
        if name in vars(layer):
            setattr(dense, name, getattr(layer, name))
    _carry_hooks(layer, dense)
    if layer.norm is not None:
        layer.norm.attach_to_dense(dense)
    return dense


def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """``densify(model).state_dict()`` without changing the model: it loads strictly into the dense model.

    Weights are unpacked (zeros at inactive blocks) and named ``weight``, or as torch's spectral norm names its raw
    weight and vectors, and its weight norm g and v. The other direction needs no function:
    ``sparse_model.load_state_dict(dense_state)`` keeps the weights at active blocks.

    Args:
        model: a module with sparse layers, or a sparse layer.

    Returns:
        Keys in the dense model's order. Entries that are not a sparse layer's weight share memory with the model.

    >>> dense = nn.Sequential(nn.Linear(32, 32))
    >>> model = nn.Sequential(nn.Linear(32, 32))
    >>> report = sparsify(model, 0.5)
    >>> dense.load_state_dict(dense_state_dict(model))
    <All keys matched successfully>
    """
    state = check_module("model", model).state_dict()
    renamed: dict[str, str | None] = {}
    weights: dict[str, Tensor] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, SparseLayer):
            continue
        prefix = f"{name}." if name else ""
        values, slot_blocks = whole(state[prefix + "values"]), state[prefix + "slot_blocks"]
        weight = tp.unpack_slots(values, slot_blocks, layer.weight_shape).contiguous()
        if layer.weight_norm is not None:
            # Here too both come after the bias; g first.
            keys = [prefix + key for key in WEIGHT_NORM_KEYS[layer.weight_norm.style]]
            packed = [prefix + key for key in ("slot_blocks", "weight_norm.g")]
            renamed |= {prefix + "values": None, **dict(zip(packed, keys, strict=True))}
            parts = dense_parts(whole(state[packed[1]]), weight, layer.weight_norm.dim)
            weights |= dict(zip(packed, parts, strict=True))
        elif layer.spectral_norm is None:
            renamed |= {prefix + "values": prefix + "weight", prefix + "slot_blocks": None}
            weights[prefix + "values"] = weight
        else:
            # The raw weight of a dense layer with spectral norm comes after its bias.
            keys = [prefix + key for key in DENSE_KEYS[layer.spectral_norm.style]]
            packed = [prefix + key for key in ("slot_blocks", "spectral_norm.u", "spectral_norm.v")]
            renamed |= {prefix + "values": None, **dict(zip(packed, keys, strict=True))}
            weights[prefix + "slot_blocks"] = weight
    dense: OrderedDict[str, Any] = OrderedDict()
    for key, value in state.items():
        new = renamed.get(key, key)
        if new is not None:
            dense[new] = weights.get(key, value)
    return dense
