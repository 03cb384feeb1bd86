# Cross-compiles libddst.so for Arm Linux, with Debian's g++-aarch64-linux-gnu or another of that name:
#   cmake -S . -B build/cmake-linux-aarch64 -G Ninja --toolchain cmake/aarch64-linux-gnu.cmake \
#     -DDDST_TORCH_INCLUDE=.venv/lib/python3.11/site-packages/torch/include -DDDST_BUILD_CUDA=OFF
#   cmake --build build/cmake-linux-aarch64 --target ddst
# torch's headers are the same for every processor, and its library is not linked.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
