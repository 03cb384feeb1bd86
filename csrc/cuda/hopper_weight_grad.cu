// Instantiations and launches of the weight gradient on sm_90a, the only architecture that this file is compiled for.
#include <cuda_runtime.h>

#include <cstring>

#include "allow_shared_memory.cuh"
#include "hopper_weight_grad.cuh"
#include "hopper_weight_grad.h"
#include "tensor_maps.h"

namespace ddst::cuda {
namespace {

cudaError_t encode(const TensorMap& map, dev::TensorMap& to) {
  EncodedTensorMap encoded;
  const int status = ddst_cuda_tensor_map(&map, &encoded);
  static_assert(sizeof encoded == sizeof to);
  if (status == 0) std::memcpy(&to, &encoded, sizeof to);
  return cudaError_t(status);
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), Params p, cudaStream_t stream) {
  const cudaError_t status = allow_shared_memory(kernel);
  if (status != cudaSuccess) return status;
  kernel<<<dim3(p.shape.groups, p.shape.shares), kHopperGradThreads, p.sizes.shared_bytes, stream>>>(p);
  return cudaGetLastError();
}

template <class T, class U>
cudaError_t launch_unit(const WeightGradShape& shape, const ddst_cuda_weight_grad_arrays& a, cudaStream_t stream) {
  HopperFusedWeightGradParams<T> p{};
  p.block_row = a.block_row, p.block_col = a.block_col, p.block_tap = a.block_tap, p.units = a.units;
  p.partials = a.partials;
  p.shape = shape, p.sizes = hopper_weight_grad_sizes(shape, a.fused);
  p.prologue = {a.mean, a.scale, a.shift, a.norm, a.slope};
  cudaError_t status = encode(hopper_grad_map(a.grad_output, shape, p.sizes), p.gy_map);
  if (status == cudaSuccess) status = encode(hopper_input_map(a.input, shape, p.sizes), p.x_map);
  if (status != cudaSuccess) return status;
  return a.fused ? launch(&hopper_fused_weight_grad<T, U>, p, stream)
                 : launch<HopperWeightGradParams<T>>(&hopper_weight_grad<T, U>, p, stream);
}

template <class T>
cudaError_t launch_dtype(const WeightGradShape& s, const ddst_cuda_weight_grad_arrays& arrays, cudaStream_t stream) {
  if (weight_grad_unit_rows(s) == 16) return launch_unit<T, Unit<16, 16>>(s, arrays, stream);
  if (weight_grad_unit_cols(s) == 16) return launch_unit<T, Unit<32, 16>>(s, arrays, stream);
  return launch_unit<T, Unit<32, 32>>(s, arrays, stream);
}

}  // namespace
}  // namespace ddst::cuda

int ddst_cuda_hopper_weight_grad(int dtype, const ddst::cuda::WeightGradShape* shape,
                                 const ddst_cuda_weight_grad_arrays* arrays, void* stream) {
  using namespace ddst;
  if (shape->groups == 0) return cudaSuccess;
  if (dtype != DDST_CUDA_BFLOAT16 && dtype != DDST_CUDA_FLOAT16) return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t status = dtype == DDST_CUDA_BFLOAT16 ? cuda::launch_dtype<dev::bf16>(*shape, *arrays, on)
                                                         : cuda::launch_dtype<dev::fp16>(*shape, *arrays, on);
  if (status != cudaSuccess) return status;
  return ddst_cuda_weight_grad_reduce(dtype, shape, cuda::kHopperWarps / cuda::kWeightGradWarps, arrays, stream);
}
