"""Dense models to sparse ones: ``sparsify``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import topology as tp
from .._arguments import check_bool, check_generator, check_number, check_one_of
from ..backends import check_backend
from ..distributed import same_masks
from ..nn.data_parallel import let_go
from ..nn.packed.parameter import PackedParameter, attach
from .advice_report import Advice
from .advise import advise
from .attached import see_uses
from .candidates import check_no_layer, check_unsharded
from .distribution import check_density
from .initial_masks import KINDS, initial_masks
from .report import SparsifyReport, layer_report
from .shares import RULES, check_met, make_plan
from .time_budget import DENSITIES, densities_to_measure, plan_within
from .twins import carry_hooks, sparse_twin
from .watch import arguments_of, multiply_adds, run_of
from .weights import find_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Of spectral norms on blocks larger than single weights.
NOISE = 0.05


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

    Modules that compute in their own way (other classes, subclasses and instances with methods of their own) stay where
    they are, and of what class they are: a plain parameter ``weight`` (or ``weight_orig`` of torch's spectral norm) of
    two to four dimensions, after any of size 1, is packed in place, as a child module ``packed_weight``
    (:mod:`ddst.nn.packed`). With ``sample`` the model is run with such parameters packed, and those of other names are,
    too, if convolutions or linear functions get them; what is looked up stays dense; code that takes nothing but a
    tensor is given one (method and memory stay packed), and the report notes which code unpacks a weight. Without,
    such code raises when it first runs.

    Left as they are, with the reason in the report: excluded layers; 3-D convolutions; grouped ones whose groups have
    channels that are no multiples of the block; layers with fewer channels than the block (they would store several
    times their weight); layers whose ERK density reaches 1; weights shared between modules, of embeddings and of
    normalisations; parametrizations of layers other than spectral norm and weight norm, and these over other dimensions
    than torch's default (weight norm also over all).

    Args:
        model: a module that contains the layers.
        density: share of active weights (with "work", of multiply-adds), above 0 and at most 1; not given with
            ``time_budget``.
        block: ``(b_out, b_in)``, or one int for a square block. (The ``block`` of a transposed convolution is
            ``(b_in, b_out)`` afterwards, as its weight has the input channels first.)
        distribution: "erk" (:func:`~ddst.convert.distribution.erk_densities`): small layers stay denser; the density
            is that of all layers of these kinds which are not excluded, those left dense counting as 1. "work"
            (:func:`~ddst.convert.distribution.work_densities`): layers with many output positions are the sparser
            ones, and the density is the share of *multiply-adds*, of all weights that are not excluded, met to within
            one block's work of the coarsest layer; needs ``sample``. "uniform": every swapped layer has the density.
            ``{name: density}``: these layers have theirs, all other swapped layers ``density``; a layer named here is
            swapped even if it has fewer channels than the block.
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
            dense that were not found to be faster sparse; an :class:`~ddst.convert.Advice` that holds this block is
            used instead of measuring. The other layers keep the density they would have had, so with "erk" the density
            over all layers comes out higher than asked for. Weights packed in place are not measured, and are packed.
        sample: what a training step calls the model with, a tensor or a sequence of arguments. The model is run on it
            a few times, undisturbed: what its modules do with their weights decides which are packed in place, and the
            report then shows what is left of its multiply-adds.
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
        Exception: what the model raises on the sample as it is.

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
    check_unsharded(model, "ddst.sparsify")
    advice = only_if_faster if isinstance(only_if_faster, Advice) else None
    measuring = advice is None and (bool(only_if_faster) or time_budget is not None)
    if sample is None and (measuring or distribution == "work"):
        needs = "only_if_faster" if only_if_faster is True else "there is a time_budget"
        needs = needs if measuring else 'distribution="work"'
        raise ValueError(f"sample must be what a training step calls the model with if {needs}, got None")
    weights = find_weights(model, exclude)
    if sample is not None:
        see_uses(model, weights, arguments_of(sample), block)
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
    ranked = {name: c.ranked_weight if mask == "magnitude" else c.weight for name, c in chosen.items()}
    raw = {name: weight.reshape(chosen[name].shape) for name, weight in ranked.items() if weight is not None}
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
        name: sparse_twin(c, masks[name], block, backend, noise, None if reserve is None else reserves.get(name, 1.0))
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
        layer = layers[name]
        if candidate.attribute is not None:
            assert isinstance(layer, PackedParameter)
            attach(candidate.module, candidate.attribute, layer)
            continue
        for parent, attribute in candidate.slots:
            parent._modules[attribute] = layer
        carry_hooks(candidate.module, layer)
    return report
