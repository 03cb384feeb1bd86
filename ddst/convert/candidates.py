"""Which layers of a model can become sparse, and why the others cannot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)

from .._arguments import check_module
from ..nn import SparseLayer
from ..nn.data_parallel import is_sharded
from ..nn.kinds import SPARSE_KINDS, names_of
from ..nn.plain import overridden, own_attributes, plain_kind
from ..nn.weight_norm import normed as normed_weight
from ..nn.weight_norm import torch_hook

#: Why a layer cannot be swapped, though its weight could be packed where it is.
HOOKED = "hooks are registered on its weight, of the dense shape: register them on layer.values afterwards"
OWN_CODE, ITS_OWN = "a subclass with code of its own", "the instance has its own "

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class DenseNorm:
    """torch's spectral norm on a dense layer: its style ("hook" or "parametrization"), settings and vectors.

    ``dim`` is the dimension of the weight that the matrix's rows count.
    """

    style: str
    n_power_iterations: int
    eps: float
    dim: int
    u: Tensor
    v: Tensor


@dataclass(frozen=True)
class DenseWeightNorm:
    """torch's weight norm on a dense layer: "hook" or "parametrization", ``dim`` (None: one norm over all), and g."""

    style: str
    dim: int | None
    g: nn.Parameter


@dataclass
class Candidate:
    """A convolution or linear layer of a model.

    Attributes:
        names: every dotted name it is reached by; more than one if the module is shared.
        slots: the parents and the attributes that hold it.
        kind: name of its class. plain: the layer of torch that it computes as, if it is one that has a sparse twin.
        shape: of its weight.
        weight: its raw weight, before spectral norm; under weight norm v. None where there is no single parameter.
        norm: its spectral or weight norm, if any.
        reason: why it cannot be sparse, or None.
        counted: whether a density over all layers counts it: a layer of a kind with a sparse twin that is not excluded.
        attribute: name of the parameter that is packed where it is, in a module that computes in its own way
            (``ddst.convert.attached``); None for a layer that is swapped.
        as_tensor: whether that module takes its weight as a tensor only. note: what the report says of it.
        multiplies: False for what a run has shown to be looked up, or not used.
    """

    module: nn.Module
    kind: str
    shape: tuple[int, ...]
    names: list[str] = field(default_factory=list)
    slots: list[tuple[nn.Module, str]] = field(default_factory=list)
    weight: Tensor | None = None
    norm: DenseNorm | DenseWeightNorm | None = None
    reason: str | None = None
    counted: bool = False
    plain: type[nn.Module] | None = None
    attribute: str | None = None
    as_tensor: bool = False
    multiplies: bool = True
    note: str = ""

    @property
    def groups(self) -> int:
        """Of a convolution."""
        return int(self.module.groups) if isinstance(self.module, _ConvNd) else 1

    @property
    def transposed(self) -> bool:
        """Whether its weight has the input channels first."""
        return isinstance(self.module, _ConvTransposeNd)

    @property
    def oriented(self) -> tuple[int, ...]:
        """``shape`` with the output channels first."""
        first, second, *space = self.shape
        return (second, first, *space) if self.transposed else self.shape

    def own_block(self, block: tuple[int, int]) -> tuple[int, int]:
        """``(b_out, b_in)`` as the block of its weight."""
        return (block[1], block[0]) if self.transposed else block

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def ranked_weight(self) -> Tensor | None:
        """What blocks are compared in: the weight, under weight norm ``g · v / ‖v‖``."""
        if self.weight is None or not isinstance(self.norm, DenseWeightNorm):
            return self.weight
        return normed_weight(self.norm.g.detach(), self.weight.detach(), self.norm.dim)


