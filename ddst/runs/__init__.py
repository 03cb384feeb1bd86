"""What is done with a run once there is a checkpoint: its generator loaded, exported, and more."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def load_generator(path: str | PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """The averaged generator of a run, in eval mode; see :func:`ddst.train.generator.load_generator`.

    Raises:
        ModuleNotFoundError: safetensors is missing, which the layers do without: ``pip install 'ddst[train]'``.
    """
    from ddst.train.generator import load_generator as load

    return load(path, device)
