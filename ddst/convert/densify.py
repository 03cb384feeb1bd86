"""Sparse models back to dense ones: ``densify``, ``dense_state_dict``."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from .. import topology as tp
from .._arguments import check_module
from ..nn import SparseLayer, sparse_layers
from ..nn.data_parallel import let_go, whole
from ..nn.packed.parameter import PREFIX, PackedParameter, check_detachable, detach
from ..nn.spectral_norm import DENSE_KEYS
from ..nn.weight_norm import DENSE_KEYS as WEIGHT_NORM_KEYS
from ..nn.weight_norm import dense_parts, torch_hook
from .attached import packed_holders
from .candidates import check_unsharded, places
from .fuse import unfuse
from .twins import carry_hooks


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
        ValueError: the model is itself a sparse layer, or torch has parametrized a module of it after parameters of
            that were packed.

    >>> import ddst
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    >>> report = ddst.sparsify(model, 0.5)
    >>> x = torch.randn(4, 64)
    >>> y = model(x)
    >>> torch.allclose(densify(model)(x), y, atol=1e-5), type(model[0]).__name__
    (True, 'Linear')
    """
    if isinstance(check_module("model", model), SparseLayer):
        raise ValueError(
            f"model is itself a {type(model).__name__}, which cannot be swapped in place: use its to_dense()"
        )
    check_unsharded(model, "ddst.densify")
    holders = packed_holders(model)
    for holder in holders:
        check_detachable(holder)
    let_go(sparse_layers(model).values(), "layers are swapped for dense ones")
    unfuse(model)
    twins: dict[int, nn.Module] = {}
    for holder in holders:
        for name in detach(holder):
            _fill_zero_rows(holder, name)
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
    carry_hooks(layer, dense)
    if layer.norm is not None:
        layer.norm.attach_to_dense(dense)
    return dense


def _weight_norm_on(module: nn.Module, attribute: str) -> tuple[str, int] | None:
    """``(name of g, dim)`` where torch's weight norm, hook or parametrization, divides a parameter by its norms."""
    hook = torch_hook(module)
    if hook is not None and attribute == "weight_v":
        return "weight_g", hook.dim
    if isinstance(module, ParametrizationList) and attribute == "original1" and isinstance(module[0], _WeightNorm):
        return "original0", module[0].dim
    return None


def _without_zero_rows(g: Tensor, v: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """:func:`~ddst.nn.weight_norm.dense_parts` over any dimension; -1 for a norm over all."""
    if dim == -1:
        return dense_parts(g, v, None)
    g, v = dense_parts(g.transpose(0, dim), v.transpose(0, dim), 0)
    return g.transpose(0, dim), v.transpose(0, dim).contiguous()


@torch.no_grad()
def _fill_zero_rows(module: nn.Module, attribute: str) -> None:
    norm = _weight_norm_on(module, attribute)
    if norm is not None:
        g, v = module.get_parameter(norm[0]), module.get_parameter(attribute)
        for parameter, value in zip((g, v), _without_zero_rows(g, v, norm[1]), strict=True):
            parameter.copy_(value)


def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """``densify(model).state_dict()`` without changing the model: it loads strictly into the dense model.

    Weights are unpacked (zeros at inactive blocks) and named ``weight``, or as torch's spectral norm names its raw
    weight and vectors, and its weight norm g and v. The other direction needs no function:
    ``sparse_model.load_state_dict(dense_state)`` keeps the weights at active blocks.

    Args:
        model: a module with sparse layers, or a sparse layer.

    Returns:
        Keys in the dense model's order, but for parameters packed where they are, which come last of their module.
        Entries that are not a sparse layer's weight share memory with the model.

    >>> import ddst
    >>> dense = nn.Sequential(nn.Linear(32, 32))
    >>> model = nn.Sequential(nn.Linear(32, 32))
    >>> report = ddst.sparsify(model, 0.5)
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
        if isinstance(layer, PackedParameter):
            above, _, child = name.rpartition(".")
            key = ".".join(filter(None, (above, child.removeprefix(PREFIX))))
            renamed |= {prefix + "values": key, prefix + "slot_blocks": None}
            weights[prefix + "values"] = weight = weight.reshape(layer.shape)
            norm = _weight_norm_on(model.get_submodule(above), child.removeprefix(PREFIX))
            if norm is not None:
                g = f"{above}.{norm[0]}" if above else norm[0]
                weights[g], weights[prefix + "values"] = _without_zero_rows(whole(state[g]), weight, norm[1])
        elif layer.weight_norm is not None:
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