def check_no_layer(model: nn.Module) -> None:
    """Raises for what is no module, or itself a layer that only its parent could swap."""
    check_module("model", model)
    if isinstance(model, (*SPARSE_KINDS, SparseLayer)):
        names = [s.__name__ for dense, s in SPARSE_KINDS.items() if isinstance(model, dense | s)]
        raise ValueError(
            f"model is itself a {type(model).__name__}, which cannot be swapped in place: use "
            f"ddst.{names[0]}.from_dense, or put it into an nn.Sequential"
        )


def check_unsharded(model: nn.Module, call: str) -> None:
    """Raises for a model of whose parameters each rank holds a part."""
    if is_sharded(*model.parameters()):
        raise ValueError(
            f"model has parameters that are DTensors, of which each rank holds a part (fully_shard): call {call} "
            "first, then fully_shard"
        )


def places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """``(dotted name, parent, attribute, module)`` of every place below ``model`` that holds a module.

    A module held in two places comes twice; the model itself does not come.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    for name, module in named.items():
        if name:
            above, _, attribute = name.rpartition(".")
            yield name, named[above], attribute, module


def find_candidates(model: nn.Module, exclude: Iterable[str | nn.Module | type] = ()) -> list[Candidate]:
    """Every convolution, linear and sparse layer below ``model``, in module order, and why some stay as they are.

    Args:
        model: any module; it is not changed, and no power iteration is run.
        exclude: names, modules or classes; each also excludes everything inside it.

    Raises:
        TypeError: ``exclude`` is no sequence of such.
        ValueError: a name or module that the model does not have.

    >>> for c in find_candidates(nn.Sequential(nn.Conv3d(8, 8, 3), nn.ReLU(), nn.Linear(8, 8))):
    ...     print(c.name, c.kind, c.reason)
    0 Conv3d Conv3d is not supported
    2 Linear None
    """
    check_module("model", model)
    excluded = excluded_modules(model, exclude)
    owners = owners_of(model)
    found: dict[int, Candidate] = {}
    for name, parent, attribute, module in places(model):
        if not isinstance(module, _ConvNd | nn.Linear | SparseLayer):
            continue
        if id(module) not in found:
            found[id(module)] = _examine(module, id(module) in excluded, owners)
        candidate = found[id(module)]
        candidate.names.append(name)
        candidate.slots.append((parent, attribute))
        if isinstance(parent, nn.TransformerEncoderLayer | nn.MultiheadAttention) and candidate.reason is None:
            candidate.reason = f"nn.{type(parent).__name__} reads its weight directly"
    return list(found.values())


def excluded_modules(model: nn.Module, exclude: Iterable[str | nn.Module | type]) -> set[int]:
    """``id`` of every module that is excluded, those inside others too; see :func:`find_candidates`."""
    if isinstance(exclude, str | nn.Module | type) or not isinstance(exclude, Iterable):
        raise TypeError(f"exclude must be a sequence of names, modules or classes, got {exclude!r}")
    named = dict(model.named_modules(remove_duplicate=False))
    present = {id(module) for module in named.values()}
    roots: list[nn.Module] = []
    for item in exclude:
        if isinstance(item, str):
            if item not in named:
                raise ValueError(f"exclude names {item!r}, which the model does not have")
            roots.append(named[item])
        elif isinstance(item, type) and issubclass(item, nn.Module):
            roots.extend(module for module in named.values() if isinstance(module, item))
        elif isinstance(item, nn.Module):
            if id(item) not in present:
                raise ValueError(f"exclude holds a {type(item).__name__} that is not part of the model")
            roots.append(item)
        else:
            raise TypeError(f"exclude must hold names, modules or classes of modules, got {item!r}")
    return {id(module) for root in roots for module in root.modules()}


def owners_of(model: nn.Module) -> dict[int, list[str]]:
    """``id(parameter) -> names``, one for every module attribute that holds it; a shared module counts once."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{attribute}" if name else attribute)
    return owners


