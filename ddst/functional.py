"""Functions of weights, packed or dense, that code can call where it wants their fast form by name."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ._arguments import check_bool, check_ints, check_number, check_tensor, check_type
from .nn.conv2d import SparseConv2d
from .nn.packed.weight import PackedWeight

__all__ = ["modulated_conv2d"]


def modulated_conv2d(
    input: Tensor,
    weight: SparseConv2d | PackedWeight | Tensor,
    style: Tensor,
    *,
    demodulate: bool = True,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    up: int | tuple[int, int] = 1,
    eps: float = 1e-8,
) -> Tensor:
    """``y[n, o] = d[n, o] · Σ_i W[o, i] ∗ (s[n, i] x[n, i])``, ``d[n, o] = (Σ_{i,t} (W[o, i, t] s[n, i])² + ε)^-½``.

    StyleGAN 2's convolution, whose weight ``W[o, i, t] · s[n, i] · d[n, o]`` is another one for each image: here the
    images are scaled before and after one convolution with ``W``, and no weight is made for each of them.

    Args:
        input: x, ``[N, C_in, H, W]``.
        weight: W, ``[C_out, C_in, kH, kW]`` (or with a first dimension of 1): the weight of a layer or module that
            :func:`ddst.sparsify` has packed, times whatever keeps it packed, or a tensor; or a
            :class:`ddst.SparseConv2d` without groups, of which nothing but the weight is used.
        style: s, ``[N, C_in]``.
        demodulate: whether d is applied, or 1.
        stride, padding: of the convolution.
        up: above 1, a transposed convolution of this stride with the same taps: ``(H − 1) · up − 2 · padding + kH``
            rows. Filters that follow, as StyleGAN's, are the caller's.
        eps: ε.

    Returns:
        ``[N, C_out, H_out, W_out]``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Numerics: d is computed in the dtype of weight and style, also under autocast. Differentiable any number of times.

    Cost: one convolution, proportional to density, and for d one on an image of the kernel's size.

    Source: Karras et al., Analyzing and Improving the Image Quality of StyleGAN (2020), equations 1 and 3.

    >>> import torch, ddst
    >>> layer = ddst.SparseConv2d(32, 16, 3, density=0.5)
    >>> x, style = torch.randn(2, 32, 8, 8), torch.rand(2, 32)
    >>> y = modulated_conv2d(x, layer, style, padding=1)
    >>> modulated = layer.dense_weight() * style[:, None, :, None, None]
    >>> modulated = modulated / (modulated.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    >>> one = torch.nn.functional.conv2d(x[:1], modulated[0], padding=1)
    >>> torch.allclose(y[:1], one, atol=1e-5)
    True
    """
    check_tensor("input", input, 4)
    w = _matrix_of_kernels(weight)
    check_tensor("style", style, 2)
    inputs = w.shape[1]
    if input.shape[1] != inputs:
        raise ValueError(f"input must have the weight's {inputs} channels, got the shape {tuple(input.shape)}")
    if tuple(style.shape) != (input.shape[0], inputs):
        raise ValueError(f"style must have the shape {(input.shape[0], inputs)}, got {tuple(style.shape)}")
    strides, ups = check_ints("stride", stride, 2, 1), check_ints("up", up, 2, 1)
    paddings = check_ints("padding", padding, 2, 0)
    if max(ups) > 1 and max(strides) > 1:
        raise ValueError(f"stride must be 1 where up is above 1, got stride={stride} and up={up}")
    check_bool("demodulate", demodulate)
    eps = check_number("eps", eps, 0)

    x = input * style.to(input.dtype)[:, :, None, None]
    if max(ups) > 1:
        y = F.conv_transpose2d(x, w.transpose(0, 1), stride=ups, padding=paddings)
    else:
        y = F.conv2d(x, w, stride=strides, padding=paddings)
    if not demodulate:
        return y
    if isinstance(w, Tensor):  # without a weight for each image
        squares = (w.square().sum((2, 3)) * style.square()[:, None, :]).sum(2)
    else:
        squares = (w * style[:, None, :, None, None]).square().sum((2, 3, 4))
    return y * (squares + eps).rsqrt().to(y.dtype)[:, :, None, None]


def _matrix_of_kernels(weight: Any) -> Any:
    """The weight of a convolution ``[C_out, C_in, kH, kW]``, packed or a tensor."""
    if isinstance(weight, SparseConv2d):
        if weight.groups != 1:
            raise ValueError(f"weight must be that of a layer without groups, got groups={weight.groups}")
        return weight._packed_weight()
    kinds: Any = PackedWeight | Tensor
    w: Any = check_type("weight", weight, kinds, "a SparseConv2d, a packed weight or a tensor")
    shape = tuple(w.shape)
    if len(shape) == 5 and shape[0] == 1:
        return w.reshape(shape[1:])
    if len(shape) != 4:
        raise ValueError(
            f"weight must have the shape [C_out, C_in, kH, kW], after a dimension of 1 or not, got {shape}"
        )
    return w
