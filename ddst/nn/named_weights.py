"""The weights of a model in their dense shapes, for what looks at rows, columns or kernels of all of them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from .._arguments import check_module
from .base import SparseLayer
from .packed.parameter import PREFIX, PackedParameter
from .packed.weight import PackedWeight


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor | PackedWeight]]:
    """``(name, W)`` of every parameter with two dimensions or more, as ``named_parameters()`` before ``sparsify``.

    ``model.parameters()`` holds the blocks of a packed weight, ``[slots, b_out, b_in]``. What takes entries one by one
    or adds them up (norms, weight decay, clipping, averages) may use these; what looks at rows does not find them
    there: an orthogonal regularisation of ``p.view(p.shape[0], -1)`` would compute something else without a word.

    Args:
        model: sparse, dense, or in part.

    Yields:
        The parameter itself where it is dense; a :class:`~ddst.nn.PackedWeight` under the name of its dense twin and of
        its shape, zero where there is no block. Under spectral or weight norm it is what is trained, before the norm.
        Gradients of what is computed from it reach the blocks, and ``weight.grad`` reads and writes theirs.

    Raises:
        TypeError: model is no module.

    >>> import torch, ddst
    >>> model = nn.Sequential(ddst.SparseLinear(32, 16, density=0.5), nn.Linear(16, 4))
    >>> [(name, tuple(weight.shape)) for name, weight in named_weights(model)]
    [('0.weight', (16, 32)), ('1.weight', (4, 16))]
    >>> penalty = torch.zeros(())
    >>> for name, weight in named_weights(model):  # of rows that are not orthogonal
    ...     rows = weight.flatten(1)
    ...     penalty = penalty + (rows @ rows.t() * (1 - torch.eye(len(rows)))).square().sum()
    >>> penalty.backward()
    """
    return _weights_in(check_module("model", model))


def _weights_in(model: nn.Module) -> Iterator[tuple[str, Tensor | PackedWeight]]:
    for name, parameter in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        layer = model.get_submodule(owner)
        if attribute != "values" or not isinstance(layer, SparseLayer):
            if parameter.dim() >= 2:
                yield name, parameter
        elif isinstance(layer, PackedParameter):
            holder, _, child = f".{owner}".rpartition(".")
            dense_name = f"{holder}.{child.removeprefix(PREFIX)}".lstrip(".")
            yield dense_name, PackedWeight.of(layer, layer.values, layer.leading, bound=True)
        else:
            yield f"{owner}.weight".lstrip("."), PackedWeight.of(layer, layer.values, bound=True)
