// Dynamic shared memory beyond the 48 KiB that every kernel may have.
#pragma once
#include <cuda_runtime.h>

namespace ddst::cuda {

// The kernel may have all that the current device can give it. The setting is one for all launches, so it does not
// depend on the launch: a thread of the host that launches with less would take memory away from another one's launch.
template <class... Arguments>
cudaError_t allow_shared_memory(void (*kernel)(Arguments...)) {
  int device = 0, most = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  return status;
}

}  // namespace ddst::cuda
