"""What runs on CUDA devices: the operators' kernels there, and the choice between Triton and CUDA C++.

``dispatch`` and ``half_block`` serve the operators. Triton's kernels are the package ``ddst.kernels``; those in CUDA
C++ are called by ``compiled`` (``gather``, ``fused`` and ``weight_grad`` make their lists). ``preferred`` holds where
the latter were the fastest.
"""
