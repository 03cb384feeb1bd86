// What a tensor map says, for bulk tensor copies of sm_90: a view of global memory, and the box of it that one copy
// brings into shared memory. The driver makes 128 opaque bytes of it (tensor_maps.h); the emulator reads it as it is.
//
// Dimensions are listed from the innermost one on, as in PTX. What lies outside of the tensor is read as zero.
#pragma once
#include <cstdint>
#include <string>
#include <type_traits>

namespace ddst::cuda {

constexpr int kMapDims = 5;

// How elements of a box lie in shared memory: rows of the innermost dimension, one after another. A swizzle of 2^s
// bytes exchanges 16-byte chunks within spans of 2^s bytes: bits 4 ... s - 1 of an address are xored with the bits from
// 7 on. So the pattern belongs to addresses, not to the box, and repeats after 8 * 2^s bytes, at a multiple of which a
// box begins. With 32 and 64 bytes it is the order of swizzled<2> and swizzled<4> in gather_stage.cuh.
enum TensorMapSwizzle { kSwizzleNone = 0, kSwizzle32 = 32, kSwizzle64 = 64, kSwizzle128 = 128 };

struct TensorMap {
  const void* base;                // a multiple of 16
  std::int64_t sizes[kMapDims];    // elements
  std::int64_t strides[kMapDims];  // bytes from one index to the next; [0] is element_bytes
  int element_bytes, rank;
  int steps[kMapDims];  // from one element that is copied to the next, 1 ... 8; [0] is 1
  int swizzle;          // TensorMapSwizzle
  int im2col;           // 0: a box of `box` elements, of which every steps[i]-th is copied; 1: columns of pixels
  int box[kMapDims];
  // im2col, a tensor of channels, width, height, images: a copy names a first pixel and takes `pixels` pixels from
  // there, along width, then height, then images, and `channels` channels of each. Pixels go, in `steps`, from lower
  // up to size + upper (not included); the offset of a tap, which a copy names too, is added to where they are read.
  int lower[2], upper[2];  // of width, height
  int channels, pixels;
};
// So that maps can be compared and hashed as bytes.
static_assert(std::has_unique_object_representations_v<TensorMap>);

inline int map_ceil_div(int a, int b) { return (a + b - 1) / b; }

// Bytes that one copy writes and reports to its barrier, those outside of the tensor included.
inline std::int64_t copied_bytes(const TensorMap& map) {
  if (map.im2col) return std::int64_t(map.channels) * map.pixels * map.element_bytes;
  std::int64_t bytes = map.element_bytes;
  for (int i = 0; i < map.rank; ++i) bytes *= map_ceil_div(map.box[i], map.steps[i]);
  return bytes;
}

// What a box's place in shared memory must be a multiple of.
inline int box_alignment(const TensorMap& map) { return map.swizzle ? 8 * map.swizzle : 128; }

// Positions that im2col's pixels take along width (0) or height (1).
inline std::int64_t im2col_positions(const TensorMap& map, int i) {
  const std::int64_t room = map.sizes[1 + i] + map.upper[i] - map.lower[i];
  return room <= 0 ? 0 : (room + map.steps[1 + i] - 1) / map.steps[1 + i];
}

// Why neither the driver nor a kernel takes the map, or an empty string.
inline std::string tensor_map_error(const TensorMap& map) {
  const auto text = [](const std::string& name, std::int64_t value, const std::string& expected) {
    return "tensor map: " + name + " is " + std::to_string(value) + ", expected " + expected;
  };
  const auto name = [](const char* list, int i) { return std::string(list) + "[" + std::to_string(i) + "]"; };
  const int bytes = map.element_bytes;
  if (bytes != 1 && bytes != 2 && bytes != 4 && bytes != 8) return text("element_bytes", bytes, "1, 2, 4 or 8");
  if (map.rank < 1 || map.rank > kMapDims) return text("rank", map.rank, "1 to 5");
  if (map.im2col != 0 && map.im2col != 1) return text("im2col", map.im2col, "0 or 1");
  if (map.im2col && map.rank != 4) return text("rank", map.rank, "4: channels, width, height, images, in im2col mode");
  if (map.base == nullptr || reinterpret_cast<std::uintptr_t>(map.base) % 16)
    return text("base", static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(map.base)), "a multiple of 16");
  if (map.swizzle != kSwizzleNone && map.swizzle != kSwizzle32 && map.swizzle != kSwizzle64 &&
      map.swizzle != kSwizzle128)
    return text("swizzle", map.swizzle, "0, 32, 64 or 128 bytes");
  for (int i = 0; i < map.rank; ++i) {
    if (map.sizes[i] < 1 || map.sizes[i] > std::int64_t{1} << 32)
      return text(name("sizes", i), map.sizes[i], "1 to 2^32");
    if (i == 0 && map.strides[0] != bytes) return text("strides[0]", map.strides[0], "element_bytes");
    if (i > 0 && (map.strides[i] < 0 || map.strides[i] % 16 || map.strides[i] >= std::int64_t{1} << 40))
      return text(name("strides", i), map.strides[i], "a multiple of 16 below 2^40");
    if (map.steps[i] < 1 || map.steps[i] > (i == 0 ? 1 : 8))
      return text(name("steps", i), map.steps[i], i == 0 ? "1" : "1 to 8");
    if (!map.im2col && (map.box[i] < 1 || map.box[i] > 256)) return text(name("box", i), map.box[i], "1 to 256");
  }
  const int inner = (map.im2col ? map.channels : map.box[0]) * bytes;
  const char* const inner_name = map.im2col ? "the bytes of a pixel's channels" : "the bytes of box[0]";
  if (map.im2col) {
    if (map.channels < 1 || map.channels > 256) return text("channels", map.channels, "1 to 256");
    if (map.pixels < 1 || map.pixels > 1024) return text("pixels", map.pixels, "1 to 1024");
    for (int i = 0; i < 2; ++i) {
      if (map.lower[i] < -128 || map.lower[i] > 127) return text(name("lower", i), map.lower[i], "-128 to 127");
      if (map.upper[i] < -128 || map.upper[i] > 127) return text(name("upper", i), map.upper[i], "-128 to 127");
      if (im2col_positions(map, i) < 1)
        return text("the number of positions along " + std::string(i ? "height" : "width"), im2col_positions(map, i),
                    "at least 1");
    }
  }
  if (inner % 16) return text(inner_name, inner, "a multiple of 16");
  if (map.swizzle && inner > map.swizzle)
    return text(inner_name, inner, "at most the swizzle's " + std::to_string(map.swizzle));
  return "";
}

