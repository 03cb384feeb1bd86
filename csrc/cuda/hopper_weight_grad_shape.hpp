// Sizes of the weight gradient's kernel for sm_90a and what it refuses: host code, shared by the launcher and the
// emulator's tests. A shape is today's WeightGradShape; what differs:
//
//   groups  counts groups of kHopperWarps warps: `units` is list_units with 16 warps instead of 8
//           ([groups, 16, units of a warp], everything else alike)
//   tile    images, rows and columns are powers of two with a product of 64; it may reach beyond the images, so that
//   any
//           output size has such a tile: 1 x 8 x 8 for 7 x 7, 4 x 4 x 4 for 4 x 4, 1 x 1 x 64 for flattened ones
//   band    any; 256 channels at most each way. A CTA takes a multiprocessor for itself, so shares are multiprocessors
//   /
//           groups with units
//
// weight_grad_reduce then reads a group as two (same bytes): call it with twice the groups.
#pragma once
#include <numeric>

#include "tensor_map.hpp"
#include "weight_grad_shape.hpp"

namespace ddst::cuda {

constexpr int kHopperWarps = 16, kChangingWarps = 3;  // that multiply; that do a prologue, beside one that copies
constexpr int kHopperGradThreads = (kHopperWarps + 1 + kChangingWarps) * 32;
// At the start 65536 / 640 threads leave 96 registers for each: what the last four warps give the others take.
constexpr int kMultiplyingRegisters = 104, kChangingRegisters = 64;
constexpr int kTilePixels = 64, kTileSteps = kTilePixels / 16;
constexpr int kMostStride = 8;  // of tensor maps
constexpr int kMostStages = 4, kBarrierBytes = 128, kUnitPlaceBytes = kHopperWarps * 8 * 4;
constexpr std::int64_t kHopperSharedBytes = 227 * 1024;  // that a CTA of sm_90 may have

struct HopperWeightGradSizes {
  int tiles_h, tiles_w;  // tiles per image
  std::int64_t tiles;    // in all
  // x comes in planes, within which a convolution has no strides, so that with strides, too, 8 pixels lie in 8
  // different banks. Plane (i, j) holds every stride_h-th row from plane_rows[i] on, counted from the first one that a
  // tile may read, and columns likewise. Tap (i, j) reads plane (i % planes_h, j % planes_w), shifted by its dilation /
  // stride.
  int planes_h, planes_w;
  int plane_rows[kMostStride], plane_columns[kMostStride];
  int patch_h, patch_w;  // of an image of a tile in a plane; patch_w may be more than the taps read, see `steps`
  // Bands come in slices of 64, 32 or 16 channels, one box each: pixels of 128, 64 or 32 bytes, swizzled over as many.
  int grad_channels, input_channels;  // of a slice
  int grad_slices, input_slices;
  int grad_slice_bytes, input_plane_bytes;  // from one box to the next, multiples of 1024
  int copied_bytes;                         // of a stage, all boxes
  int header_bytes;                         // in front of the stages; fused: with an int for each pixel of the planes
  int stage_bytes, stages;
  int chunk_bits;  // log2 of the lanes that change one pixel, 8 channels each
  // What the patch's bytes of the tile's pixels 16 k ... 16 k + 15 have over those of 0 ... 15: `steps[k]` is added,
  // and `flip` xored where k is odd. Whole spans of the swizzle, or half ones where k is odd.
  int steps[kTileSteps], flip;
  int shared_bytes;
  std::int64_t partial_floats;
};

inline int slice_channels(int channels) { return channels % 64 == 0 ? 64 : channels % 32 == 0 ? 32 : 16; }

inline std::int64_t whole_spans(std::int64_t bytes) { return (bytes + 1023) / 1024 * 1024; }

// Taps along one dimension that read different planes.
inline int weight_grad_planes(int kernel, int stride, int dilation) {
  const int different = stride / std::gcd(stride, dilation);
  return kernel < different ? kernel : different;
}

// Pixels from patch pixel of tile pixel 0 to that of tile pixel 16 k.
inline std::int64_t step_pixels(const WeightGradShape& s, int patch_h, int patch_w, int k) {
  const int pixel = 16 * k, image = pixel / (s.tile_h * s.tile_w), y = pixel / s.tile_w % s.tile_h;
  return (std::int64_t(image) * patch_h + y) * patch_w + pixel % s.tile_w;
}

// The swizzle repeats after 8 pixels; after 4 its upper half is exchanged with the lower one.
inline bool steps_keep_the_swizzle(const WeightGradShape& s, int patch_h, int patch_w) {
  const std::int64_t odd = step_pixels(s, patch_h, patch_w, 1) % 8;
  if (odd != 0 && odd != 4) return false;
  for (int k = 2; k < kTileSteps; ++k)
    if (step_pixels(s, patch_h, patch_w, k) % 8 != (k % 2 ? odd : 0)) return false;
  return true;
}

// Of a shape with a whole tile (hopper_weight_grad_error). stages is 0 where not even two fit.
inline HopperWeightGradSizes hopper_weight_grad_sizes(const WeightGradShape& s, bool fused) {
  HopperWeightGradSizes z{};
  z.tiles_h = (s.out_h + s.tile_h - 1) / s.tile_h;
  z.tiles_w = (s.out_w + s.tile_w - 1) / s.tile_w;
  z.tiles = (std::int64_t(s.images) + s.tile_images - 1) / s.tile_images * z.tiles_h * z.tiles_w;
  z.planes_h = weight_grad_planes(s.kernel_h, s.stride_h, s.dilation_h);
  z.planes_w = weight_grad_planes(s.kernel_w, s.stride_w, s.dilation_w);
  for (int i = 0; i < z.planes_h && i < kMostStride; ++i) z.plane_rows[i] = i * s.dilation_h % s.stride_h;
  for (int i = 0; i < z.planes_w && i < kMostStride; ++i) z.plane_columns[i] = i * s.dilation_w % s.stride_w;
  z.patch_h = s.tile_h + (s.kernel_h - 1) * s.dilation_h / s.stride_h;
  z.patch_w = s.tile_w + (s.kernel_w - 1) * s.dilation_w / s.stride_w;
  while (!steps_keep_the_swizzle(s, z.patch_h, z.patch_w)) ++z.patch_w;
  const int grad_band = s.band_rows * s.block_out, input_band = s.band_cols * s.block_in;
  z.grad_channels = slice_channels(grad_band), z.grad_slices = grad_band / z.grad_channels;
  z.input_channels = slice_channels(input_band), z.input_slices = input_band / z.input_channels;
  const int grad_pitch = z.grad_channels * 2, input_pitch = z.input_channels * 2;
  const std::int64_t patch = std::int64_t(s.tile_images) * z.patch_h * z.patch_w;
  const std::int64_t grad_bytes = kTilePixels * grad_pitch, input_bytes = patch * input_pitch;
  const int boxes = z.input_slices * z.planes_h * z.planes_w;
  const std::int64_t stage = z.grad_slices * whole_spans(grad_bytes) + boxes * whole_spans(input_bytes);
  const std::int64_t header =
      whole_spans(kBarrierBytes + kUnitPlaceBytes + (fused ? z.planes_h * z.planes_w * patch * 4 : 0));
  const std::int64_t fit = (kHopperSharedBytes - header) / stage;
  if (fit < 2) return z;
  z.stages = int(fit < kMostStages ? fit : kMostStages);
  z.stage_bytes = int(stage), z.header_bytes = int(header);
  z.grad_slice_bytes = int(whole_spans(grad_bytes)), z.input_plane_bytes = int(whole_spans(input_bytes));
  z.copied_bytes = int(z.grad_slices * grad_bytes + boxes * input_bytes);
  for (int k = 0; k < kTileSteps; ++k) z.steps[k] = int(step_pixels(s, z.patch_h, z.patch_w, k)) * input_pitch;
  z.flip = step_pixels(s, z.patch_h, z.patch_w, 1) % 8 ? input_pitch / 2 : 0;
  z.chunk_bits = bits_for(input_band / 8);
  z.shared_bytes = z.header_bytes + z.stages * z.stage_bytes;
  z.partial_floats = std::int64_t(s.shares) * s.groups * kHopperWarps * 32 * kAccumulators;
  return z;
}

// Of a box from whose `count` rows or columns every `stride`-th is taken.
inline int box_side(int count, int stride) { return (count - 1) * stride + 1; }

// Why this kernel does not take a shape, or an empty string. It does not take a fused half block whose stored operands
// have half of the sides, either: a copy cannot repeat pixels.
inline std::string hopper_weight_grad_error(const WeightGradShape& s, int element_bytes, bool fused) {
  const std::string general = weight_grad_error(s, element_bytes, INT64_MAX);
  if (!general.empty()) return general;
  const auto text = [](const std::string& name, std::int64_t value, const std::string& expected) {
    return name + " is " + std::to_string(value) + ", expected " + expected;
  };
  if (element_bytes != 2) return text("bytes of an element", element_bytes, "2: bfloat16 or float16");
  if (s.images < 1) return text("images", s.images, "at least 1");
  if (s.in_channels % 8) return text("in_channels", s.in_channels, "a multiple of 8");
  if (s.out_channels % 8) return text("out_channels", s.out_channels, "a multiple of 8");
  const int tile[] = {s.tile_images, s.tile_h, s.tile_w};
  for (int i = 0; i < 3; ++i)
    if (tile[i] & (tile[i] - 1)) return text("tile[" + std::to_string(i) + "]", tile[i], "a power of two");
  if (tile[0] * tile[1] * tile[2] != kTilePixels)
    return text("pixels of a tile", tile[0] * tile[1] * tile[2], std::to_string(kTilePixels));
  const HopperWeightGradSizes z = hopper_weight_grad_sizes(s, fused);
  const int stride = s.stride_h > s.stride_w ? s.stride_h : s.stride_w;
  if (stride > kMostStride) return text("the stride", stride, "at most " + std::to_string(kMostStride));
  if (box_side(z.patch_h, s.stride_h) > 256)
    return text("rows of a tile's patch", box_side(z.patch_h, s.stride_h), "at most 256");
  if (box_side(z.patch_w, s.stride_w) > 256)
    return text("columns of a tile's patch", box_side(z.patch_w, s.stride_w), "at most 256");
  if (z.tiles > INT32_MAX) return text("the number of tiles", z.tiles, "less than 2^31");
  if (z.stages == 0) return "two stages of a tile do not fit " + std::to_string(kHopperSharedBytes) + " bytes";
  return "";
}

inline TensorMap hopper_grad_map(const void* gy, const WeightGradShape& s, const HopperWeightGradSizes& z) {
  return patch_map(gy, 2, s.images, s.out_h, s.out_w, s.out_channels,
                   {z.grad_channels, s.tile_w, s.tile_h, s.tile_images}, z.grad_channels * 2);
}
inline TensorMap hopper_input_map(const void* x, const WeightGradShape& s, const HopperWeightGradSizes& z) {
  TensorMap map =
      patch_map(x, 2, s.images, s.in_h, s.in_w, s.in_channels,
                {z.input_channels, box_side(z.patch_w, s.stride_w), box_side(z.patch_h, s.stride_h), s.tile_images},
                z.input_channels * 2);
  map.steps[1] = s.stride_w, map.steps[2] = s.stride_h;
  return map;
}

}  // namespace ddst::cuda
