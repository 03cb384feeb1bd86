"""The sparse layer that takes the place of a dense one, with all that hangs on it."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import SparseLayer
from ..nn.kinds import SPARSE_KINDS, shell_of
from ..nn.packed.parameter import PackedParameter
from ..nn.plain import own_attributes
from ..nn.spectral_norm import SpectralNorm
from ..nn.weight_norm import WeightNorm, g_of_kept, torch_hook
from .candidates import Candidate, DenseNorm, DenseWeightNorm, spectral_hook

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


def sparse_twin(
    candidate: Candidate, mask: Tensor, block: tuple[int, int], backend: str, noise: float, reserve: float | None
) -> SparseLayer:
    """The sparse layer that takes a layer's place, with its norms and attributes, or the packed form of a parameter."""
    if candidate.attribute is not None:
        return _packed(candidate, mask, block, backend, reserve)
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


def _packed(
    candidate: Candidate, mask: Tensor, block: tuple[int, int], backend: str, reserve: float | None
) -> PackedParameter:
    assert candidate.weight is not None
    packed = PackedParameter.of(candidate.weight, mask, candidate.own_block(block), reserve)
    packed.backend, packed.gives_dense_weight = backend, candidate.as_tensor
    packed.use_groups(candidate.groups)
    return packed.train(candidate.module.training)


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


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hands the user's hooks over, in the same dictionaries, so that the handles which remove them keep working."""
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
    for own in (spectral_hook(new), torch_hook(new)):
        for key in [key for key, hook in new._forward_pre_hooks.items() if hook is own and own is not None]:
            del new._forward_pre_hooks[key]
    if isinstance(new, SparseLayer) and new.weight_norm is not None:
        new.weight_norm.hook_up(new)
