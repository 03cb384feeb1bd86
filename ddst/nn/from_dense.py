"""What a sparse layer takes from a dense one: which layers fit, which blocks are kept, copies of parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import topology as tp
from .._arguments import check_type
from ..ops.reference import block_norms_of
from .plain import overridden, plain_kind


def check_plain(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raises unless ``module`` computes exactly what a ``kind`` does, with a weight that is a plain parameter.

    A spectral norm or another parametrization makes ``weight`` a product that changes with every look at it, and a
    subclass or an instance may have a forward pass of its own.
    """
    check_type("module", module, kind, f"an nn.{kind.__name__}")
    plain = plain_kind(type(module)) is kind and overridden(module, kind) is None
    if not plain or not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise ValueError(
            f"module must be a plain nn.{kind.__name__}, got {type(module).__name__} with a computed weight or "
            "a forward pass of its own; ddst.sparsify carries spectral norm and weight norm over"
        )


def copy_of(parameter: Tensor | None) -> nn.Parameter | None:
    """A parameter of its own memory with the same entries and ``requires_grad``."""
    return None if parameter is None else nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def mask_for(weight: Tensor, block: tuple[int, int], density: float | None, block_mask: Tensor | None) -> Tensor:
    """The mask ``from_dense`` was asked for: given, or the blocks of largest norm at a density (0.1 by default)."""
    if block_mask is not None:
        if density is not None:
            raise ValueError("give density or block_mask, not both")
        tp.check_mask(block_mask, tp.mask_shape(weight.shape, block))
        return block_mask
    norms = block_norms_of(weight.detach(), block)
    count = tp.block_count(0.1 if density is None else density, norms.numel())
    mask = torch.zeros(norms.numel(), dtype=torch.bool, device=weight.device)
    mask[norms.flatten().topk(count).indices] = True
    return mask.view(norms.shape)
