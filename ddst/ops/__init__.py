"""Block-sparse operators on packed weights: functions that are differentiable any number of times."""

from . import cpu as cpu  # each backend registers itself
from . import flops as flops  # for torch.utils.flop_counter
from . import onnx_export as onnx_export  # for torch.onnx.export
from . import power_iteration as power_iteration  # its fake kernel
from .conv2d import conv2d, conv2d_block_scores
from .conv_transpose2d import conv_transpose2d
from .cuda import dispatch as dispatch  # and serves the operators on CUDA devices
from .cuda import half_block as half_block  # likewise
from .linear import linear, linear_block_scores, linear_transposed
from .norm_act_conv2d import Norm, channel_moments, norm_act_conv2d

__all__ = [
    "Norm",
    "channel_moments",
    "conv2d",
    "conv2d_block_scores",
    "conv_transpose2d",
    "linear",
    "linear_block_scores",
    "linear_transposed",
    "norm_act_conv2d",
]
