"""Norm, activation, upsampling, block-sparse convolution, pooling and sum as a module of one's own blocks."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .._arguments import check_bool, check_int, check_tensor
from ..ops.norm_act_conv2d import channel_moments
from .conv2d import SparseConv2d
from .deferred.plan import hooked, is_norm, may_defer, syncs
from .deferred.run import refusal, run
from .deferred.value import Deferred, tensor_of
from .deferred.work import Convolved


class NormActConv2d(nn.Module):
    """``y = pool(conv(up(act(norm(x))))) + up(residual)``: the half of a residual block, that keeps ``x`` alone.

    The parts are ordinary modules, and each computes what it would by itself: running statistics, spectral norm, growth
    scores, state dicts. What they do to ``x`` is done by the convolution as it reads, in the forward and in the
    backward pass (:func:`ddst.ops.norm_act_conv2d`).

    Args:
        conv: a :class:`~ddst.SparseConv2d` that pads with zeros, equally on both sides.
        norm: :class:`torch.nn.BatchNorm2d`, or any other module, which runs by itself: its output is kept, too. So does
            a SyncBatchNorm in training. None: there is none.
        activation: :class:`torch.nn.ReLU` or :class:`torch.nn.LeakyReLU`, or None.
        condition: makes the norm a conditional one: a module that returns gain and shift, ``[N, C_in]`` each, of what
            ``forward`` gets as ``condition``: ``norm(x) · gain + shift``. Needs a norm, as a rule ``affine=False``.
        upsample: 1, or 2 for nearest upsampling in front of the convolution.
        pool: 1, or 2 for 2x2 average pooling behind it.

    Shape: input ``[N, C_in, H, W]``, output ``[N, C_out, H', W']``, the residual of the output's shape, or half its
    sides with ``residual_upsample=2``. float32, float64, bfloat16, float16; autocast as the parts.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Numerics: as the parts one after the other, to rounding; differentiable any number of times.

    Cost: that of the convolution and a pass over input and output. Hooks on the parts see tensors; parts with hooks run
    by themselves.

    >>> import torch
    >>> from ddst.nn import SparseConv2d
    >>> norm, act = nn.BatchNorm2d(32), nn.ReLU()
    >>> half = NormActConv2d(SparseConv2d(32, 64, 3, padding=1, density=0.25), norm, act, upsample=2)
    >>> x = torch.randn(2, 32, 8, 8)
    >>> half(x).shape
    torch.Size([2, 64, 16, 16])
    >>> h = F.interpolate(act(norm(x)), scale_factor=2.0)
    >>> torch.allclose(half(x), half.conv(h), atol=1e-4)
    True

    Two of them, where the first hands the statistics of its output to the second one's norm:

    >>> last = NormActConv2d(SparseConv2d(64, 64, 3, padding=1, density=0.25), nn.BatchNorm2d(64), nn.ReLU())
    >>> h, moments = half(x, return_moments=True)
    >>> last(h, moments=moments).shape
    torch.Size([2, 64, 16, 16])
    """

    def __init__(
        self,
        conv: SparseConv2d,
        norm: nn.Module | None = None,
        activation: nn.ReLU | nn.LeakyReLU | None = None,
        *,
        condition: nn.Module | None = None,
        upsample: int = 1,
        pool: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(conv, SparseConv2d):
            raise TypeError(f"conv must be a SparseConv2d, got {type(conv).__name__}")
        reason = refusal(conv)
        if reason is not None:
            raise ValueError(f"conv must pad with equal zeros, but {reason}")
        for name, module in (("norm", norm), ("condition", condition)):
            if module is not None and not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a module or None, got {type(module).__name__}")
        if type(activation) not in (nn.ReLU, nn.LeakyReLU, type(None)):
            raise TypeError(f"activation must be an nn.ReLU, nn.LeakyReLU or None, got {type(activation).__name__}")
        if condition is not None and norm is None:
            raise ValueError("condition needs a norm, whose output it scales and shifts, got norm=None")
        for name, factor in (("upsample", upsample), ("pool", pool)):
            if check_int(name, factor, 1) > 2:
                raise ValueError(f"{name} must be 1 or 2, got {factor}")
        self.norm, self.activation, self.condition, self.conv = norm, activation, condition, conv
        self.upsample, self.pool = upsample, pool

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        condition: Any = None,
        moments: Tensor | None = None,
        residual_upsample: int = 1,
        return_moments: bool = False,
    ) -> Any:
        """``y``, or ``(y, its moments)``.

        Args:
            input: ``[N, C_in, H, W]``.
            residual: added to the output, or None; upsampled before where ``residual_upsample`` is 2.
            condition: what the module ``condition`` gets.
            moments: those of ``input``, ``[2, C_in]`` as :func:`ddst.ops.channel_moments` returns them, or None: the
                norm takes them itself where it needs them. Such of another tensor make a wrong norm.
            return_moments: whether to return those of the output, for a norm behind it.
        """
        check_tensor("input", input, 4)
        if check_int("residual_upsample", residual_upsample, 1) > 2:
            raise ValueError(f"residual_upsample must be 1 or 2, got {residual_upsample}")
        if residual is not None:
            check_tensor("residual", residual, 4)
        if moments is not None and tuple(check_tensor("moments", moments).shape) != (2, input.shape[1]):
            raise ValueError(f"moments must have the shape (2, {input.shape[1]}), got {tuple(moments.shape)}")
        check_bool("return_moments", return_moments)
        y: Any = self.conv(self._activated(input, moments, condition))
        if isinstance(y, Deferred):
            assert isinstance(y.work, Convolved)
            y, found = run(y.work._replace(pool=self.pool), residual, residual_upsample, return_moments)
        else:
            y = F.avg_pool2d(y, 2) if self.pool == 2 else y
            if residual is not None:
                y = y + (F.interpolate(residual, scale_factor=2.0) if residual_upsample == 2 else residual).to(y.dtype)
            found = channel_moments(y) if return_moments else None
        return (y, found) if return_moments else y

    def _activated(self, input: Tensor, moments: Tensor | None, condition: Any) -> Any:
        """What the convolution reads, put off where it can be."""
        h: Any = input
        fresh = False
        if self.norm is not None:
            fresh = is_norm(self.norm)
            put_off = fresh and may_defer(h) and not hooked(self.norm) and not syncs(self.norm)
            h = self.norm(Deferred.of(h, moments, takes_norm=True) if put_off else h)
        if self.condition is not None:
            gain, shift = self.condition(condition)
            h = h * gain[:, :, None, None] + shift[:, :, None, None]
        if may_defer(h):
            h = Deferred.of(h, shared=not fresh)
        if self.activation is not None:
            h = self.activation(tensor_of(h) if hooked(self.activation) else h)
        if self.upsample == 2:
            h = F.interpolate(h, scale_factor=2.0)
        if hooked(self.conv):
            return tensor_of(h)
        h = Deferred.of(h) if may_defer(h) else h
        return h.for_epilogue() if isinstance(h, Deferred) else h

    def extra_repr(self) -> str:
        return ", ".join(f"{name}=2" for name in ("upsample", "pool") if getattr(self, name) == 2)
