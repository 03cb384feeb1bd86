"""Block-sparse ``nn.ConvTranspose1d``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from .conv_transpose import SparseConvTransposeNd


class SparseConvTranspose1d(SparseConvTransposeNd):
    """``y = Wᵀ ⋆ x + b`` where ``W`` is block-sparse and stored packed; otherwise :class:`torch.nn.ConvTranspose1d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as in :class:`torch.nn.ConvTranspose1d`.
        groups: as in :class:`SparseConvTranspose2d`.
        output_padding, bias, dilation, padding_mode, device, dtype: as in :class:`torch.nn.ConvTranspose1d`.
        density: share of blocks that are active, above 0 and at most 1. A block is ``b_in × b_out`` channels at a tap.
        block: ``(b_in, b_out)`` or one int, entries from 1 to 64: rows and columns of torch's weight of this layer,
            ``[C_in, C_out / groups, k]``, which is what is packed. Multiples of 8 are fast.
        reserve: density for which slots are set aside from the start, so that no change of the mask up to it makes new
            tensors; None: none beyond ``density``.

    Shape: input ``[N, C_in, T]`` or ``[C_in, T]``; the call takes ``output_size``, as torch's layer does. The output
    has the input's order in memory; ``[N, T, C]`` is the fast one, as for :class:`SparseConv1d`. float32, float64,
    bfloat16, float16.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Numerics and cost: those of :func:`ddst.ops.conv_transpose2d`; time and weight memory are proportional to density.

    >>> layer = SparseConvTranspose1d(64, 32, 16, stride=8, padding=4, density=0.25)
    >>> layer(torch.randn(2, 64, 20)).shape, tuple(layer.values.shape)
    (torch.Size([2, 32, 160]), (32, 16, 16))
    """

    dims: ClassVar[int] = 1
    dense_kind: ClassVar[type[nn.Module]] = nn.ConvTranspose1d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float = 0.1,
        block: Sequence[int] | int = (16, 16),
        reserve: float | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype, density, block, reserve,
        )  # fmt: skip
