"""What block-sparse convolutions have in common: settings, dense twins, scores; 1-D ones are 2-D ones of one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .. import ops, topology
from .._arguments import check_int, check_ints, check_one_of, check_tensor
from ..backends import Problem
from ..ops.conv2d import check_padding, output_is_channels_last, resolve_padding
from .base import SparseLayer
from .from_dense import check_plain, copy_of, mask_for

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

ConvT = TypeVar("ConvT", bound="SparseConvNd")


class SparseConvNd(SparseLayer):
    """Base of the convolutions, with the settings of torch's: tuples of ``dims`` entries, or the name of a padding.

    Attributes:
        channels_last: what torch would read off a dense weight's strides: outputs are channels_last (of a 1-D layer
            ``[N, T, C]`` in memory) whatever the input is.
    """

    dims: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: str | int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
        padding_mode: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        density: float,
        block: Sequence[int] | int,
        reserve: float | None,
    ) -> None:
        in_channels = check_int("in_channels", in_channels, 1)
        out_channels = check_int("out_channels", out_channels, 1)
        groups = check_int("groups", groups, 1)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name} must be divisible by groups={groups}, got {channels}")
        check_one_of("padding_mode", padding_mode, PADDING_MODES[:1] if self.transposed else PADDING_MODES)
        kernel = check_ints("kernel_size", kernel_size, self.dims, 1)
        strides, dilations = (check_ints(n, v, self.dims, 1) for n, v in (("stride", stride), ("dilation", dilation)))
        if not isinstance(padding, str) or self.transposed:
            padding = check_ints("padding", padding, self.dims, 0)
        paddings, extra = self._plane_padding(padding, kernel, strides, dilations)
        first, second = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        shape = (first, second // groups, *kernel)
        super().__init__(shape, bias, block, density, reserve, device, dtype, groups)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.stride, self.padding, self.dilation, self.padding_mode = strides, padding, dilations, padding_mode
        self.channels_last = False
        # Left, right, top, bottom, for the modes that F.pad computes.
        self._border = (paddings[1], paddings[1] + extra[1], paddings[0], paddings[0] + extra[0])

    @classmethod
    def from_dense(
        cls: type[ConvT],
        module: nn.Module,
        *,
        density: float | None = None,
        block_mask: Tensor | None = None,
        block: Sequence[int] | int = (16, 16),
        reserve: float | None = None,
    ) -> ConvT:
        """The sparse layer with ``module``'s values at the active blocks; nothing is shared.

        Args:
            module: the layer of :mod:`torch.nn` (``SparseConv2d`` takes an ``nn.Conv2d``), or of a subclass that adds
                only an ``__init__`` to it.
            density: keeps this share of the blocks, those of largest L2 norm; 0.1 if nothing is given.
            block_mask: or keeps exactly these blocks. block, reserve: as in the constructor.

        >>> from ddst.nn import SparseConv2d
        >>> dense = nn.Conv2d(16, 32, 3)
        >>> sparse = SparseConv2d.from_dense(dense, density=1.0)
        >>> x = torch.randn(1, 16, 5, 5)
        >>> torch.allclose(sparse(x), dense(x), atol=1e-5)
        True
        """
        check_plain(module, cls.dense_kind)
        plain: Any = module
        block = topology.check_block(block)
        topology.check_groups(plain.weight.shape, block, plain.groups)
        mask = mask_for(plain.weight, block, density, block_mask)
        make: Any = cls
        layer: ConvT = make(
            plain.in_channels,
            plain.out_channels,
            plain.kernel_size,
            bias=False,
            device=plain.weight.device,
            dtype=plain.weight.dtype,
            density=1 / mask.numel(),
            block=block,
            reserve=reserve,
            **settings_of(module),
        )
        layer._adopt(plain.weight, mask, plain.bias)
        layer.channels_last = output_is_channels_last(layer._images(plain.weight))
        return layer.train(module.training)

    def to_dense(self) -> Any:
        """The layer of :mod:`torch.nn` of equal outputs, with zeros at inactive blocks, and of the same norm.

        Nothing is shared.
        """
        dense = self._plain_dense()
        if self.norm is not None:
            self.norm.attach_to_dense(dense)
        return dense

    def _plain_dense(self) -> Any:
        """:meth:`to_dense` without the spectral or weight norm."""
        make: Any = self.dense_kind
        dense = make(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            bias=self.bias is not None,
            device="meta",
            **settings_of(self),
        )
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        weight = self._images(self.dense_weight().detach()).clone(memory_format=memory_format)
        dense.weight = nn.Parameter(self._signals(weight), requires_grad=self.values.requires_grad)
        dense.bias = copy_of(self.bias)
        return dense.train(self.training)

    # --- one row for a 1-D layer ------------------------------------------------------------------------------------

    def _plane(self, sizes: Sequence[int], row: int) -> tuple[int, int]:
        """What the 2-D operators take for sizes, paddings, steps: ``row`` stands for the one row of a 1-D layer."""
        return (sizes[0], sizes[1]) if self.dims == 2 else (row, sizes[0])

    def _images(self, tensor: Tensor) -> Tensor:
        """A 1-D layer's activations or weight with one row: a view."""
        return tensor if self.dims == 2 else tensor.unsqueeze(-2)

    def _signals(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`_images`."""
        return images if self.dims == 2 else images.squeeze(-2)

    def _plane_padding(
        self, padding: str | Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        given = padding if isinstance(padding, str) else self._plane(padding, 0)
        return resolve_padding(given, self._plane(kernel, 1), self._plane(stride, 1), self._plane(dilation, 1))

    def _input_images(self, input: Tensor) -> Tensor:
        """The input as the operators take it, in the memory format that the layer's weight asks for."""
        dims, channels = self.dims, self.in_channels
        if check_tensor("input", input).dim() not in (dims + 1, dims + 2) or input.shape[-1 - dims] != channels:
            space = "T" if dims == 1 else "H, W"
            raise ValueError(
                f"input must be [N, {channels}, {space}] or [{channels}, {space}] ({channels} channels), "
                f"got the shape {tuple(input.shape)}"
            )
        x = self._images(input)
        if self.channels_last and x.dim() == 4 and not output_is_channels_last(x):
            # Not contiguous(): with one channel or one pixel the old strides would pass for channels_last and stay.
            return x.clone(memory_format=torch.channels_last)
        return x

    # --- what a layer computes --------------------------------------------------------------------------------------

    def _compute(self, input: Tensor) -> Tensor:
        x = self._input_images(input)
        padding: str | tuple[int, int] = self.padding if isinstance(self.padding, str) else self._plane(self.padding, 0)
        stride, dilation = self._plane(self.stride, 1), self._plane(self.dilation, 1)
        if self.padding_mode != "zeros":
            reach = [d * (k - 1) + 1 for d, k in zip(dilation, self.op_shape[2:], strict=True)]
            check_padding(padding, (self._border[2], self._border[0]), x.shape[-2:], reach)
            x = nn.functional.pad(x, self._border, mode=self.padding_mode)
            padding = (0, 0)
        y = ops.conv2d(
            x,
            self.effective_values(),
            self.bias,
            self.topology,
            self.op_shape,
            stride,
            padding,
            dilation,
            backend=self.backend,
            record=self._record,
        )
        return self._signals(y)

    def problem(self, device: str, dtype: torch.dtype) -> Problem:
        kernel, stride, dilation = (self._plane(n, 1) for n in (self.kernel_size, self.stride, self.dilation))
        return Problem(device, dtype, self.block, kernel, stride, dilation)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != "valid" and (isinstance(self.padding, str) or any(self.padding)):
            text += f", padding={self.padding}"
        text += self._output_repr()
        if any(d != 1 for d in self.dilation):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return f"{text}, {super().extra_repr()}"

    def _output_repr(self) -> str:
        return ""


def settings_of(layer: Any) -> dict[str, Any]:
    """What the constructors of a convolution and of its twin take alike, beside its sizes and its bias."""
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(layer, name) for name in (*names, *["output_padding"] * layer.transposed)}
