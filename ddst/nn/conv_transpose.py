"""What block-sparse transposed convolutions have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from .._arguments import check_int, check_ints
from ..ops.conv2d import output_is_channels_last
from ..ops.conv_transpose2d import conv_transpose2d_of_pixels
from .conv import SparseConvNd


class SparseConvTransposeNd(SparseConvNd):
    """Base of the transposed convolutions: the input gradient of a convolution, computed forward.

    A 1×1 input without padding and dilation is what the first layer of many generators gets: it is a linear layer then.
    """

    transposed: ClassVar[bool] = True
    padding: tuple[int, ...]
    _of_pixels = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        output_padding: int | Sequence[int],
        groups: int,
        bias: bool,
        dilation: int | Sequence[int],
        padding_mode: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        density: float,
        block: Sequence[int] | int,
        reserve: float | None,
    ) -> None:
        extra = check_ints("output_padding", output_padding, self.dims, 0)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype, density, block, reserve,
        )  # fmt: skip
        self.output_padding = extra
        self._of_pixels = (
            not any(self.padding) and all(d == 1 for d in self.dilation) and math.prod(self.kernel_size) > 1
        )

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return self._forward(input) if output_size is None else self._forward(input, output_size)

    def _compute(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        x = self._input_images(input)
        extra = self.output_padding if output_size is None else self._padding_up_to(output_size, x)
        if (
            self._of_pixels
            and x.dim() == 4
            and x.shape[2:] == (1, 1)
            and not any(extra)
            and self.backend != "reference"
        ):
            y = conv_transpose2d_of_pixels(
                x,
                self.effective_values(),
                self.bias,
                self.topology_as(matrix=True)[0],
                self.op_shape,
                channels_last=output_is_channels_last(x),
                backend=self.backend,
                record=self._record,
            )
        else:
            y = ops.conv_transpose2d(
                x,
                self.effective_values(),
                self.bias,
                self.topology,
                self.op_shape,
                self._plane(self.stride, 1),
                self._plane(self.padding, 0),
                self._plane(extra, 0),
                self._plane(self.dilation, 1),
                backend=self.backend,
                record=self._record,
            )
        return self._signals(y)

    def _padding_up_to(self, wanted: Sequence[int], x: Tensor) -> tuple[int, ...]:
        """The output padding that makes an output of this size, as torch's layers have it.

        Args:
            wanted: sizes of the output, with or without those of batch and channels. x: the input as images.
        """
        if isinstance(wanted, str | Tensor) or not isinstance(wanted, Sequence):
            raise TypeError(f"output_size must be a sequence of ints, got {type(wanted).__name__}")
        sizes, leading = tuple(check_int("output_size", size) for size in wanted), x.dim() - 2
        if len(sizes) not in (self.dims, self.dims + leading):
            raise ValueError(f"output_size must have {self.dims} or {leading + self.dims} entries, got {sizes}")
        sizes = sizes[-self.dims :]
        least = [
            (x.shape[i - self.dims] - 1) * self.stride[i]
            - 2 * self.padding[i]
            + self.dilation[i] * (self.kernel_size[i] - 1)
            + 1
            for i in range(self.dims)
        ]
        extra = tuple(size - first for size, first in zip(sizes, least, strict=True))
        if any(not 0 <= more < step for more, step in zip(extra, self.stride, strict=True)):
            most = tuple(first + step - 1 for first, step in zip(least, self.stride, strict=True))
            raise ValueError(
                f"output_size must be from {tuple(least)} to {most} for an input of "
                f"{tuple(x.shape[-self.dims :])}, got {sizes}"
            )
        return extra

    def _output_repr(self) -> str:
        return f", output_padding={self.output_padding}" if any(self.output_padding) else ""
