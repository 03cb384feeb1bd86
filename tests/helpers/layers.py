"""What a sparse layer holds, read off its values and slots by the oracle of helpers/dense.py."""

from __future__ import annotations

from torch import Tensor, nn

from helpers.dense import unpack_blocks


def weight_of(layer: nn.Module) -> Tensor:
    """The dense weight of a layer's raw values, differentiable."""
    return unpack_blocks(layer.values, layer.slot_blocks, layer.weight_shape)


def block_map(layer: nn.Module) -> dict[int, int]:
    """The slot of every active block."""
    return {rank: slot for slot, rank in enumerate(layer.slot_blocks.tolist()) if rank >= 0}
