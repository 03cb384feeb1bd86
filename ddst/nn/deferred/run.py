"""The convolution at the end of a chain: what it can take up, and how it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import ops
from ...ops.norm_act_conv2d import Norm
from .work import Activated, Convolved

if TYPE_CHECKING:
    from ..conv2d import SparseConv2d


def refusal(layer: SparseConv2d) -> str | None:
    """Why a layer cannot take up what is in front of it, or None."""
    if layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r} pads what is activated"
    _, extra = _padding(layer)
    return f"padding={layer.padding!r} needs unequal zeros on both sides" if any(extra) else None


def _padding(layer: SparseConv2d) -> tuple[tuple[int, int], tuple[int, int]]:
    return layer._plane_padding(layer.padding, layer.kernel_size, layer.stride, layer.dilation)


def takes(layer: SparseConv2d, work: Activated) -> bool:
    """Whether a layer called now runs ``work`` as a part of it, equal to the parts one after the other."""
    x = work.source
    if layer.padding_mode != "zeros" or refusal(layer) is not None or x.shape[1] != layer.in_channels:
        return False
    if layer.backend == "reference" and layer.scores_requested and torch.compiler.is_compiling():
        return False  # it runs outside of the graph, which deferred values do not leave
    kind = x.device.type
    if work.norm is not None and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        # The convolution's input is rounded there: after the norm, not before.
        return x.dtype == torch.get_autocast_dtype(kind)
    return True


def run(
    work: Convolved, residual: Tensor | None = None, residual_upsample: int = 1, moments: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``pool(conv(input)) + up(residual)``, and the moments of it."""
    layer, input = work.layer, work.input
    work.check()
    x = layer._input_images(input.source)
    geometry: tuple[Any, ...] = (layer.topology, layer.op_shape, layer.stride, layer.padding, layer.dilation)
    settings: dict[str, Any] = {"backend": layer.backend, "record": layer._record}
    nothing = input.norm is None and input.slope == 1 and input.upsample == work.pool == 1
    if nothing and residual is None and not moments:
        return ops.conv2d(x, work.values, layer.bias, *geometry, **settings), None
    return ops.norm_act_conv2d(
        x,
        work.values,
        layer.bias,
        *geometry,
        norm=None if input.norm is None else _complete(input.norm),
        negative_slope=input.slope,
        upsample=input.upsample,
        pool=work.pool,
        residual=residual,
        residual_upsample=residual_upsample,
        moments=moments,
        **settings,
    )


def shape_of(work: Activated | Convolved) -> tuple[int, ...]:
    """Of the value."""
    if isinstance(work, Activated):
        return work.shape
    layer, (n, _, *size) = work.layer, work.input.shape
    (top, left), _ = _padding(layer)
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    height = (size[0] + 2 * top - reach[0]) // layer.stride[0] + 1
    width = (size[1] + 2 * left - reach[1]) // layer.stride[1] + 1
    return n, layer.out_channels, height // work.pool, width // work.pool


def _complete(norm: Norm) -> Norm:
    """With both of gamma and beta, of one shape, or none."""
    gamma, beta = norm.gamma, norm.beta
    if gamma is None and beta is None:
        return norm
    if gamma is None:
        assert beta is not None
        gamma = torch.ones_like(beta)
    if beta is None:
        beta = torch.zeros_like(gamma)
    if gamma.dim() != beta.dim():
        shape = gamma.shape if gamma.dim() > beta.dim() else beta.shape
        gamma, beta = gamma.expand(shape), beta.expand(shape)
    return norm._replace(gamma=gamma, beta=beta)
