// Instantiations and launches of the gather kernel.
#include <cuda_runtime.h>

#include "conv2d_gather.cuh"
#include "conv2d_gather.h"

namespace ddst::cuda {
namespace {

template <class Traits>
cudaError_t launch(const GatherGeometry& g, const ddst_cuda_gather_arrays& a, cudaStream_t stream) {
  using T = typename Traits::T;
  const GatherParams<T> p{static_cast<const T*>(a.input),
                          static_cast<const T*>(a.values),
                          a.records,
                          static_cast<const T*>(a.bias),
                          static_cast<const T*>(a.residual),
                          static_cast<T*>(a.output),
                          a.relu,
                          g,
                          gather_layout(g, Traits::kTile, int(sizeof(T)))};
  const auto kernel = &conv2d_gather<Traits>;
  const auto status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.layout.bytes);
  if (status != cudaSuccess) return status;
  kernel<<<gather_blocks(g), Traits::kThreads, p.layout.bytes, stream>>>(p);
  return cudaGetLastError();
}

template <class Number, bool kLarge>
cudaError_t launch_direction(bool input_gradient, const GatherGeometry& g, const ddst_cuda_gather_arrays& a,
                             cudaStream_t stream) {
  return input_gradient ? launch<GatherTraits<Number, true, kLarge, PlainSource>>(g, a, stream)
                        : launch<GatherTraits<Number, false, kLarge, PlainSource>>(g, a, stream);
}

template <class Number>
cudaError_t launch_tile(bool input_gradient, bool large, const GatherGeometry& g, const ddst_cuda_gather_arrays& a,
                        cudaStream_t stream) {
  return large ? launch_direction<Number, true>(input_gradient, g, a, stream)
               : launch_direction<Number, false>(input_gradient, g, a, stream);
}

}  // namespace
}  // namespace ddst::cuda

int ddst_cuda_conv2d_gather(int dtype, bool input_gradient, bool large_tile, const ddst::cuda::GatherGeometry* geometry,
                            const ddst_cuda_gather_arrays* arrays, void* stream) {
  using namespace ddst;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DDST_CUDA_BFLOAT16:
      return cuda::launch_tile<dev::bf16>(input_gradient, large_tile, *geometry, *arrays, on);
    case DDST_CUDA_FLOAT16:
      return cuda::launch_tile<dev::fp16>(input_gradient, large_tile, *geometry, *arrays, on);
    case DDST_CUDA_TFLOAT32:
      return cuda::launch_tile<float>(input_gradient, large_tile, *geometry, *arrays, on);
    case DDST_CUDA_FLOAT32:
      return large_tile ? cudaErrorInvalidValue
                        : cuda::launch_direction<cuda::tf32x3, false>(input_gradient, *geometry, *arrays, on);
  }
  return cudaErrorInvalidValue;
}
