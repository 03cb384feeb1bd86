"""Block-sparse ``nn.Conv2d``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from .. import ops, topology
from .._arguments import check_int, check_one_of
from ..backends import Problem
from ..ops.conv2d import check_padding, output_is_channels_last, pair, resolve_padding
from .base import SparseLayer, check_plain, copy_of, mask_for

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class SparseConv2d(SparseLayer):
    """``y = x ⋆ W + b`` where ``W`` is block-sparse and stored packed; otherwise :class:`torch.nn.Conv2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as in
            :class:`torch.nn.Conv2d`; padding modes other than "zeros" pad the input first, by ``F.pad``.
        groups: 1, nothing else.
        density: share of blocks that are active, above 0 and at most 1. A block is ``b_out × b_in`` channels at a tap.
        block: ``(b_out, b_in)`` or one int, entries from 1 to 64. Multiples of 8 are fast.
        reserve: density for which slots are set aside from the start, so that no change of the mask up to it makes new
            tensors; None: none beyond ``density``.

    Shape: input ``[N, C_in, H, W]`` or ``[C_in, H, W]``; the output's memory format follows ``nn.Conv2d``'s rule;
    ``channels_last`` (an attribute, taken over by ``from_dense``) stands for the dense weight's layout. channels_last
    inputs save two layout changes. float32, float64, bfloat16, float16.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Numerics and cost: those of :func:`ddst.ops.conv2d`; time and weight memory are proportional to density.

    >>> layer = SparseConv2d(64, 32, 3, padding=1, density=0.25)
    >>> layer(torch.randn(2, 64, 8, 8)).shape, tuple(layer.values.shape)
    (torch.Size([2, 32, 8, 8]), (18, 16, 16))
    """

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
        in_channels = check_int("in_channels", in_channels, 1)
        out_channels = check_int("out_channels", out_channels, 1)
        if check_int("groups", groups) != 1:
            raise ValueError(f"groups must be 1 (block-sparse grouped convolution is not supported), got {groups!r}")
        check_one_of("padding_mode", padding_mode, PADDING_MODES)
        kernel = pair(kernel_size, "kernel_size", 1)
        strides, dilations = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
        paddings, extra = resolve_padding(padding, kernel, strides, dilations)
        super().__init__((out_channels, in_channels, *kernel), bias, block, density, reserve, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.stride, self.dilation, self.groups, self.padding_mode = strides, dilations, 1, padding_mode
        self.padding = padding if isinstance(padding, str) else paddings
        # What torch would read off a dense weight's strides: its outputs are channels_last whatever the input is.
        self.channels_last = False
        # Left, right, top, bottom, for the modes that F.pad computes.
        self._border = (paddings[1], paddings[1] + extra[1], paddings[0], paddings[0] + extra[0])

    @classmethod
    def from_dense(
        cls,
        module: nn.Conv2d,
        *,
        density: float | None = None,
        block_mask: Tensor | None = None,
        block: Sequence[int] | int = (16, 16),
        reserve: float | None = None,
    ) -> SparseConv2d:
        """The sparse layer with ``module``'s values at the active blocks; nothing is shared.

        Args:
            module: an :class:`torch.nn.Conv2d` with ``groups=1``.
            density: keeps this share of the blocks, those of largest L2 norm; 0.1 if nothing is given.
            block_mask: or keeps exactly these blocks. reserve: as in the constructor.

        >>> dense = nn.Conv2d(16, 32, 3)
        >>> sparse = SparseConv2d.from_dense(dense, density=1.0)
        >>> x = torch.randn(1, 16, 5, 5)
        >>> torch.allclose(sparse(x), dense(x), atol=1e-5)
        True
        """
        check_plain(module, nn.Conv2d)
        if module.groups != 1:
            raise ValueError(f"module.groups must be 1, got {module.groups}")
        mask = mask_for(module.weight, topology.check_block(block), density, block_mask)
        layer = cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            bias=False,
            padding_mode=module.padding_mode,
            device=module.weight.device,
            dtype=module.weight.dtype,
            density=1 / mask.numel(),
            block=block,
            reserve=reserve,
        )
        layer._adopt(module.weight, mask, module.bias)
        layer.channels_last = output_is_channels_last(module.weight)
        return layer.train(module.training)

    def to_dense(self) -> nn.Conv2d:
        """The :class:`torch.nn.Conv2d` of equal outputs, with zeros at inactive blocks, and of the same norm.

        Nothing is shared.
        """
        dense = self._plain_dense()
        if self.norm is not None:
            self.norm.attach_to_dense(dense)
        return dense

    def _plain_dense(self) -> nn.Conv2d:
        """:meth:`to_dense` without the spectral or weight norm."""
        weight = self.dense_weight().detach()
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        weight = weight.clone(memory_format=memory_format)
        dense.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        dense.bias = copy_of(self.bias)
        return dense.train(self.training)

    def _compute(self, input: Tensor) -> Tensor:
        padding: str | tuple[int, int] = self.padding
        if self.channels_last and input.dim() == 4 and not output_is_channels_last(input):
            # Not contiguous(): with one channel or one pixel the old strides would pass for channels_last and stay.
            input = input.clone(memory_format=torch.channels_last)
        if self.padding_mode != "zeros":
            reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            check_padding(padding, (self._border[2], self._border[0]), input.shape[-2:], reach)
            input = nn.functional.pad(input, self._border, mode=self.padding_mode)
            padding = (0, 0)
        return ops.conv2d(
            input,
            self.effective_values(),
            self.bias,
            self.topology,
            self.weight_shape,
            self.stride,
            padding,
            self.dilation,
            backend=self.backend,
            record=self._record,
        )

    def problem(self, device: str, dtype: torch.dtype) -> Problem:
        return Problem(device, dtype, self.block, self.kernel_size, self.stride, self.dilation)

    def _recorded_padding(self) -> tuple[int, int]:
        # What the operator saw: padding by F.pad, and the odd part of 'same', are already in the recorded input.
        if self.padding_mode != "zeros":
            return (0, 0)
        return resolve_padding(self.padding, self.kernel_size, self.stride, self.dilation)[0]

    def _block_scores(self, grad_output: Tensor, input: Tensor) -> Tensor:
        return ops.conv2d_block_scores(
            grad_output,
            input,
            self.weight_shape,
            self.block,
            self.stride,
            self._recorded_padding(),
            self.dilation,
            backend=self.backend,
        )

    def _dense_gradient(self, grad_output: Tensor, input: Tensor) -> Tensor:
        return conv2d_weight(
            input, self.weight_shape, grad_output, self.stride, self._recorded_padding(), self.dilation
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding not in ((0, 0), "valid"):
            text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return f"{text}, {super().extra_repr()}"
