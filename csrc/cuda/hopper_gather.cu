// Instantiations and launches of the gather kernel for sm_90a, which this file is compiled for alone.
#include <cuda_runtime.h>

#include <cstring>

#include "allow_shared_memory.cuh"
#include "hopper_gather.cuh"
#include "hopper_gather.h"

namespace ddst::cuda {
namespace {

template <class Traits>
cudaError_t launch(const HopperGatherGeometry& g, const ddst_cuda_hopper_gather_arrays& a, int multiprocessors,
                   cudaStream_t stream) {
  using T = typename Traits::T;
  typename Traits::Params p{};
  if constexpr (Traits::Source::kFused) {
    p.prologue = {a.mean, a.scale, a.shift, a.norm, a.slope};
    p.activated = static_cast<const T*>(a.activated);
    p.residual_halved = a.residual_halved, p.squares = a.squares, p.factor = a.factor;
  }
  static_assert(sizeof p.input == sizeof a.input);
  std::memcpy(&p.input, &a.input, sizeof p.input), std::memcpy(&p.values, &a.values, sizeof p.values);
  p.records = a.records, p.order = a.order;
  p.bias = static_cast<const T*>(a.bias), p.residual = static_cast<const T*>(a.residual);
  p.output = static_cast<T*>(a.output), p.relu = a.relu, p.g = g;
  const auto kernel = &hopper_gather<Traits>;
  const cudaError_t status = allow_shared_memory(kernel);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = Traits::kCluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  p.clusters = g.items < multiprocessors / Traits::kCluster ? g.items : multiprocessors / Traits::kCluster;
  cudaLaunchConfig_t config{};
  config.gridDim = p.clusters * Traits::kCluster, config.blockDim = kHopperThreads;
  config.dynamicSmemBytes = g.bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <class T, bool kTransposed, int kWidth, int kCluster, int kDepth>
cudaError_t launch_patches(const HopperGatherGeometry& g, const ddst_cuda_hopper_gather_arrays& a, int multiprocessors,
                           cudaStream_t stream) {
  return a.fused ? launch<HopperGatherTraits<T, kTransposed, kWidth, kCluster, HopperFused, kDepth>>(
                       g, a, multiprocessors, stream)
                 : launch<HopperGatherTraits<T, kTransposed, kWidth, kCluster, HopperPlain, kDepth>>(
                       g, a, multiprocessors, stream);
}

template <class T, bool kTransposed, int kCluster>
cudaError_t launch_form(const GatherForm& form, const HopperGatherGeometry& g, const ddst_cuda_hopper_gather_arrays& a,
                        int multiprocessors, cudaStream_t stream) {
  if (form.granules == 4) return launch_patches<T, kTransposed, 4, kCluster, 1>(g, a, multiprocessors, stream);
  if (form.im2col)
    return launch<HopperGatherTraits<T, kTransposed, 1, kCluster, HopperPlain, 1, true>>(g, a, multiprocessors, stream);
  return form.depth == 2 ? launch_patches<T, kTransposed, 1, kCluster, 2>(g, a, multiprocessors, stream)
                         : launch_patches<T, kTransposed, 1, kCluster, 1>(g, a, multiprocessors, stream);
}

template <class T, bool kTransposed>
cudaError_t launch_cluster(const GatherForm& form, const HopperGatherGeometry& g,
                           const ddst_cuda_hopper_gather_arrays& a, int multiprocessors, cudaStream_t stream) {
  return form.cluster == 2 ? launch_form<T, kTransposed, 2>(form, g, a, multiprocessors, stream)
                           : launch_form<T, kTransposed, 1>(form, g, a, multiprocessors, stream);
}

template <class T>
cudaError_t launch_direction(bool input_gradient, const GatherForm& form, const HopperGatherGeometry& g,
                             const ddst_cuda_hopper_gather_arrays& a, int multiprocessors, cudaStream_t stream) {
  return input_gradient ? launch_cluster<T, true>(form, g, a, multiprocessors, stream)
                        : launch_cluster<T, false>(form, g, a, multiprocessors, stream);
}

}  // namespace
}  // namespace ddst::cuda

int ddst_cuda_hopper_gather(int dtype, bool input_gradient, const ddst::cuda::GatherForm* form,
                            const ddst::cuda::HopperGatherGeometry* geometry,
                            const ddst_cuda_hopper_gather_arrays* arrays, int multiprocessors, void* stream) {
  using namespace ddst;
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == DDST_CUDA_BFLOAT16)
    return cuda::launch_direction<dev::bf16>(input_gradient, *form, *geometry, *arrays, multiprocessors, on);
  if (dtype == DDST_CUDA_FLOAT16)
    return cuda::launch_direction<dev::fp16>(input_gradient, *form, *geometry, *arrays, multiprocessors, on);
  return cudaErrorInvalidValue;
}
