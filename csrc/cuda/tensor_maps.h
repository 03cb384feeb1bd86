// Tensor maps for kernels, encoded by the driver. No CUDA headers.
#pragma once
#include "tensor_map.hpp"

namespace ddst::cuda {

// CUtensorMap: what a kernel takes as a __grid_constant__ parameter.
struct alignas(128) EncodedTensorMap {
  std::uint64_t words[16];
};

}  // namespace ddst::cuda

// Returns a cudaError_t: cudaErrorNotSupported where the driver knows no tensor maps, else what the driver says of a
// map that tensor_map_error has nothing against. Cached; the current context is that of the device that will read the
// map. Does no work on the device, so that it may be called while a stream is captured.
extern "C" int ddst_cuda_tensor_map(const ddst::cuda::TensorMap* map, ddst::cuda::EncodedTensorMap* encoded);
