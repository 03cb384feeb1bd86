"""What generators and discriminators are called with: noise and classes, refused by name where they do not fit."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_noise(z: Tensor, latent: int) -> None:
    """Raises ValueError unless `z` is `[N, latent]`; torch.fx and torch.jit.trace, whose shapes are traced, pass."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]  # documented, and torch.compile knows it
    if isinstance(z, Tensor) and not tracing and tuple(z.shape[1:]) != (latent,):
        raise ValueError(f"z must be noise [N, {latent}], got {list(z.shape)}")


def embedded(embed: nn.Embedding, y: Tensor) -> Tensor:
    """`embed(y)`; on the CPU raises ValueError for classes that there are not, which CUDA asserts itself."""
    try:
        return embed(y)
    except IndexError:
        most, got = embed.num_embeddings - 1, f"{int(y.min())} to {int(y.max())}"
        raise ValueError(f"y must be classes from 0 to {most}, got {got}") from None
