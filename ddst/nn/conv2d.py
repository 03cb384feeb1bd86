"""Block-sparse ``nn.Conv2d``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .conv import SparseConvNd
from .deferred.plan import Plan, convolve
from .deferred.value import Deferred, tensor_of


class SparseConv2d(SparseConvNd):
    """``y = x ⋆ W + b`` where ``W`` is block-sparse and stored packed; otherwise :class:`torch.nn.Conv2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in :class:`torch.nn.Conv2d`; padding modes other than "zeros" pad the input first, by ``F.pad``. With
            several groups the channels of a group, in and out, must be multiples of the block: weight, mask and density
            are those of torch's grouped weight ``[C_out, C_in / groups, kH, kW]``.
        density: share of blocks that are active, above 0 and at most 1. A block is ``b_out × b_in`` channels at a tap.
        block: ``(b_out, b_in)`` or one int, entries from 1 to 64. Multiples of 8 are fast.
        reserve: density for which slots are set aside from the start, so that no change of the mask up to it makes new
            tensors; None: none beyond ``density``.

    Shape: input ``[N, C_in, H, W]`` or ``[C_in, H, W]``; the output's memory format follows ``nn.Conv2d``'s rule;
    ``channels_last`` (an attribute, taken over by ``from_dense``) stands for the dense weight's layout. channels_last
    inputs save two layout changes. float32, float64, bfloat16, float16.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Numerics and cost: those of :func:`ddst.ops.conv2d`; time and weight memory are proportional to density. Growth
    scores of grouped layers take a dense weight gradient of the grouped weight.

    Attributes:
        plan: what :func:`ddst.fuse` has found behind the layer, or None.

    >>> layer = SparseConv2d(64, 32, 3, padding=1, density=0.25)
    >>> layer(torch.randn(2, 64, 8, 8)).shape, tuple(layer.values.shape)
    (torch.Size([2, 32, 8, 8]), (18, 16, 16))
    >>> SparseConv2d(64, 64, 3, groups=2, density=0.25).num_blocks  # of 4 rows of 2 blocks at 9 taps
    72
    """

    dims: ClassVar[int] = 2
    takes_deferred: ClassVar[bool] = True
    dense_kind: ClassVar[type[nn.Module]] = nn.Conv2d
    plan: Plan | None = None

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

    def _compute(self, input: Any) -> Tensor:
        if self.plan is not None or isinstance(input, Deferred):
            fused: Tensor | None = convolve(self, input)
            if fused is not None:
                return fused
        return super()._compute(tensor_of(input))
