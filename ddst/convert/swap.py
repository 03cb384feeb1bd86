"""Dense models to sparse ones and back: ``sparsify``, ``densify``, ``dense_state_dict``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import topology as tp
from .._arguments import check_bool, check_generator, check_module, check_number, check_one_of
from ..backends import check_backend
from ..distributed import same_masks
from ..nn import SparseConv2d, SparseLayer, SparseLinear, sparse_layers
from ..nn.data_parallel import is_sharded, let_go, whole
from ..nn.spectral_norm import DENSE_KEYS, SpectralNorm
from .advice_report import Advice
from .advise import advise
from .candidates import Candidate, check_no_layer, places, spectral_hook
from .distribution import check_density
from .initial_masks import KINDS, initial_masks
from .report import SparsifyReport, layer_report
from .shares import RULES, check_met, make_plan
from .time_budget import DENSITIES, densities_to_measure, plan_within
from .watch import multiply_adds, run_of
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
    """``Σ active / Σ weights = density``: swaps ``nn.Conv2d`` and ``nn.Linear`` for block-sparse layers in place.

    The density is met to within one block (unless ``only_if_faster`` leaves layers dense). Each new layer keeps device,
    dtype, training mode, ``requires_grad``, hooks, spectral norm (both kinds) and the weight's values at the active
    blocks; its bias is the same Parameter object. Its weight is a new Parameter, ``values``, so **create the optimizer
    afterwards**. A module used in several places is swapped once and stays shared. References held outside the module
    tree (a plain list) keep the old layer.

    Left as they are, with the reason in the report: excluded layers; transposed, 1-D, 3-D and grouped convolutions;
    subclasses; layers with fewer channels than the block (they would store several times their weight); layers whose
    ERK density reaches 1; weights shared between modules; parametrizations other than spectral norm.

    Args:
        model: a module that contains the layers.
        density: share of active weights (with "work", of multiply-adds), above 0 and at most 1; not given with
            ``time_budget``.
        block: ``(b_out, b_in)``, or one int for a square block.
        distribution: "erk" (:func:`~ddst.convert.distribution.erk_densities`): small layers stay denser; the density
            is that of all Conv2d and Linear layers which are not excluded, those left dense counting as 1. "work"
            (:func:`~ddst.convert.distribution.work_densities`): spread likewise, but the density is the share of
            *multiply-adds*, of all weights that are not excluded, met to within one block's work of the coarsest
            layer; needs ``sample``. "uniform": every swapped layer has the density. ``{name: density}``: these layers
            have theirs, all other swapped layers ``density``; a layer named here is swapped even if it has fewer
            channels than the block.
        exclude: names, modules or classes to leave alone, with everything inside them.
        backend: of the new layers: "auto", "cpu", "triton", "cuda" or "reference".
        generator: of random masks; torch's default generator by default.
        mask: "random" blocks (every block row and column covered where the count allows) or those of largest
            "magnitude" (L2 norm).
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
            sparse staying dense (:func:`~ddst.convert.time_budget.plan_within`). Needs ``sample``, or an Advice: on
            several ranks all need the one of the same rank.
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
    work = None if sample is None else multiply_adds(model, run_of(model, sample), weights)
    if measuring:
        assert sample is not None
        settings: dict[str, Any] = {"blocks": [block], "backend": backend}
        if density is None:
            settings |= {"distribution": densities_to_measure(weights, block, distribution), "densities": DENSITIES}
        else:
            shares = make_plan(weights, density, block, distribution, work).densities
            settings |= {"distribution": shares, "density": density}
        # Excluded by module, as an iterable of names may have been used up.
        left = [c.module for c in weights if c.slots and c.name not in settings["distribution"]]
        advice = advise(model, sample, exclude=left, **settings)
    measured = None if advice is None else advice.of(block)
    if time_budget is None:
        assert density is not None
        plan = make_plan(weights, density, block, distribution, work, measured)
    else:
        assert measured is not None
        plan = plan_within(weights, time_budget, block, distribution, work, measured)
    chosen = plan.chosen
    raw = {name: c.weight for name, c in chosen.items() if c.weight is not None}
    densities = None if density is None else plan.densities
    masks = same_masks(initial_masks(raw, plan.counts, densities, block, mask, generator, plan.cost), process_group)
    noise = spectral_norm_noise
    if noise is None:
        noise = 0.0 if block == (1, 1) else NOISE
    reserves = {} if reserve is None else make_plan(weights, reserve, block, distribution, work).densities
    layers = {
        name: _sparse_twin(c, masks[name], block, backend, noise, None if reserve is None else reserves.get(name, 1.0))
        for name, c in chosen.items()
    }
    report = SparsifyReport(
        tuple(layer_report(c, layers.get(c.name), work, measured) for c in plan.candidates),
        None if measured is None else measured.model_seconds,
    )
    if density is not None:
        check_met(report, plan, density if distribution in RULES and not plan.slower else None, block)

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


