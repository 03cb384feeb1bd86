// Instantiations and launches of the gather kernel.
#include <cuda_runtime.h>

#include "allow_shared_memory.cuh"
#include "conv2d_gather.cuh"
#include "conv2d_gather.h"

namespace ddst::cuda {
namespace {

template <class T>
GatherParams<T> parameters(const GatherGeometry& g, const GatherTile& tile, const ddst_cuda_gather_arrays& a) {
  return {
      static_cast<const T*>(a.input),        static_cast<const T*>(a.values), a.records, static_cast<const T*>(a.bias),
      static_cast<const T*>(a.residual),     static_cast<T*>(a.output),       a.relu,    g,
      gather_layout(g, tile, int(sizeof(T)))};
}

template <class Traits>
cudaError_t launch(const typename Traits::Params& p, cudaStream_t stream) {
  const auto kernel = &conv2d_gather<Traits>;
  const cudaError_t status = allow_shared_memory(kernel);
  if (status != cudaSuccess) return status;
  kernel<<<gather_blocks(p.g), Traits::kThreads, p.layout.bytes, stream>>>(p);
  return cudaGetLastError();
}

template <class Number, bool kTransposed, bool kLarge>
cudaError_t launch_source(const GatherGeometry& g, const ddst_cuda_gather_arrays& a, cudaStream_t stream) {
  using T = stored_t<Number>;
  const GatherParams<T> plain = parameters<T>(g, gather_tile(kLarge, sizeof(T)), a);
  if (!a.fused) return launch<GatherTraits<Number, kTransposed, kLarge, PlainSource>>(plain, stream);
  FusedGatherParams<T> p{};
  static_cast<GatherParams<T>&>(p) = plain;
  p.prologue = {a.mean, a.scale, a.shift, a.norm, a.slope};
  p.activated = static_cast<const T*>(a.activated);
  p.halved = a.halved, p.residual_halved = a.residual_halved;
  p.squares = a.squares, p.factor = a.factor;
  return launch<GatherTraits<Number, kTransposed, kLarge, FusedSource>>(p, stream);
}

template <class Number, bool kLarge>
cudaError_t launch_direction(bool input_gradient, const GatherGeometry& g, const ddst_cuda_gather_arrays& a,
                             cudaStream_t stream) {
  return input_gradient ? launch_source<Number, true, kLarge>(g, a, stream)
                        : launch_source<Number, false, kLarge>(g, a, stream);
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
