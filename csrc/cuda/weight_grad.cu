// Instantiations and launches of the weight gradient.
#include <cuda_runtime.h>

#include <algorithm>

#include "allow_shared_memory.cuh"
#include "weight_grad.cuh"
#include "weight_grad.h"

namespace ddst::cuda {
namespace {

template <class T, class U>
cudaError_t launch_reduce(const WeightGradParams<T>& p, cudaStream_t stream) {
  weight_grad_reduce<T, U><<<dim3(p.shape.groups, kAccumulators / 4), kWeightGradThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class Number, class U, class Params>
cudaError_t launch_kernels(void (*kernel)(Params), const Params& p, cudaStream_t stream) {
  const int shared_bytes = static_cast<int>(p.sizes.shared_bytes);
  const cudaError_t status = allow_shared_memory(kernel);
  if (status != cudaSuccess) return status;
  kernel<<<dim3(p.shape.groups, p.shape.shares), kWeightGradThreads, shared_bytes, stream>>>(p);
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess) return launched;
  return launch_reduce<stored_t<Number>, U>(p, stream);
}

template <class Number, class U>
cudaError_t launch_half(const WeightGradParams<stored_t<Number>>& plain, const ddst_cuda_weight_grad_arrays& a,
                        cudaStream_t stream) {
  if (!a.fused)
    return launch_kernels<Number, U, const WeightGradParams<stored_t<Number>>>(&weight_grad<Number, U>, plain, stream);
  FusedWeightGradParams<stored_t<Number>> p{};
  static_cast<WeightGradParams<stored_t<Number>>&>(p) = plain;
  p.prologue = {a.mean, a.scale, a.shift, a.norm, a.slope};
  p.x_halved = a.x_halved, p.gy_halved = a.gy_halved;
  return launch_kernels<Number, U, const FusedWeightGradParams<stored_t<Number>>>(&fused_weight_grad<Number, U>, p,
                                                                                  stream);
}

template <class T>
WeightGradParams<T> params(const WeightGradShape& shape, const ddst_cuda_weight_grad_arrays& arrays) {
  return {static_cast<const T*>(arrays.grad_output),
          static_cast<const T*>(arrays.input),
          arrays.block_row,
          arrays.block_col,
          arrays.block_tap,
          arrays.units,
          arrays.partials,
          static_cast<T*>(arrays.values_grad),
          shape,
          weight_grad_sizes(shape, sizeof(T))};
}

template <class T>
cudaError_t reduce_unit(const WeightGradShape& shape, const ddst_cuda_weight_grad_arrays& arrays, cudaStream_t stream) {
  const auto p = params<T>(shape, arrays);
  if (p.sizes.unit_rows == 16) return launch_reduce<T, Unit<16, 16>>(p, stream);
  if (p.sizes.unit_cols == 16) return launch_reduce<T, Unit<32, 16>>(p, stream);
  return launch_reduce<T, Unit<32, 32>>(p, stream);
}

template <class Number>
cudaError_t launch_unit(const WeightGradShape& shape, const ddst_cuda_weight_grad_arrays& arrays, cudaStream_t stream) {
  const auto p = params<stored_t<Number>>(shape, arrays);
  if (p.sizes.unit_rows == 16) return launch_half<Number, Unit<16, 16>>(p, arrays, stream);
  if (p.sizes.unit_cols == 16) return launch_half<Number, Unit<32, 16>>(p, arrays, stream);
  return launch_half<Number, Unit<32, 32>>(p, arrays, stream);
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
    case DDST_CUDA_FLOAT32:
      return cuda::launch_unit<cuda::tf32x3>(*shape, *arrays, on);
  }
  return cudaErrorInvalidValue;
}

int ddst_cuda_weight_grad_reduce(int dtype, const ddst::cuda::WeightGradShape* shape, int merged,
                                 const ddst_cuda_weight_grad_arrays* arrays, void* stream) {
  using namespace ddst;
  cuda::WeightGradShape apart = *shape;
  apart.groups *= merged;
  if (apart.groups == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DDST_CUDA_BFLOAT16:
      return cuda::reduce_unit<dev::bf16>(apart, *arrays, on);
    case DDST_CUDA_FLOAT16:
      return cuda::reduce_unit<dev::fp16>(apart, *arrays, on);
    case DDST_CUDA_TFLOAT32:
    case DDST_CUDA_FLOAT32:
      return cuda::reduce_unit<float>(apart, *arrays, on);
  }
  return cudaErrorInvalidValue;
}
