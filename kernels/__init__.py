"""Triton kernels of the block-sparse operators on CUDA devices; installed as ``ddst.kernels``.

One function per registered operator, with its arguments (:mod:`ddst.ops` has the checked, differentiable ones).
"""

if __name__ != "ddst.kernels":  # another project's package of the name "kernels" exists
    raise ImportError(f"these are the kernels of ddst: import ddst.kernels, not {__name__}")
