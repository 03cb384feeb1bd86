"""ddst: sparse training that is really sparse.

Block-sparse convolution and linear layers whose time and memory fall with density, and DDST, which moves their blocks
while a GAN trains.
"""

from importlib.metadata import PackageNotFoundError, version

from . import _extension

_extension.load()  # before anything that registers derivatives of the compiled operators

from . import distributed as distributed  # noqa: E402
from . import functional as functional  # noqa: E402
from ._extension import build_info  # noqa: E402
from .captured_step import capture  # noqa: E402
from .convert import advise, dense_state_dict, densify, fuse, sparsify, unfuse  # noqa: E402
from .distributed import synchronize, watch  # noqa: E402
from .freed_memory import keep_freed_memory  # noqa: E402
from .gan import DDST, EMA, BalanceRatio, DensityController  # noqa: E402
from .nn import (  # noqa: E402
    SparseConv1d,
    SparseConv2d,
    SparseConvTranspose1d,
    SparseConvTranspose2d,
    SparseLinear,
    explain,
    follow,
    named_weights,
)
from .runs import load_generator  # noqa: E402
from .sparsity import SparseTraining, carry_state  # noqa: E402

try:
    __version__ = version("ddst")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

__all__ = [
    "DDST",
    "EMA",
    "BalanceRatio",
    "DensityController",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConvTranspose1d",
    "SparseConvTranspose2d",
    "SparseLinear",
    "SparseTraining",
    "__version__",
    "advise",
    "build_info",
    "capture",
    "carry_state",
    "dense_state_dict",
    "densify",
    "explain",
    "follow",
    "fuse",
    "keep_freed_memory",
    "load_generator",
    "named_weights",
    "sparsify",
    "synchronize",
    "unfuse",
    "watch",
]