def _sparse_twin(
    candidate: Candidate, mask: Tensor, block: tuple[int, int], backend: str, noise: float, reserve: float | None
) -> SparseLayer:
    module, weight = candidate.module, candidate.weight
    assert weight is not None
    # A shell around the raw weight: the layer's own attribute may be a product of its spectral norm.
    shell: nn.Conv2d | nn.Linear
    layer: SparseLayer
    if isinstance(module, nn.Linear):
        shell = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    else:
        assert isinstance(module, nn.Conv2d)
        shell = nn.Conv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            bias=False,
            padding_mode=module.padding_mode,
            device="meta",
        )
    assert isinstance(weight, nn.Parameter)
    shell.weight = weight
    shell.train(module.training)
    if isinstance(shell, nn.Linear):
        layer = SparseLinear.from_dense(shell, block_mask=mask, block=block, reserve=reserve)
    else:
        layer = SparseConv2d.from_dense(shell, block_mask=mask, block=block, reserve=reserve)
    # The same object, as references to it elsewhere expect.
    layer.bias = module.bias  # type: ignore[assignment]
    layer.backend = backend
    if candidate.norm is not None:
        layer.spectral_norm = _sparse_norm(layer, candidate, noise)
    return layer


def _sparse_norm(layer: SparseLayer, candidate: Candidate, noise: float) -> SpectralNorm:
    dense = candidate.norm
    assert dense is not None
    norm = SpectralNorm(
        layer.weight_shape,
        layer.block,
        dense.n_power_iterations,
        dense.eps,
        noise,
        dense.style,
        device=layer.values.device,
        dtype=layer.values.dtype,
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
    own = spectral_hook(new)
    for key in [key for key, hook in new._forward_pre_hooks.items() if hook is own and own is not None]:
        del new._forward_pre_hooks[key]


def densify(model: nn.Module) -> nn.Module:
    """Puts the dense layer with the same weight in the place of every sparse one: the inverse of :func:`sparsify`.

    Outputs stay equal to rounding (with spectral norm: in eval mode, or without noise). Device, dtype, training mode,
    ``requires_grad``, hooks and the kind of spectral norm with its vectors are kept; biases are the same objects,
    weights new Parameters.

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
    with_class: Any = layer  # _plain_dense is that of SparseConv2d or SparseLinear
    dense: nn.Module = with_class._plain_dense()
    dense.bias = layer.bias  # type: ignore[assignment]
    _carry_hooks(layer, dense)
    if layer.spectral_norm is not None:
        layer.spectral_norm.attach_to_dense(dense)
    return dense


def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """``densify(model).state_dict()`` without changing the model: it loads strictly into the dense model.

    Weights are unpacked (zeros at inactive blocks) and named ``weight``, or as torch's spectral norm names its raw
    weight and vectors. The other direction needs no function: ``sparse_model.load_state_dict(dense_state)`` keeps the
    weights at active blocks.

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
        if layer.spectral_norm is None:
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
