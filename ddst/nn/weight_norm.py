"""Weight norm on packed values: the weight as lengths ``g`` times directions ``v``, over its active blocks.

``v`` is the layer's ``values``, so what moves blocks and optimizer state knows nothing of the norm; ``g`` is a small
parameter beside them. Norms are sums over the slots of a block row, which the layer's topology names.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.nn.utils.weight_norm import WeightNorm as TorchWeightNorm

from .. import topology as tp
from .._arguments import check_device, check_dtype, check_one_of, check_weight_shape
from .data_parallel import is_sharded, let_go

if TYPE_CHECKING:
    from ..slot_change import SlotChange
    from .base import SparseLayer

STYLES = ("hook", "parametrization")

#: Names of g and v in a dense layer's state dict, by the kind of torch's weight norm.
DENSE_KEYS = {
    "hook": ("weight_g", "weight_v"),
    "parametrization": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
}

_SPARSE_KEYS = ("weight_norm.g", "weight")

LayerT = TypeVar("LayerT", bound="SparseLayer")


def rename_dense_keys(state_dict: dict[str, Any], prefix: str) -> None:
    """Names the entries of torch's weight norm, of either kind, "weight_norm.g" and "weight".

    >>> state = {"weight_g": 1, "weight_v": 2}
    >>> rename_dense_keys(state, "")
    >>> state
    {'weight_norm.g': 1, 'weight': 2}
    """
    for keys in DENSE_KEYS.values():
        for old, new in zip(keys, _SPARSE_KEYS, strict=True):
            if prefix + old in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)


def _wide(values: Tensor) -> Tensor:
    """16-bit floats in float32, others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _row_sums(weight: Tensor, dim: int | None) -> Tensor:
    """Sums over each row of a dense tensor, ``[C_out, 1, …]``, or over all of it."""
    return weight.sum() if dim is None else weight.sum(dim=tuple(range(1, weight.dim())), keepdim=True)


def norms_of(weight: Tensor, dim: int | None) -> Tensor:
    """L2 norms of a dense weight's rows, ``[C_out, 1, …]``, or of all of it; of 16-bit floats in float32.

    >>> norms_of(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), 0).tolist()
    [[5.0], [2.0]]
    """
    return _row_sums(_wide(weight).square(), dim).sqrt()


def normed(g: Tensor, weight: Tensor, dim: int | None) -> Tensor:
    """``g · v / ‖v‖`` of a dense ``v``, zero where ``v`` is."""
    norms = norms_of(weight, dim)
    return _wide(weight) * (g.view(norms.shape) / torch.where(norms == 0, 1, norms))


def g_of_kept(g: Tensor, weight: Tensor, kept: Tensor, dim: int | None) -> Tensor:
    """``g · ‖kept‖ / ‖v‖``, so that what is kept of a dense ``v`` stays the weight that it was.

    Args:
        g: any shape with an entry for each row. weight: ``v``. kept: ``v`` with zeros where it is not kept.
    """
    kept = kept.view(weight.shape)
    before, after = norms_of(weight, dim), norms_of(kept, dim)
    lost = _row_sums((weight != kept).to(before.dtype), dim) > 0  # elsewhere g keeps every bit
    return g * _ratio(before, after, lost).view(g.shape).to(g.dtype)


def _ratio(before: Tensor, after: Tensor, lost: Tensor) -> Tensor:
    """``after / before`` where something was lost, 0 if nothing was there; 1 elsewhere."""
    return torch.where(lost, after / torch.where(before == 0, 1, before), 1)


