// Instantiations and launches of the weight gradient.
#include <cuda_runtime.h>

#include <algorithm>

#include "weight_grad.cuh"
#include "weight_grad.h"

namespace ddst::cuda {
namespace {

template <class T, class U>
cudaError_t launch_kernels(const WeightGradParams<T>& p, cudaStream_t stream) {
  const auto kernel = &weight_grad<T, U>;
  const int shared_bytes = static_cast<int>(p.sizes.shared_bytes);
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  kernel<<<dim3(p.shape.groups, p.shape.shares), kWeightGradThreads, shared_bytes, stream>>>(p);
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess) return launched;
  weight_grad_reduce<T, U><<<dim3(p.shape.groups, kAccumulators / 4), kWeightGradThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_unit(const WeightGradShape& shape, const ddst_cuda_weight_grad_arrays& arrays, cudaStream_t stream) {
  const WeightGradSizes sizes = weight_grad_sizes(shape, sizeof(T));
  const WeightGradParams<T> p{static_cast<const T*>(arrays.grad_output),
                              static_cast<const T*>(arrays.input),
                              arrays.block_row,
                              arrays.block_col,
                              arrays.block_tap,
                              arrays.units,
                              arrays.partials,
                              static_cast<T*>(arrays.values_grad),
                              shape,
                              sizes};
  if (sizes.unit_rows == 16) return launch_kernels<T, Unit<16, 16>>(p, stream);
  if (sizes.unit_cols == 16) return launch_kernels<T, Unit<32, 16>>(p, stream);
  return launch_kernels<T, Unit<32, 32>>(p, stream);
}

}  // namespace
}  // namespace ddst::cuda

int ddst_cuda_weight_grad(int dtype, const ddst::cuda::WeightGradShape* shape,
                          const ddst_cuda_weight_grad_arrays* arrays, void* stream) {
  using namespace ddst;
  if (shape->groups == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DDST_CUDA_BFLOAT16:
      return cuda::launch_unit<dev::bf16>(*shape, *arrays, on);
    case DDST_CUDA_FLOAT16:
      return cuda::launch_unit<dev::fp16>(*shape, *arrays, on);
    case DDST_CUDA_TFLOAT32:
      return cuda::launch_unit<float>(*shape, *arrays, on);
  }
  return cudaErrorInvalidValue;
}
