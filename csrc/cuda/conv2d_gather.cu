// Instantiations of the gather kernel and its C interface.
#include <cuda_runtime.h>

#include "conv2d_gather.cuh"

namespace ddst::cuda {
namespace {

template <class Traits>
const char* launch(const GatherGeometry& g, const ddst_cuda_conv2d_gather_arguments& a, cudaStream_t stream) {
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
  auto status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.layout.bytes);
  if (status == cudaSuccess) {
    kernel<<<g.tiles * g.phases_y * g.phases_x * g.groups, Traits::kThreads, p.layout.bytes, stream>>>(p);
    status = cudaGetLastError();
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template <class T, bool kTransposed>
const char* with_tile(const GatherGeometry& g, const ddst_cuda_conv2d_gather_arguments& a, cudaStream_t stream) {
  return a.large_tile ? launch<GatherTraits<T, kTransposed, true, PlainSource>>(g, a, stream)
                      : launch<GatherTraits<T, kTransposed, false, PlainSource>>(g, a, stream);
}

template <class T>
const char* with_direction(const GatherGeometry& g, const ddst_cuda_conv2d_gather_arguments& a, cudaStream_t stream) {
  return a.input_gradient ? with_tile<T, true>(g, a, stream) : with_tile<T, false>(g, a, stream);
}

}  // namespace
}  // namespace ddst::cuda

extern "C" const char* ddst_cuda_conv2d_gather(const ddst_cuda_conv2d_problem* problem,
                                               const ddst_cuda_conv2d_gather_arguments* arguments, void* stream) {
  using namespace ddst;
  int device = 0, shared_limit = 0;
  auto status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  cuda::GatherGeometry g;
  const auto tile = cuda::gather_tile(arguments->large_tile, problem->dtype == DDST_CUDA_TFLOAT32 ? 4 : 2);
  if (const char* why = cuda::gather_geometry(*problem, arguments->input_gradient, tile, shared_limit, g)) return why;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (problem->dtype) {
    case DDST_CUDA_BFLOAT16:
      return cuda::with_direction<dev::bf16>(g, *arguments, queue);
    case DDST_CUDA_FLOAT16:
      return cuda::with_direction<dev::fp16>(g, *arguments, queue);
    default:
      return cuda::with_direction<float>(g, *arguments, queue);
  }
}
