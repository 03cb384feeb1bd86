// Tensor maps by the driver's functions, which are asked for at run time: libcuda is not linked. Host code only.
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "tensor_map_cache.hpp"

namespace ddst::cuda {
namespace {

static_assert(sizeof(EncodedTensorMap) == sizeof(CUtensorMap) && alignof(EncodedTensorMap) >= alignof(CUtensorMap));

struct Driver {
  PFN_cuTensorMapEncodeTiled_v12000 tiled = nullptr;
  PFN_cuTensorMapEncodeIm2col_v12000 im2col = nullptr;
};

void* entry_point(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const auto status = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
  return status == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr;
}

const Driver& driver() {
  static const Driver found{
      reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry_point("cuTensorMapEncodeTiled")),
      reinterpret_cast<PFN_cuTensorMapEncodeIm2col_v12000>(entry_point("cuTensorMapEncodeIm2col"))};
  return found;
}

// Copies only move bits, so that an integer of the element's size stands for every type.
CUtensorMapDataType data_type(int bytes) {
  return bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
         : bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
         : bytes == 4 ? CU_TENSOR_MAP_DATA_TYPE_UINT32
                      : CU_TENSOR_MAP_DATA_TYPE_UINT64;
}

CUtensorMapSwizzle swizzle(int bytes) {
  return bytes == kSwizzle32    ? CU_TENSOR_MAP_SWIZZLE_32B
         : bytes == kSwizzle64  ? CU_TENSOR_MAP_SWIZZLE_64B
         : bytes == kSwizzle128 ? CU_TENSOR_MAP_SWIZZLE_128B
                                : CU_TENSOR_MAP_SWIZZLE_NONE;
}

// CUresult and cudaError_t number these errors alike.
int encode(const TensorMap& map, EncodedTensorMap& encoded) {
  if (driver().tiled == nullptr || driver().im2col == nullptr) return cudaErrorNotSupported;
  cuuint64_t sizes[kMapDims], strides[kMapDims - 1];
  cuuint32_t steps[kMapDims], box[kMapDims];
  for (int i = 0; i < map.rank; ++i) {
    sizes[i] = cuuint64_t(map.sizes[i]), steps[i] = cuuint32_t(map.steps[i]), box[i] = cuuint32_t(map.box[i]);
    if (i > 0) strides[i - 1] = cuuint64_t(map.strides[i]);
  }
  // Slices of few channels are read one after another: what L2 fetches for one serves the next.
  constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  constexpr auto kFill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;  // zeros
  constexpr auto kInterleave = CU_TENSOR_MAP_INTERLEAVE_NONE;
  CUtensorMap made;
  void* const base = const_cast<void*>(map.base);
  const CUresult status =
      map.im2col
          ? driver().im2col(&made, data_type(map.element_bytes), map.rank, base, sizes, strides, map.lower, map.upper,
                            map.channels, map.pixels, steps, kInterleave, swizzle(map.swizzle), kPromotion, kFill)
          : driver().tiled(&made, data_type(map.element_bytes), map.rank, base, sizes, strides, box, steps, kInterleave,
                           swizzle(map.swizzle), kPromotion, kFill);
  if (status == CUDA_SUCCESS) std::memcpy(&encoded, &made, sizeof encoded);
  return int(status);
}

constexpr std::size_t kCapacity = 2048;  // about a megabyte; a training step of a large GAN asks for some hundreds

}  // namespace
}  // namespace ddst::cuda

int ddst_cuda_tensor_map(const ddst::cuda::TensorMap* map, ddst::cuda::EncodedTensorMap* encoded) {
  using namespace ddst::cuda;
  if (!tensor_map_error(*map).empty()) return cudaErrorInvalidValue;
  static TensorMapCache cache(&encode, kCapacity);
  return cache.get(*map, *encoded);
}
