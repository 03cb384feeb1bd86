"""Block-sparse ``nn.ConvTranspose2d``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from .conv_transpose import SparseConvTransposeNd


class SparseConvTranspose2d(SparseConvTransposeNd):
    """``y = Wᵀ ⋆ x + b`` where ``W`` is block-sparse and stored packed; otherwise :class:`torch.nn.ConvTranspose2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as in :class:`torch.nn.ConvTranspose2d`.
        groups: with several the channels of a group, in and out, must be multiples of the block.
        output_padding, bias, dilation, padding_mode, device, dtype: as in :class:`torch.nn.ConvTranspose2d`.
        density: share of blocks that are active, above 0 and at most 1. A block is ``b_in × b_out`` channels at a tap.
        block: ``(b_in, b_out)`` or one int, entries from 1 to 64: rows and columns of torch's weight of this layer,
            ``[C_in, C_out / groups, kH, kW]``, which is what is packed. Multiples of 8 are fast.
        reserve: density for which slots are set aside from the start, so that no change of the mask up to it makes new
            tensors; None: none beyond ``density``.

    Shape: input ``[N, C_in, H, W]`` or ``[C_in, H, W]``; the call takes ``output_size``, as torch's layer does. The
    output's memory format follows ``nn.ConvTranspose2d``'s rule; ``channels_last`` (an attribute, taken over by
    ``from_dense``) stands for the dense weight's layout. float32, float64, bfloat16, float16.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Numerics and cost: those of :func:`ddst.ops.conv_transpose2d`; of a 1×1 input without padding and dilation, those
    of a linear layer. Time and weight memory are proportional to density.

    >>> layer = SparseConvTranspose2d(64, 32, 4, stride=2, padding=1, density=0.25)
    >>> layer(torch.randn(2, 64, 8, 8)).shape, tuple(layer.values.shape)
    (torch.Size([2, 32, 16, 16]), (32, 16, 16))
    >>> layer(torch.randn(2, 64, 8, 8), output_size=(17, 16)).shape
    torch.Size([2, 32, 17, 16])
    """

    dims: ClassVar[int] = 2
    dense_kind: ClassVar[type[nn.Module]] = nn.ConvTranspose2d

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
