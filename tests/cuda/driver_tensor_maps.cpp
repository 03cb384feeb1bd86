// csrc/cuda/tensor_maps.cu with a driver that is made up here: which of its functions is called with what, and what the
// cache keeps. `without`: a driver that has no tensor maps.
#include <array>
#include <cstring>
#include <map>
#include <vector>

#include "check.hpp"
#include "tensor_maps.cu"

namespace {

using namespace ddst::cuda;

struct Call {
  std::string function;
  int type, rank, swizzle, promotion, interleave, fill;
  const void* base;
  std::vector<std::uint64_t> sizes, strides;
  std::vector<int> box, steps, lower, upper;
  int channels, pixels;
};
std::vector<Call> calls;
CUresult answer = CUDA_SUCCESS;
bool known = true;

void write(CUtensorMap* map) { std::memset(map, int(calls.size()), sizeof *map); }

CUresult CUDAAPI tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                       const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                       CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                       CUtensorMapFloatOOBfill fill) {
  calls.push_back({"tiled",
                   type,
                   int(rank),
                   swizzle,
                   promotion,
                   interleave,
                   fill,
                   base,
                   {sizes, sizes + rank},
                   {strides, strides + rank - 1},
                   {box, box + rank},
                   {steps, steps + rank},
                   {},
                   {},
                   0,
                   0});
  write(map);
  return answer;
}

CUresult CUDAAPI im2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                        const cuuint64_t* sizes, const cuuint64_t* strides, const int* lower, const int* upper,
                        cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* steps,
                        CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                        CUtensorMapFloatOOBfill fill) {
  calls.push_back({"im2col",
                   type,
                   int(rank),
                   swizzle,
                   promotion,
                   interleave,
                   fill,
                   base,
                   {sizes, sizes + rank},
                   {strides, strides + rank - 1},
                   {},
                   {steps, steps + rank},
                   {lower, lower + rank - 2},
                   {upper, upper + rank - 2},
                   int(channels),
                   int(pixels)});
  write(map);
  return answer;
}

alignas(128) char memory[1 << 16];

void check_calls() {
  EncodedTensorMap first{}, second{};
  const TensorMap patch = patch_map(memory, 2, 64, 32, 24, 256, {16, 34, 10, 1}, kSwizzle32);
  expect(ddst_cuda_tensor_map(&patch, &first) == cudaSuccess && calls.size() == 1, "a patch is encoded");
  const Call& t = calls[0];
  expect(t.function == "tiled" && t.type == CU_TENSOR_MAP_DATA_TYPE_UINT16 && t.rank == 4 && t.base == memory, "tiled");
  expect(t.sizes == std::vector<std::uint64_t>{256, 24, 32, 64}, "sizes from the innermost on");
  expect(t.strides == std::vector<std::uint64_t>{512, 512 * 24, 512 * 24 * 32}, "strides of all but the innermost");
  expect(t.box == std::vector<int>{16, 34, 10, 1} && t.steps == std::vector<int>{1, 1, 1, 1}, "box and steps");
  expect(t.swizzle == CU_TENSOR_MAP_SWIZZLE_32B && t.interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
             t.promotion == CU_TENSOR_MAP_L2_PROMOTION_L2_128B && t.fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
         "swizzle; zeros outside");
  expect(ddst_cuda_tensor_map(&patch, &second) == cudaSuccess && calls.size() == 1, "the second time it is known");
  expect(std::memcmp(&first, &second, sizeof first) == 0 && first.words[15] == 0x0101010101010101, "all 128 bytes");

  const TensorMap column = column_map(memory, 4, 8, 9, 7, 64, {3, 5}, {2, 1}, {1, 2}, 16, 128, kSwizzle64);
  expect(ddst_cuda_tensor_map(&column, &first) == cudaSuccess && calls.size() == 2, "a column is encoded");
  const Call& c = calls[1];
  expect(c.function == "im2col" && c.type == CU_TENSOR_MAP_DATA_TYPE_UINT32 && c.rank == 4, "im2col");
  expect(c.sizes == std::vector<std::uint64_t>{64, 7, 9, 8} && c.steps == std::vector<int>{1, 2, 1, 1}, "its tensor");
  expect(c.lower == std::vector<int>{-1, -2} && c.upper == std::vector<int>{-1, -2}, "corners of width, then height");
  expect(c.channels == 16 && c.pixels == 128 && c.swizzle == CU_TENSOR_MAP_SWIZZLE_64B, "channels and pixels");

  const int types[][2] = {{1, CU_TENSOR_MAP_DATA_TYPE_UINT8}, {8, CU_TENSOR_MAP_DATA_TYPE_UINT64}};
  for (const auto& [bytes, type] : types) {
    const TensorMap m = matrix_map(memory, bytes, 16, 64, 16, 16 / bytes, bytes == 1 ? kSwizzleNone : kSwizzle128);
    expect(ddst_cuda_tensor_map(&m, &first) == cudaSuccess && calls.back().type == type, "the element's bytes");
    expect(calls.back().swizzle == (bytes == 1 ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B), "swizzles");
  }
  const std::size_t before = calls.size();
  TensorMap elsewhere = patch;
  elsewhere.base = memory + 16;
  expect(ddst_cuda_tensor_map(&elsewhere, &first) == cudaSuccess && calls.size() == before + 1, "an address is a map");
  TensorMap wrong = patch;
  wrong.strides[1] = 24;
  expect(ddst_cuda_tensor_map(&wrong, &first) == cudaErrorInvalidValue && calls.size() == before + 1,
         "what is not legal does not reach the driver");
  answer = CUDA_ERROR_INVALID_CONTEXT;
  elsewhere.base = memory + 32;
  for (std::size_t i = 2; i < 4; ++i)
    expect(ddst_cuda_tensor_map(&elsewhere, &first) == cudaErrorDeviceUninitialized && calls.size() == before + i,
           "the driver's error is handed on and not remembered");
  answer = CUDA_SUCCESS;
  expect(ddst_cuda_tensor_map(&elsewhere, &first) == cudaSuccess, "and the map is encoded when there is none");
}