def _examine(module: nn.Module, excluded: bool, owners: dict[int, list[str]]) -> Candidate:
    if isinstance(module, SparseLayer):
        return Candidate(module, type(module).__name__, module.weight_shape, reason="already sparse")
    kind = parametrize.type_before_parametrizations(module)
    weight, norm, reason = _raw_weight(module)
    lazy = isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()
    settings = _shape(module)
    shape = settings if lazy or not isinstance(weight, Tensor) else tuple(weight.shape)
    plain = plain_kind(kind)
    candidate = Candidate(module, kind.__name__, shape, weight=weight, norm=norm, reason=reason, plain=plain)
    # A layer without weights, or not with them yet, has none to share out.
    candidate.counted = isinstance(module, tuple(SPARSE_KINDS)) and not excluded and candidate.size > 0
    if excluded:
        candidate.reason = "excluded"
    elif lazy:
        candidate.reason = "lazy, without a shape yet: run the model once on a batch before"
    elif plain is None:
        known = kind.__module__.startswith("torch.nn.modules.conv")
        candidate.reason = f"{kind.__name__} is not supported" if known else OWN_CODE
    elif candidate.reason is None:
        candidate.reason = _bound_to_instance(module, plain)
        if candidate.weight is not None and candidate.reason is None:
            candidate.reason = _unfit(candidate.weight, settings, owners[id(candidate.weight)], plain)
    return candidate


def _bound_to_instance(module: nn.Module, plain: type[nn.Module]) -> str | None:
    """What an instance has that a sparse layer could not take over, or None."""
    patched = overridden(module, plain)
    if patched == "_compiled_call_impl":
        return "compiled by its compile(): call that after ddst.sparsify"
    if patched is not None:
        return f"{ITS_OWN}{patched}"
    clash = sorted(own_attributes(module, plain).keys() & names_of(SPARSE_KINDS[plain]))
    return f"{ITS_OWN}{clash[0]}, a name that a sparse layer uses itself" if clash else None


def _unfit(weight: Tensor, settings: tuple[int, ...], owners: list[str], plain: type[nn.Module]) -> str | None:
    """Why a plain layer's weight cannot be packed, or None."""
    if len(owners) > 1:
        return f"weight is shared: {', '.join(owners)}"
    if len(settings) != 2 + getattr(SPARSE_KINDS[plain], "dims", 0):
        return f"kernel_size has {len(settings) - 2} entries"
    if weight.layout != torch.strided or type(weight) not in (nn.Parameter, Tensor):
        return f"weight is a {type(weight).__name__} of layout {weight.layout}"
    if weight.dtype not in DTYPES or weight.is_meta:
        return f"weight is {weight.dtype} on {weight.device}"
    if tuple(weight.shape) != settings:
        return f"weight has the shape {tuple(weight.shape)}, the layer's settings say {settings}"
    if has_hooks(weight):
        return HOOKED
    return None if weight.numel() else "has no weights"


