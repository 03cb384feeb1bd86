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

template <class T>
cudaError_t launch_traits(bool input_gradient, bool large, const GatherGeometry& g, const ddst_cuda_gather_arrays& a,
                          cudaStream_t stream) {
  if (input_gradient)
    return large ? launch<GatherTraits<T, true, true, PlainSource>>(g, a, stream)
                 : launch<GatherTraits<T, true, false, PlainSource>>(g, a, stream);
  return large ? launch<GatherTraits<T, false, true, PlainSource>>(g, a, stream)
               : launch<GatherTraits<T, false, false, PlainSource>>(g, a, stream);
}

}  // namespace
}  // namespace ddst::cuda

int ddst_cuda_conv2d_gather(int dtype, bool input_gradient, bool large_tile, const ddst::cuda::GatherGeometry* geometry,
                            const ddst_cuda_gather_arrays* arrays, void* stream) {
  using namespace ddst;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DDST_CUDA_BFLOAT16:
      return cuda::launch_traits<dev::bf16>(input_gradient, large_tile, *geometry, *arrays, on);
    case DDST_CUDA_FLOAT16:
      return cuda::launch_traits<dev::fp16>(input_gradient, large_tile, *geometry, *arrays, on);
    case DDST_CUDA_TFLOAT32:
      return cuda::launch_traits<float>(input_gradient, large_tile, *geometry, *arrays, on);
  }
  return cudaErrorInvalidValue;
}