int encoded_count = 0;
int count_encoded(const TensorMap& map, EncodedTensorMap& encoded) {
  encoded.words[0] = std::uint64_t(map.box[0]);
  return ++encoded_count, 0;
}

void check_bound() {
  TensorMapCache cache(&count_encoded, 3);
  EncodedTensorMap encoded{};
  const auto ask = [&](int box) {
    const TensorMap map = matrix_map(memory, 2, 256, 256, 1, box * 8, kSwizzleNone);
    const int before = encoded_count;
    expect(cache.get(map, encoded) == 0 && encoded.words[0] == std::uint64_t(box * 8), "the map that was asked for");
    return encoded_count - before;  // 1 if it had to be encoded
  };
  expect(ask(1) + ask(2) + ask(3) == 3 && ask(1) + ask(2) + ask(3) == 0, "three maps are kept");
  expect(ask(1) == 0 && ask(4) == 1, "a fourth one");
  expect(ask(1) + ask(3) + ask(4) == 0 && ask(2) == 1, "takes the place of what was not asked for the longest");
  for (int box = 5; box < 32; ++box) ask(box);
  expect(ask(31) == 0 && ask(28) == 1, "however many come");
}

void check_without() {
  known = false;
  EncodedTensorMap encoded{};
  const TensorMap map = matrix_map(memory, 2, 16, 16, 16, 16, kSwizzle32);
  expect(ddst_cuda_tensor_map(&map, &encoded) == cudaErrorNotSupported && calls.empty(),
         "a driver without tensor maps");
}

}  // namespace

extern "C" cudaError_t CUDARTAPI cudaGetDriverEntryPointByVersion(const char* name, void** function,
                                                                  unsigned int version, unsigned long long flags,
                                                                  cudaDriverEntryPointQueryResult* result) {
  expect(version == 12000 && flags == cudaEnableDefault, "the version that the types are of");
  const std::map<std::string, void*> functions{{"cuTensorMapEncodeTiled", reinterpret_cast<void*>(&tiled)},
                                               {"cuTensorMapEncodeIm2col", reinterpret_cast<void*>(&im2col)}};
  *function = known ? functions.at(name) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

int main(int count, char** arguments) {
  if (count > 1 && std::string(arguments[1]) == "without") {
    check_without();
    return finish("driver without tensor maps");
  }
  check_bound();
  check_calls();
  return finish("driver");
}
