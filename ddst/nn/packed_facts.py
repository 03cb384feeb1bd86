"""What a state dict says of a packed weight, beside its tensors: nobody who loads it has to guess.

It stands in the state dict's metadata, where torch keeps the versions of modules: ``torch.save`` keeps it, and what
goes over the entries of a state dict (averages, other processes) does not see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .storage import PackedStorage

KEY = "ddst"


def packed_facts(layer: PackedStorage) -> dict[str, Any]:
    """``{"version", "weight_shape", "block", "density"}`` of a layer's weight, in plain values.

    >>> from ddst.nn import SparseLinear
    >>> facts = packed_facts(SparseLinear(32, 32, density=0.25))
    >>> facts["weight_shape"], facts["block"], facts["density"]
    ([32, 32], [16, 16], 0.25)
    """
    from .. import __version__  # made last

    return {
        "version": __version__,
        "weight_shape": list(layer.weight_shape),
        "block": list(layer.block),
        "density": layer.density,
    }


def misfit(layer: PackedStorage, values: Tensor, facts: Mapping[str, Any] | None) -> str:
    """Why packed values are not of this layer's weight in this layer's blocks: both, in one line; "" if they may be.

    Args:
        values: of the state dict. facts: what it says of them, or None where it has lost that.
    """
    held = values.shape[1:]
    shape: Sequence[int] = layer.weight_shape if facts is None else facts["weight_shape"]
    if values.dim() != 3 or (tuple(held) == layer.block and tuple(shape) == layer.weight_shape):
        return ""
    weight = "" if facts is None else f" of a {sizes(shape)} weight (ddst {facts['version']})"
    return (
        f"holds blocks of {sizes(held)}{weight}, this layer has blocks of {sizes(layer.block)} of a "
        f"{sizes(layer.weight_shape)} weight"
    )


def sizes(numbers: Sequence[int]) -> str:
    """``[32, 16, 3, 3]`` as 32x16x3x3."""
    return "x".join(map(str, numbers))
