"""Block-sparse layers with the interface of ``torch.nn``."""

from .base import SparseLayer, set_backend, sparse_layers
from .conv1d import SparseConv1d
from .conv2d import SparseConv2d
from .conv_transpose1d import SparseConvTranspose1d
from .conv_transpose2d import SparseConvTranspose2d
from .deferred import functions as functions  # puts what torch's functions do into a table
from .explain import Explanation, explain
from .linear import SparseLinear
from .named_weights import named_weights
from .norm_act_conv2d import NormActConv2d
from .origin import follow
from .packed import factors as factors  # each puts its functions into the table
from .packed import gradients as gradients
from .packed import products as products
from .packed import sums as sums
from .packed import views as views
from .packed.parameter import PackedParameter
from .packed.weight import PackedWeight
from .spectral_norm import SpectralNorm, spectral_norm
from .weight_norm import WeightNorm, remove_weight_norm, weight_norm

__all__ = [
    "Explanation",
    "NormActConv2d",
    "PackedParameter",
    "PackedWeight",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConvTranspose1d",
    "SparseConvTranspose2d",
    "SparseLayer",
    "SparseLinear",
    "SpectralNorm",
    "WeightNorm",
    "explain",
    "follow",
    "named_weights",
    "remove_weight_norm",
    "set_backend",
    "sparse_layers",
    "spectral_norm",
    "weight_norm",
]
