"""Weights that modules of other people's classes hold as plain parameters: what the modules do with them.

A name says much: "weight". What such a weight is used for, and which parameters of other names reach a convolution or a
linear function, is seen by running the model on a sample while they are packed, all blocks active.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .. import topology as tp
from ..nn.packed.parameter import HoldsPackedParameters, PackedParameter, attach, split_shape
from .candidates import DTYPES, HOOKED, ITS_OWN, OWN_CODE, Candidate, has_hooks
from .watch import check_not_lazy, undisturbed

#: Names of parameters that are weights whatever the module does with them. torch's spectral norm makes the second.
NAMES = ("weight", "weight_orig")

#: torch's modules that compute nothing: what is in them is used by the module around them.
CONTAINERS = (nn.ParameterList, nn.ParameterDict)

OWN = "a parameter of its module, which is no convolution or linear layer"
LOOKED_UP = "looked up, no weight of a product"
UNUSED = "no convolution or linear function gets it"
UNSEEN = f"{OWN}; sample= would show whether it is used as a weight of one"


def let_attach(candidate: Candidate, owners: Mapping[int, list[str]]) -> Candidate:
    """Lets a weight be packed where it is, if its module computes in its own way and holds it as a plain parameter.

    Args:
        candidate: of :func:`~ddst.convert.find_weights`; changed and returned.
        owners: ``id(parameter) -> names``.
    """
    c = candidate
    if c.reason is None or not (c.reason in (OWN, OWN_CODE) or c.reason.startswith(ITS_OWN)):
        return c
    held = (
        [name for name, parameter in c.module._parameters.items() if parameter is c.weight]
        if c.weight is not None
        else []
    )
    names = held or [name for name in NAMES if c.module._parameters.get(name) is not None]
    parameter = c.module._parameters[names[0]] if names else None
    if parameter is None or (isinstance(c.module, _ConvNd) and parameter.dim() > 4) or not fits(parameter):
        return c
    torchs = type(c.module).__module__.startswith("torch.nn.modules") and not isinstance(c.module, CONTAINERS)
    if torchs and not c.reason.startswith(ITS_OWN):
        return c
    shared = owners.get(id(parameter), [])
    c.attribute, c.weight, c.norm, c.slots = names[0], parameter, None, []
    c.shape = split_shape(parameter.shape)[1]
    c.reason = f"weight is shared: {', '.join(shared)}" if len(shared) > 1 else None
    if has_hooks(parameter):
        c.reason = HOOKED
    if c.reason is not None:
        c.attribute = None
    elif c.attribute not in NAMES:  # what it is used for decides
        c.reason = UNSEEN
    c.counted = c.counted or c.reason is None
    return c


def see_uses(
    model: nn.Module, candidates: Iterable[Candidate], arguments: tuple[Any, ...], block: tuple[int, int]
) -> None:
    """Decides by a run of the model which weights are packed where they are, and notes what unpacks them."""
    held = [c for c in candidates if c.attribute is not None]
    if not held:
        return
    uses = uses_of(model, [(c.module, c.attribute or "") for c in held], arguments, block)
    for c in held:
        use, named = uses[id(c.module), c.attribute or ""], c.attribute in NAMES
        c.as_tensor, places = use.as_tensor, ", ".join(sorted(use.dense))
        looked_up = any(place.startswith("embedding ") for place in use.dense)
        if use.failure is not None:
            c.attribute, c.reason = None, f"cannot be packed: {use.failure}"
        elif looked_up:
            c.attribute, c.reason = None, LOOKED_UP
        elif not use.packed and not named:
            c.attribute, c.reason = None, f"unpacked by {places}" if places else UNUSED
            if c.as_tensor:
                c.reason = "its code takes a tensor only, so that its use is not seen"
        else:
            c.reason, c.note = None, f"unpacked by {places}" if places else ""
            if c.as_tensor:
                c.note = "unpacked: its code takes a tensor only"
        c.counted = c.attribute is not None or (named and not looked_up)
        c.multiplies = c.reason not in (LOOKED_UP, UNUSED)


@dataclass
class Use:
    """What became of a parameter when the model ran with it packed.

    Attributes:
        packed: whether a convolution or linear function ran on its blocks.
        dense: "function at file:line" of those that got it unpacked.
        as_tensor: whether the code takes nothing but a tensor.
        failure: why it cannot be packed at all, or None.
    """

    packed: bool = False
    dense: set[str] = field(default_factory=set)
    as_tensor: bool = False
    failure: str | None = None


def fits(parameter: Tensor) -> bool:
    """Whether a parameter has the shape and the dtype of a weight."""
    try:
        split_shape(parameter.shape)
    except ValueError:
        return False
    plain = type(parameter) is nn.Parameter and parameter.layout == torch.strided and not parameter.is_meta
    return plain and parameter.dtype in DTYPES and parameter.numel() > 0


def uses_of(
    model: nn.Module, parameters: Iterable[tuple[nn.Module, str]], arguments: tuple[Any, ...], block: tuple[int, int]
) -> dict[tuple[int, str], Use]:
    """Runs the model once with these parameters packed: ``(id of the module, name) -> what was done with it``.

    Where code takes no packed weight it is run again with a tensor in its place. The model is left as it was.

    Raises:
        What the model raises on this sample as it is.
    """
    check_not_lazy(model)
    held = list(parameters)
    uses = {(id(module), name): Use() for module, name in held}
    while True:
        packable = [(module, name) for module, name in held if uses[id(module), name].failure is None]
        with _packed(packable, block) as packed, undisturbed(model), torch.enable_grad():
            for (module, name), parameter in zip(packable, packed, strict=True):
                parameter.gives_dense_weight = uses[id(module), name].as_tensor
            try:
                model(*arguments)
            except Exception as error:
                if not _blame(error, packable, uses):
                    raise
                continue
        for (module, name), parameter in zip(packable, packed, strict=True):
            use = uses[id(module), name]
            use.packed, use.dense = bool(parameter.weight_uses.packed), parameter.weight_uses.dense
        return uses


def _blame(error: Exception, packable: list[tuple[nn.Module, str]], uses: dict[tuple[int, str], Use]) -> bool:
    """Finds whose packed weight an error comes from, and what to try instead; False where it is none's.

    The innermost module that was running and holds one is to blame, or one inside of it, whose weight it may have read.
    """
    for inside in [*_running(error), None]:  # None: anybody's
        suspects = [uses[id(m), name] for m, name in packable if inside is None or m in inside]
        fresh = [use for use in suspects if not use.as_tensor]
        for use in fresh:
            use.as_tensor = True
        if fresh:
            return True
        for use in suspects:
            use.failure = f"{type(error).__name__}: {error}".splitlines()[0]
        if suspects:
            return True
    return False


def _running(error: Exception) -> list[set[nn.Module]]:
    """The modules whose methods an error came through, each with all inside of it, the innermost first."""
    found: list[set[nn.Module]] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        first = trace.tb_frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, nn.Module):
            found = [{first}, set(first.modules()), *found]
        trace = trace.tb_next
    return found


@contextmanager
def _packed(held: list[tuple[nn.Module, str]], block: tuple[int, int]) -> Iterator[list[PackedParameter]]:
    """Parameters packed with all blocks active, for a while; the very same parameters afterwards."""
    kept = [(module, type(module), dict(module._parameters), dict(vars(module))) for module, _ in held]
    packed = []
    try:
        for module, name in held:
            parameter = module._parameters[name]
            assert parameter is not None
            with torch.random.fork_rng():
                mask = torch.ones(tp.mask_shape(split_shape(parameter.shape)[1], block), dtype=torch.bool)
                packed.append(PackedParameter.of(parameter, mask, block, None))
            attach(module, name, packed[-1])
        yield packed
    finally:
        for module, kind, parameters, attributes in reversed(kept):
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
            for name in parameters:
                module._modules.pop(f"packed_{name}", None)


def packed_holders(model: nn.Module) -> list[nn.Module]:
    """The modules of a model in which parameters are packed."""
    return [module for module in model.modules() if isinstance(module, HoldsPackedParameters)]
