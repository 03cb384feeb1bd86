"""Layers of BigGAN: two spectral norms, attention.

``norm="torch"`` puts torch's spectral norm on plain layers. ``norm="own"`` is how many BigGAN programs do it: layer
classes of their own whose forward divides the weight by a singular value that they estimate themselves.

Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks, ICLR 2018; Zhang et al.,
Self-Attention Generative Adversarial Networks, ICML 2019.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


class _Normalised(nn.Module):
    """``W / σ``, σ by one step of power iteration on the weight's rows. A mixin: `weight` is the layer's."""

    weight: Tensor
    u: Tensor

    def W_(self) -> Tensor:
        matrix = self.weight.view(self.weight.size(0), -1)
        with torch.no_grad():
            v = F.normalize(torch.matmul(self.u, matrix))
            u = F.normalize(torch.matmul(v, matrix.t()))
            if self.training:
                self.u.copy_(u)
        sigma = torch.matmul(torch.matmul(v, matrix.t()), u.t()).squeeze()
        return self.weight / sigma


class NormalisedConv2d(nn.Conv2d, _Normalised):
    """:class:`torch.nn.Conv2d` of ``W / σ``.

    >>> tuple(NormalisedConv2d(4, 8, 3, padding=1)(torch.zeros(1, 4, 5, 5)).shape)
    (1, 8, 5, 5)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("u", torch.randn(1, self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.W_(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class NormalisedLinear(nn.Linear, _Normalised):
    """:class:`torch.nn.Linear` of ``W / σ``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("u", torch.randn(1, self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W_(), self.bias)


class Make:
    """Makes the layers of one `norm`, started orthogonally."""

    def __init__(self, norm: str) -> None:
        if norm not in ("torch", "own"):
            raise ValueError(f"norm must be 'torch' or 'own', got {norm!r}")
        self.own = norm == "own"

    def conv(self, c_in: int, c_out: int, side: int = 3, bias: bool = True) -> nn.Module:
        return self._started((NormalisedConv2d if self.own else nn.Conv2d)(c_in, c_out, side, 1, side // 2, bias=bias))

    def linear(self, c_in: int, c_out: int, bias: bool = True) -> nn.Module:
        return self._started((NormalisedLinear if self.own else nn.Linear)(c_in, c_out, bias=bias))

    def _started(self, layer: nn.Conv2d | nn.Linear) -> nn.Module:
        nn.init.orthogonal_(layer.weight)
        return layer if self.own else spectral_norm(layer)


class Attention(nn.Module):
    """``x + γ · O(V(x) · softmax(Q(x)ᵀ K(x)))`` over pixels, keys and values pooled, γ from 0."""

    def __init__(self, c: int, make: Make) -> None:
        super().__init__()
        self.query, self.key = make.conv(c, c // 8, 1, bias=False), make.conv(c, c // 8, 1, bias=False)
        self.value, self.out = make.conv(c, c // 2, 1, bias=False), make.conv(c // 2, c, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        key, value = (F.max_pool2d(layer(x), 2).flatten(2) for layer in (self.key, self.value))
        weights = torch.bmm(self.query(x).flatten(2).transpose(1, 2), key).softmax(-1)
        mixed = torch.bmm(value, weights.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.gamma * self.out(mixed)
