"""From a dense model to a sparse one and back: which layers are swapped, at which density, and what that gains."""

from .advice_report import Advice
from .advise import advise
from .candidates import find_candidates
from .densify import dense_state_dict, densify
from .fuse import fuse, unfuse
from .fuse_report import FusedConv, FuseReport
from .report import LayerReport, SparsifyReport
from .swap import sparsify
from .weights import find_weights

__all__ = [
    "Advice",
    "FuseReport",
    "FusedConv",
    "LayerReport",
    "SparsifyReport",
    "advise",
    "dense_state_dict",
    "densify",
    "find_candidates",
    "find_weights",
    "fuse",
    "sparsify",
    "unfuse",
]
