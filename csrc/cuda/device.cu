#include <cuda_runtime.h>

#include "device.h"

const char* ddst_cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int ddst_cuda_shared_limit(int device, int* bytes) {
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

int ddst_cuda_multiprocessors(int device, int* count) {
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}
