"""Layers of every kind of convolution beside 2-D ones without groups, each with torch's of the same weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ddst
from helpers.layers import weight_of

#: Name of the class -> settings. Sizes follow from `sizes`.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ConvTranspose2d": [
        {"kernel_size": 3},
        {"kernel_size": 4, "stride": 2, "padding": 1},
        {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2), "bias": False},
        {"kernel_size": 3, "dilation": 2, "padding": 2},
        {"kernel_size": 3, "dilation": (3, 4), "output_padding": (2, 3), "stride": (1, 2)},  # beyond a whole stride
        {"kernel_size": (1, 5), "padding": (0, 3)},
        {"kernel_size": 1, "stride": 2, "output_padding": 1},
        {"kernel_size": 2, "stride": 3},  # a stride that leaves gaps
        {"kernel_size": 5, "stride": 2, "padding": 4},  # padding that cuts off more than a tap
    ],
    "Conv1d": [
        {"kernel_size": 3},
        {"kernel_size": 7, "padding": 9, "dilation": 3},
        {"kernel_size": (4,), "stride": (2,), "padding": (1,), "bias": False},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 5, "padding": "valid"},
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2},
        {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    ],
    "ConvTranspose1d": [
        {"kernel_size": 3},
        {"kernel_size": 16, "stride": 8, "padding": 4},
        {"kernel_size": (4,), "stride": (3,), "padding": (2,), "output_padding": (2,), "bias": False},
        {"kernel_size": 3, "dilation": 3, "output_padding": 2},
        {"kernel_size": 1},
    ],
}
SETTINGS["Conv2d"] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "bias": False},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
    {"kernel_size": 1},
]

#: Every setting of the kinds that are new, and of all kinds with groups: (name of the class, number, groups).
UNGROUPED = [(name, i, 1) for name in SETTINGS if name != "Conv2d" for i in range(len(SETTINGS[name]))]
GROUPED = [(name, i, 2 + i // 2 % 2) for name in SETTINGS for i in range(0, len(SETTINGS[name]), 2)]
Which = tuple[str, int, int]


def make_sparse(which: Which, block: Any = None, density: float = 0.5, **options: Any) -> Any:
    """A sparse layer: ragged channels without groups, blocks that divide those of a group otherwise."""
    name, number, groups = which
    sizes = (18, 20) if groups == 1 else (8 * groups, 4 * groups)
    cls = getattr(ddst, f"Sparse{name}")
    block = block or ((8, 3) if groups == 1 else (4, 2))
    return cls(*sizes, **SETTINGS[name][number], groups=groups, density=density, block=block, **options)


def dense_of(layer: Any) -> Any:
    """torch's layer of the same settings and weight, filled in by hand."""
    cls = getattr(nn, type(layer).__name__.removeprefix("Sparse"))
    names = ["stride", "padding", "dilation", "groups", "padding_mode"]
    names += ["output_padding"] * ("Transpose" in cls.__name__)
    settings = {name: getattr(layer, name) for name in names}
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
    dense = cls(*sizes, bias=layer.bias is not None, dtype=layer.values.dtype, **settings)
    with torch.no_grad():
        dense.weight.copy_(weight_of(layer))
        if dense.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense


def input_of(layer: Any, batch: int = 2, size: int = 6, dtype: torch.dtype | None = None) -> Tensor:
    """An input for a layer."""
    space = (size,) if "1d" in type(layer).__name__ else (size, size + 1)
    return torch.randn(batch, layer.in_channels, *space, dtype=dtype or layer.values.dtype)
