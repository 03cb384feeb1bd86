"""Block-sparse ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import ops, topology
from .._arguments import check_int
from ..backends import Problem
from .base import SparseLayer
from .from_dense import check_plain, copy_of, mask_for


class SparseLinear(SparseLayer):
    """``y = x Wᵀ + b`` where ``W`` is block-sparse and stored packed; otherwise :class:`torch.nn.Linear`.

    Args:
        in_features, out_features, bias, device, dtype: as in :class:`torch.nn.Linear`.
        density: share of blocks that are active, above 0 and at most 1.
        block: ``(b_out, b_in)`` or one int, entries from 1 to 64. Multiples of 8 are fast.
        reserve: density for which slots are set aside from the start, so that no change of the mask up to it makes new
            tensors; None: none beyond ``density``.

    Shape: input ``[…, in_features]``, output ``[…, out_features]``; float32, float64, bfloat16, float16.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Numerics and cost: those of :func:`ddst.ops.linear`; time and weight memory are proportional to density.

    >>> layer = SparseLinear(64, 32, density=0.25)
    >>> layer(torch.randn(5, 64)).shape, tuple(layer.values.shape)
    (torch.Size([5, 32]), (2, 16, 16))
    """

    dense_kind: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float = 0.1,
        block: Sequence[int] | int = (16, 16),
        reserve: float | None = None,
    ) -> None:
        in_features = check_int("in_features", in_features, 1)
        out_features = check_int("out_features", out_features, 1)
        super().__init__((out_features, in_features), bias, block, density, reserve, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        *,
        density: float | None = None,
        block_mask: Tensor | None = None,
        block: Sequence[int] | int = (16, 16),
        reserve: float | None = None,
    ) -> SparseLinear:
        """The sparse layer with ``module``'s values at the active blocks; nothing is shared.

        Args:
            module: an :class:`torch.nn.Linear`, or of a subclass that adds only an ``__init__`` to it.
            density: keeps this share of the blocks, those of largest L2 norm; 0.1 if nothing is given.
            block_mask: or keeps exactly these blocks. reserve: as in the constructor.

        >>> dense = nn.Linear(32, 32)
        >>> sparse = SparseLinear.from_dense(dense, density=1.0)
        >>> x = torch.randn(4, 32)
        >>> torch.allclose(sparse(x), dense(x), atol=1e-5)
        True
        """
        check_plain(module, nn.Linear)
        mask = mask_for(module.weight, topology.check_block(block), density, block_mask)
        layer = cls(
            module.in_features,
            module.out_features,
            False,
            module.weight.device,
            module.weight.dtype,
            density=1 / mask.numel(),
            block=block,
            reserve=reserve,
        )
        layer._adopt(module.weight, mask, module.bias)
        return layer.train(module.training)

    def to_dense(self) -> nn.Linear:
        """The :class:`torch.nn.Linear` of equal outputs, with zeros at inactive blocks, and of the same norm.

        Nothing is shared.
        """
        dense = self._plain_dense()
        if self.norm is not None:
            self.norm.attach_to_dense(dense)
        return dense

    def _plain_dense(self) -> nn.Linear:
        """:meth:`to_dense` without the spectral or weight norm."""
        weight = self.dense_weight().detach()
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight.contiguous(), requires_grad=self.values.requires_grad)
        dense.bias = copy_of(self.bias)  # type: ignore[assignment]
        return dense.train(self.training)

    def _compute(self, input: Tensor) -> Tensor:
        return ops.linear(
            input,
            self.effective_values(),
            self.bias,
            self.topology,
            self.weight_shape,
            backend=self.backend,
            record=self._record,
        )

    def problem(self, device: str, dtype: torch.dtype) -> Problem:
        return Problem(device, dtype, self.block, linear=True)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"
