"""Block-sparse ``nn.Conv1d``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from .conv import SparseConvNd


class SparseConv1d(SparseConvNd):
    """``y = x ⋆ W + b`` where ``W`` is block-sparse and stored packed; otherwise :class:`torch.nn.Conv1d`.

    Computed as a 2-D convolution of images of one row.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in :class:`torch.nn.Conv1d`; padding modes and groups as in :class:`SparseConv2d`.
        density: share of blocks that are active, above 0 and at most 1. A block is ``b_out × b_in`` channels at a tap.
        block: ``(b_out, b_in)`` or one int, entries from 1 to 64. Multiples of 8 are fast.
        reserve: density for which slots are set aside from the start, so that no change of the mask up to it makes new
            tensors; None: none beyond ``density``.

    Shape: input ``[N, C_in, T]`` or ``[C_in, T]``. The output has the input's order in memory. An input that lies as
    ``[N, T, C_in]`` (strides ``(T · C_in, 1, C_in)``, such as ``x.transpose(1, 2)`` of what transformers use) is
    computed where it lies, and its output lies so, too (torch's is contiguous). A contiguous ``[N, C_in, T]`` is
    copied into that order first, its output out of it, and so are their gradients: keep a chain of layers in
    ``[N, T, C]``. float32, float64, bfloat16, float16.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Numerics and cost: those of :func:`ddst.ops.conv2d`; time and weight memory are proportional to density.

    >>> layer = SparseConv1d(64, 32, 3, padding=1, density=0.25)
    >>> layer(torch.randn(2, 64, 20)).shape, tuple(layer.values.shape)
    (torch.Size([2, 32, 20]), (6, 16, 16))
    >>> layer(torch.randn(2, 20, 64).transpose(1, 2)).stride()
    (640, 1, 32)
    """

    dims: ClassVar[int] = 1
    dense_kind: ClassVar[type[nn.Module]] = nn.Conv1d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float = 0.1,
        block: Sequence[int] | int = (16, 16),
        reserve: float | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, density, block, reserve,
        )  # fmt: skip
