"""Block-sparse operators on packed weights: functions that are differentiable any number of times."""

from . import device as device  # serves the operators on CUDA devices
from . import flops as flops  # for torch.utils.flop_counter
from .conv2d import conv2d, conv2d_block_scores
from .linear import linear, linear_block_scores

__all__ = ["conv2d", "conv2d_block_scores", "linear", "linear_block_scores"]