def has_hooks(weight: Tensor) -> bool:
    """Whether hooks of somebody's hang on the gradient, which has another shape once the weight is packed."""
    return bool(weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None))


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Weight shape from the layer's settings: reading a parametrized weight would run its power iteration."""
    if isinstance(module, nn.Linear):
        return (int(module.out_features), int(module.in_features))  # which may be numpy's
    assert isinstance(module, _ConvNd)
    first, second = module.out_channels, module.in_channels
    if isinstance(module, _ConvTransposeNd):
        first, second = second, first
    return (int(first), int(second) // int(module.groups), *map(int, module.kernel_size))


def _raw_weight(module: nn.Module) -> tuple[Tensor | None, DenseNorm | DenseWeightNorm | None, str | None]:
    """``(raw weight, spectral or weight norm, reason)``: the reason is that something else hangs on the layer."""
    weight: Tensor | None
    norm: DenseNorm | DenseWeightNorm | None = None
    normed = _normed_weight(module)
    if normed is not None:
        weight, norm, expected = normed
        if norm.dim not in (0, None):
            return None, None, f"weight norm over dim={norm.dim}"
    elif parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        steps = [(name, type(step).__name__) for name, chain in lists.items() for step in chain]
        if [name for name, _ in steps] != ["weight"] or not isinstance(lists["weight"][0], _SpectralNorm):
            return None, None, "parametrized: " + ", ".join(f"{name} by {step}" for name, step in steps)
        step = lists["weight"][0]
        if step.dim not in (0, 1):
            return None, None, f"spectral norm over dim={step.dim}"
        weight, expected = lists["weight"].original, {"bias"}
        norm = DenseNorm("parametrization", step.n_power_iterations, step.eps, step.dim, step._u, step._v)
    else:
        hook = spectral_hook(module)
        suffix = "" if hook is None else "_orig"
        weight, expected = module._parameters.get("weight" + suffix), {"weight" + suffix, "bias"}
        if hook is not None:
            if hook.dim not in (0, 1):
                return None, None, f"spectral norm over dim={hook.dim}"
            expected |= {"weight_u", "weight_v"}
            u, v = module.get_buffer("weight_u"), module.get_buffer("weight_v")
            norm = DenseNorm("hook", hook.n_power_iterations, hook.eps, hook.dim, u, v)
    extra = sorted((set(module._parameters) | set(module._buffers)) - expected)
    extra += [name for name in module._modules if name != "parametrizations"]
    if "weight_mask" in module._buffers:
        return None, None, "pruned by torch.nn.utils.prune (it has weight_mask): prune.remove(layer, 'weight') first"
    if weight is None and extra == ["weight_orig"]:  # from which a hook of somebody's computes the weight
        return None, None, f"{ITS_OWN}weight_orig"
    if extra or weight is None:
        return None, None, f"re-parametrized or extended: has {', '.join(extra) or 'no weight parameter'}"
    if _foreign_state_hooks(module):
        return None, None, "has state-dict hooks"
    return weight, norm, None


def _normed_weight(module: nn.Module) -> tuple[Tensor, DenseWeightNorm, set[str]] | None:
    """``(v, weight norm, names of the layer's parameters)`` where the weight has torch's weight norm of either kind."""
    hook = torch_hook(module)
    if hook is not None:
        g, v = module.get_parameter("weight_g"), module.get_parameter("weight_v")
        return v, DenseWeightNorm("hook", None if hook.dim == -1 else hook.dim, g), {"weight_g", "weight_v", "bias"}
    lists: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
    steps = list(lists["weight"]) if list(lists) == ["weight"] else []
    if [type(step) for step in steps] != [_WeightNorm]:
        return None
    g, v, dim = lists["weight"].original0, lists["weight"].original1, steps[0].dim
    return v, DenseWeightNorm("parametrization", None if dim == -1 else dim, g), {"bias"}


def spectral_hook(module: nn.Module) -> SpectralNorm | None:
    """The hook of :func:`torch.nn.utils.spectral_norm` on ``module.weight``, if there is one."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            return hook
    return None


def _foreign_state_hooks(module: nn.Module) -> bool:
    """Whether there are state-dict hooks other than those of torch's norms: they speak of dense weights."""
    hooks = [
        *module._state_dict_hooks.values(),
        *module._state_dict_pre_hooks.values(),
        *module._load_state_dict_pre_hooks.values(),
        *module._load_state_dict_post_hooks.values(),
    ]
    return not all(_is_torchs(getattr(hook, "hook", hook)) for hook in hooks)


def _is_torchs(hook: Any) -> bool:
    """Whether a state-dict hook is one that torch's spectral norm or weight norm puts there."""
    if isinstance(hook, SpectralNormStateDictHook | SpectralNormLoadStateDictPreHook):
        return True
    # A function inside torch's function.
    place = (getattr(hook, "__module__", ""), getattr(hook, "__qualname__", "").partition(".")[0])
    return place == (parametrizations.__name__, "weight_norm")
