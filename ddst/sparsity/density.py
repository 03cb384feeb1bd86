"""How many weights of a network are active."""

from __future__ import annotations

from torch import Tensor, nn

from ddst.convert import find_weights
from ddst.nn import SparseLayer, sparse_layers
from ddst.topology import mask_of_slots, mask_sizes


class NetworkDensity:
    """``d = active weights / weights`` over every weight of a model, as ``model_density`` of a report.

    Weights that :func:`ddst.sparsify` left dense, of any kind of layer or module, count as they are: all are active
    (:func:`~ddst.convert.find_weights` says what is a weight). Biases, normalisation layers and embeddings do
    not count; neither do the parts of edge blocks that lie outside their weight.

    For a network of convolution and linear layers, such as the paper's, this is the paper's density: that of all
    weights which may be sparse. Where a network has other weights, it is larger than the density that
    :func:`ddst.sparsify` was asked for, and a change of the density by ``Δ`` is one of ``Δ`` of all weights, too.

    Args:
        model: its layers are looked up once; their masks may change afterwards.

    Attributes:
        layers: the sparse layers by name. dense_weights: of what is dense. total_weights: of all.
        sizes: per sparse layer int64 ``[R · C · T]``, weights in each block, in the order of
            :func:`ddst.sparsity.density.flat_mask`.

    Cost: none to speak of; every layer keeps count of its weights.

    >>> import ddst
    >>> model = nn.Sequential(ddst.SparseLinear(64, 64, density=0.25), nn.Linear(64, 16))
    >>> NetworkDensity(model).density
    0.4
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[str, SparseLayer] = dict(sparse_layers(model))
        self.dense_weights = sum(c.size for c in find_weights(model) if not isinstance(c.module, SparseLayer))
        self.sizes: dict[str, Tensor] = {
            name: mask_sizes(layer.weight_shape, layer.block).reshape(-1) for name, layer in self.layers.items()
        }
        self.total_weights = self.dense_weights + sum(int(size.sum()) for size in self.sizes.values())

    def layer_weights(self, name: str) -> int:
        """Active weights of a sparse layer."""
        return self.layers[name].active_weights

    @property
    def active_weights(self) -> int:
        """Active weights of all that count."""
        return self.dense_weights + sum(self.layer_weights(name) for name in self.layers)

    @property
    def density(self) -> float:
        """``d``, 0 … 1; 1.0 for a model without weights."""
        return self.active_weights / self.total_weights if self.total_weights else 1.0


def flat_mask(layer: SparseLayer) -> Tensor:
    """bool ``[R · C · T]`` on the CPU: the block mask in the order of blocks."""
    return mask_of_slots(layer.slot_blocks, (layer.num_blocks,))