def dense_parts(g: Tensor, weight: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    """``(g, v)`` for torch's weight norm: a row of zeros, which torch divides by its length 0, gets a direction.

    The direction is the same in every entry, of length 1, and ``g`` is 0 there, as the weight is.
    """
    zero = norms_of(weight, dim) == 0
    per_row = weight.numel() if dim is None else math.prod(weight.shape[1:])
    return torch.where(zero.view(g.shape), 0, g), torch.where(zero, 1 / math.sqrt(per_row), weight)


class TorchHook(TorchWeightNorm):
    """Stands on a sparse layer of style "hook" for :func:`torch.nn.utils.remove_weight_norm` to find."""

    def __init__(self, dim: int | None) -> None:
        super().__init__("weight", -1 if dim is None else dim)

    def compute_weight(self, module: Any) -> Tensor:
        weight: Tensor = module.weight
        return weight

    def remove(self, module: Any) -> None:
        _fold(module)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Nothing: the layer computes its weight itself."""


class WeightNorm(nn.Module):
    """``W = g · v / ‖v‖``, the norm over each row's active blocks, or over all of them; ``v`` are the layer's values.

    What a change of the mask does: a grown block is zero and leaves all norms, so the output stays as it is. Where a
    block is dropped, ``g ← g · ‖v kept‖ / ‖v‖``, so that the weights which stay are those that they were. ``g`` of a
    row that loses its last block becomes 0. Optimizer state of ``g`` stays.

    Where ``v`` is zero, as in a row whose first block has just been grown, ``W`` is zero and ``W = v`` counts for the
    derivative: ``v`` gets the weight's gradient, ``g`` none. (torch's weight norm is NaN there.) So the first step
    gives the row a direction, the following ones a length, as ``g``'s gradient then is the weight's along it.

    Args:
        weight_shape: shape of the dense weight, ``(C_out, C_in, kH, kW)`` or ``(C_out, C_in)``.
        dim: 0, a norm for each row, or None (for torch also -1), one over all.
        style: the torch function this stands for: "hook" (:func:`torch.nn.utils.weight_norm`) or "parametrization"
            (:func:`torch.nn.utils.parametrizations.weight_norm`). :func:`ddst.densify` and
            :func:`ddst.dense_state_dict` return to it.
        device, dtype: of ``g``.

    Attributes:
        g: parameter of torch's shape, ``[C_out, 1, 1, 1]``, for a linear layer ``[C_out, 1]``, a scalar with
            ``dim=None``.

    Raises:
        ValueError: ``dim`` or ``style`` is none of the above.

    Numerics: computes in the dtype of the values, 16-bit floats in float32; differentiable any number of times. Equal
        to torch's weight norm of the masked dense ``v``. On CUDA the order of sums over a row's blocks is fixed only
        under :func:`torch.use_deterministic_algorithms`.

    Cost: two passes over the values, and the memory of one more set of them until backward.

    Source: Salimans and Kingma, Weight Normalization (NeurIPS 2016), equation 2.

    >>> from ddst.nn import SparseLinear
    >>> layer = weight_norm(SparseLinear(64, 64, density=0.5))
    >>> _ = nn.init.constant_(layer.weight_norm.g, 2.0)
    >>> torch.allclose(layer.weight.norm(dim=1), torch.tensor(2.0))
    True
    """

    g: nn.Parameter

    def __init__(
        self,
        weight_shape: Sequence[int],
        dim: int | None = 0,
        style: str = "parametrization",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        weight_shape = check_weight_shape("weight_shape", weight_shape)
        dim = check_dim(dim)
        check_one_of("style", style, STYLES)
        device, dtype = check_device("device", device), check_dtype("dtype", dtype)
        super().__init__()
        self.dim, self.style = dim, style
        shape = [] if dim is None else [weight_shape[0], *[1] * (len(weight_shape) - 1)]
        self.g = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))

    def forward(self, layer: SparseLayer) -> Tensor:
        """``g · values / ‖v‖``, ``[slots, b_out, b_in]``; free slots stay zero.

        Args:
            layer: the layer this belongs to.
        """
        scale = self.scale(layer)
        if self.dim is not None:
            # One block row more, for the free slots.
            rows = layer.mask_shape[0] + 1
            scale = F.pad(scale, (0, rows * layer.block[0] - scale.numel())).view(rows, layer.block[0])
            scale = scale.index_select(0, layer.places()[0])[:, :, None]
        return (_wide(layer.values) * scale).to(layer.values.dtype)

    def scale(self, layer: SparseLayer) -> Tensor:
        """``g / ‖v‖``, ``[C_out]``, or a scalar with ``dim=None``; 1 where ``v`` is zero. Differentiable."""
        squares = self._squares(layer)
        # The root has no derivative at 0, and 0 · ∞ must not come out of the branch that is not taken.
        zero = squares == 0
        norms = torch.where(zero, 1, squares).sqrt()
        return torch.where(zero, 1, self.g.reshape(squares.shape).to(squares.dtype) / norms)

    @torch.no_grad()
    def norms(self, layer: SparseLayer) -> Tensor:
        """``‖v‖``, ``[C_out]``, or a scalar with ``dim=None``."""
        return self._squares(layer).sqrt()

    @torch.no_grad()
    def reset(self, layer: SparseLayer) -> None:
        """``g ← ‖v‖``, so that the weight is ``v``."""
        self.g.copy_(self.norms(layer).view(self.g.shape))

    @torch.no_grad()
    def rescale(self, layer: SparseLayer, before: Tensor, change: SlotChange) -> None:
        """``g ← g · ‖v‖ / before`` where the change dropped blocks; called by the layer after it.

        Args:
            before: :meth:`norms` before the change.
        """
        if not change.dropped or self.g.is_meta:
            return
        after = self.norms(layer)
        old = change.before[change.before >= 0]
        gone = old[~torch.isin(old, change.slot_blocks)].long()
        if self.dim is None:
            lost = torch.ones((), dtype=torch.bool)
        else:
            rows, cols, taps = tp.grid(layer.weight_shape, layer.block)
            lost = torch.zeros(rows, dtype=torch.bool)
            lost[gone // (cols * taps)] = True
            lost = lost.repeat_interleave(layer.block[0])[: layer.weight_shape[0]]
        self.g.mul_(_ratio(before, after, lost.to(after.device)).view(self.g.shape))

    @torch.no_grad()
    def rescale_loaded(self, state_dict: dict[str, Any], prefix: str, weight: Tensor, kept: Tensor) -> None:
        """``g_of_kept`` of a dense state dict, in that state dict, for the values that are kept of its weight."""
        g = state_dict.get(prefix + "g")
        if isinstance(g, Tensor) and g.shape == self.g.shape:
            state_dict[prefix + "g"] = g_of_kept(g.to(weight.device), weight, kept, self.dim)

    def attach_to_dense(self, dense: nn.Module) -> None:
        """Gives a dense layer whose weight is ``v`` torch's weight norm of this style."""
        layer: Any = dense
        trained = layer.weight.requires_grad
        g, v = dense_parts(self.g.detach(), layer.weight.detach(), self.dim)
        layer.weight = nn.Parameter(v, requires_grad=trained)
        attach: Any = hooked_weight_norm if self.style == "hook" else parametrizations.weight_norm
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # which says that the hook is the older kind
            attach(layer, dim=self.dim)
        held_g, held_v = (layer.get_parameter(key) for key in DENSE_KEYS[self.style])
        held_g.data.copy_(g)
        held_g.requires_grad_(self.g.requires_grad)
        held_v.requires_grad_(trained)
        hook = torch_hook(layer)
        if hook is not None:
            with torch.no_grad():  # as the weight is a plain attribute, without a history it can be copied
                layer.weight = hook.compute_weight(layer)

    def hook_up(self, layer: nn.Module) -> None:
        """With style "hook": puts where torch looks for it what :func:`torch.nn.utils.remove_weight_norm` removes."""
        if self.style == "hook":
            layer.register_forward_pre_hook(TorchHook(self.dim))

    def _squares(self, layer: SparseLayer) -> Tensor:
        """``‖v‖²``, ``[C_out]`` or a scalar."""
        squares = _wide(layer.values).square()
        return layer.within(squares).sum() if self.dim is None else layer.sums(squares, 0)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, style={self.style!r}"


