"""How many weights of a network are active."""

from __future__ import annotations

from torch import Tensor, nn

from ddst.convert import find_candidates
from ddst.nn import SparseLayer, sparse_layers
from ddst.topology import mask_of_slots, mask_sizes


class NetworkDensity:
    """``d = active weights / weights`` over all convolution and linear layers of a model.

    Layers that :func:`ddst.sparsify` left dense count as they are: all their weights are active. Biases, normalisation
    layers and embeddings do not count; neither do the parts of edge blocks that lie outside their weight.

    Args:
        model: its layers are looked up once; their masks may change afterwards.

    Attributes:
        layers: the sparse layers by name. dense_weights: of the layers that are dense. total_weights: of all.
        sizes: per sparse layer int64 ``[R · C · T]``, weights in each block, in the order of :func:`flat_mask`.

    Cost: none to speak of; every layer keeps count of its weights.

    >>> import ddst
    >>> model = nn.Sequential(ddst.SparseLinear(64, 64, density=0.25), nn.Linear(64, 16))
    >>> NetworkDensity(model).density
    0.4
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[str, SparseLayer] = dict(sparse_layers(model))
        self.dense_weights = sum(c.size for c in find_candidates(model) if c.counted)
        self.sizes: dict[str, Tensor] = {
            name: mask_sizes(layer.weight_shape, layer.block).reshape(-1) for name, layer in self.layers.items()
        }
        self.total_weights = self.dense_weights + sum(int(size.sum()) for size in self.sizes.values())

    def layer_weights(self, name: str) -> int:
        """Active weights of a sparse layer."""
        return self.layers[name].active_weights

    @property
    def active_weights(self) -> int:
        """Active weights of all layers that count."""
        return self.dense_weights + sum(self.layer_weights(name) for name in self.layers)

    @property
    def density(self) -> float:
        """``d``, 0 … 1; 1.0 for a model without such layers."""
        return self.active_weights / self.total_weights if self.total_weights else 1.0


def flat_mask(layer: SparseLayer) -> Tensor:
    """bool ``[R · C · T]`` on the CPU: the block mask in the order of blocks."""
    return mask_of_slots(layer.slot_blocks, (layer.num_blocks,))