// Dense [images, height, width, channels] memory, of which a copy takes `box` = {channels, columns, rows, images}.
inline TensorMap patch_map(const void* base, int element_bytes, int images, int height, int width, int channels,
                           const int (&box)[4], int swizzle) {
  TensorMap map{};
  map.base = base, map.element_bytes = element_bytes, map.rank = 4, map.swizzle = swizzle;
  const int sizes[4] = {channels, width, height, images};
  std::int64_t stride = element_bytes;
  for (int i = 0; i < 4; ++i)
    map.sizes[i] = sizes[i], map.strides[i] = stride, map.steps[i] = 1, map.box[i] = box[i], stride *= sizes[i];
  return map;
}

// The same memory in im2col mode: copies of `pixels` output pixels and `box_channels` channels of a convolution with
// this kernel, {width, height} each; the tap's offset is given with the copy.
inline TensorMap column_map(const void* base, int element_bytes, int images, int height, int width, int channels,
                            const int (&kernel)[2], const int (&stride)[2], const int (&padding)[2], int box_channels,
                            int pixels, int swizzle) {
  TensorMap map = patch_map(base, element_bytes, images, height, width, channels, {box_channels, 1, 1, 1}, swizzle);
  map.im2col = 1, map.channels = box_channels, map.pixels = pixels;
  for (int i = 0; i < 4; ++i) map.box[i] = 0;
  for (int i = 0; i < 2; ++i) {
    map.steps[1 + i] = stride[i];
    map.lower[i] = -padding[i], map.upper[i] = padding[i] - (kernel[i] - 1);
  }
  return map;
}

// A dense matrix [rows, columns], of which a copy takes `box_rows` x `box_columns`.
inline TensorMap matrix_map(const void* base, int element_bytes, std::int64_t rows, std::int64_t columns, int box_rows,
                            int box_columns, int swizzle) {
  TensorMap map{};
  map.base = base, map.element_bytes = element_bytes, map.rank = 2, map.swizzle = swizzle;
  map.sizes[0] = columns, map.sizes[1] = rows;
  map.strides[0] = element_bytes, map.strides[1] = columns * element_bytes;
  map.steps[0] = map.steps[1] = 1;
  map.box[0] = box_columns, map.box[1] = box_rows;
  return map;
}

}  // namespace ddst::cuda