def check_dim(dim: Any) -> int | None:
    """0, or None for one norm over all, which torch also calls -1."""
    if dim is not None and (type(dim) is not int or dim not in (0, -1)):
        raise ValueError(f"dim must be 0 (a norm for each row) or None (one over all), got {dim!r}")
    return None if dim == -1 else dim


def torch_hook(module: nn.Module) -> TorchWeightNorm | None:
    """The hook of :func:`torch.nn.utils.weight_norm` on ``module.weight``, if there is one."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, TorchWeightNorm) and hook.name == "weight":
            return hook
    return None


def weight_norm(layer: LayerT, dim: int | None = 0, style: str = "parametrization") -> LayerT:
    """``W ← g · v / ‖v‖``: attaches a :class:`WeightNorm` to a sparse layer as ``layer.weight_norm``.

    ``v`` is what ``values`` are now, ``g`` its norms, so the weight stays. ``g`` is a new parameter: create the
    optimizer afterwards.

    Args:
        layer: a SparseConv2d or SparseLinear without weight norm and spectral norm.
        dim, style: of :class:`WeightNorm`.

    Returns:
        The layer.

    Raises:
        TypeError: ``layer`` is no sparse layer.
        ValueError: it has a norm already, or another argument does not fit.

    >>> from ddst.nn import SparseConv2d
    >>> layer = weight_norm(SparseConv2d(32, 64, 3))
    >>> layer.weight_norm.g.shape
    torch.Size([64, 1, 1, 1])
    """
    _check_sparse(layer)
    if layer.norm is not None:
        raise ValueError(f"layer has a {'weight' if layer.spectral_norm is None else 'spectral'} norm already")
    norm = WeightNorm(layer.weight_shape, dim, style, layer.values.device, layer.values.dtype)
    let_go([layer], "a layer gets a weight norm")
    norm.train(layer.training)
    norm.reset(layer)
    norm.hook_up(layer)
    layer.weight_norm = norm
    return layer


def remove_weight_norm(layer: LayerT) -> LayerT:
    """``v ← g · v / ‖v‖``: the plain layer of the same weight, without a weight norm.

    ``values`` stay the same Parameter object and lose their gradient; ``g`` is gone. On a layer of style "hook"
    :func:`torch.nn.utils.remove_weight_norm` does the same.

    Args:
        layer: a sparse layer with weight norm.

    Returns:
        The layer.

    Raises:
        TypeError: ``layer`` is no sparse layer.
        ValueError: it has no weight norm.
        RuntimeError: its values are DTensors: call it before ``fully_shard``.

    >>> from ddst.nn import SparseLinear
    >>> layer = weight_norm(SparseLinear(32, 32))
    >>> remove_weight_norm(layer).weight_norm is None
    True
    """
    _check_sparse(layer)
    _fold(layer)
    for key in [key for key, hook in layer._forward_pre_hooks.items() if isinstance(hook, TorchHook)]:
        del layer._forward_pre_hooks[key]
    return layer


@torch.no_grad()
def _fold(layer: SparseLayer) -> None:
    norm = layer.weight_norm
    if norm is None:
        raise ValueError("layer has no weight norm")
    if is_sharded(layer.values):
        raise RuntimeError("values are a DTensor (fully_shard): call remove_weight_norm before fully_shard")
    let_go([layer], "a weight norm is removed")
    if layer._origin is not None:
        layer._origin.check(layer)
        layer._origin.forget()  # what is written now is no average
    layer.values.copy_(norm(layer))
    layer.values.grad = None
    del layer.weight_norm
    layer.weight_norm = None


def _check_sparse(layer: Any) -> None:
    if isinstance(layer, type) or not getattr(layer, "runs", False):
        raise TypeError(f"layer must be a SparseConv2d or SparseLinear, got {type(layer).__name__}")
