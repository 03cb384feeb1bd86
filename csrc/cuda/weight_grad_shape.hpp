// What describes one weight gradient, its checks, and the sizes that follow from it: host code, shared by the launcher
// and the emulator's tests.
#pragma once

#include <cstdint>
#include <string>

namespace ddst::cuda {

// The pixels of a share are walked tile by tile; a tile is tile_h x tile_w output pixels of tile_images images. A CTA's
// blocks lie in one band: band_rows output block rows by band_cols input blocks.
struct WeightGradShape {
  int images, in_h, in_w, in_channels, out_h, out_w, out_channels;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int block_out, block_in, slots;
  int band_rows, band_cols, tile_images, tile_h, tile_w;
  int groups, shares;
};

struct WeightGradSizes {
  int unit_rows, unit_cols;     // what one warp accumulates at a time: a block or a part of it
  int tiles_h, tiles_w;         // tiles per image
  std::int64_t tiles;           // in all
  int pixels;                   // of a tile, rounded up to 16
  int patch_h, patch_w, patch;  // input pixels that a tile's taps read, per image and in all
  int grad_pitch, input_pitch;  // elements from one pixel to the next in shared memory
  int grad_bits, input_bits;    // log2 of the threads that copy one pixel
  std::int64_t shared_bytes, partial_floats;
};

constexpr int kWeightGradThreads = 256, kWeightGradWarps = 8, kWeightGradStages = 2;
constexpr int kAccumulators = 64;  // per thread

inline int bits_for(int count) {
  int bits = 0;
  while (1 << bits < count) ++bits;
  return bits;
}

// A unit is square or 32 x 16.
inline int weight_grad_unit_rows(const WeightGradShape& s) { return s.block_out < 32 ? s.block_out : 32; }
inline int weight_grad_unit_cols(const WeightGradShape& s) {
  return s.block_in < weight_grad_unit_rows(s) ? s.block_in : weight_grad_unit_rows(s);
}

// Entries of a group in the list of units.
inline int weight_grad_group_units(const WeightGradShape& s) {
  return kWeightGradWarps * kAccumulators * 32 / (weight_grad_unit_rows(s) * weight_grad_unit_cols(s));
}

inline WeightGradSizes weight_grad_sizes(const WeightGradShape& s, int element_bytes) {
  WeightGradSizes z{};
  z.unit_rows = weight_grad_unit_rows(s), z.unit_cols = weight_grad_unit_cols(s);
  z.tiles_h = (s.out_h + s.tile_h - 1) / s.tile_h;
  z.tiles_w = (s.out_w + s.tile_w - 1) / s.tile_w;
  z.tiles = std::int64_t(s.images + s.tile_images - 1) / s.tile_images * z.tiles_h * z.tiles_w;
  z.pixels = (s.tile_images * s.tile_h * s.tile_w + 15) / 16 * 16;
  z.patch_h = (s.tile_h - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
  z.patch_w = (s.tile_w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
  z.patch = s.tile_images * z.patch_h * z.patch_w;
  // Eight more than a multiple of 16 elements: whatever 8 pixels ldmatrix reads, they start in 8 different banks; the
  // same for the 4 pixels of 8 channels that a tf32 fragment reads.
  z.grad_pitch = s.band_rows * s.block_out + 8;
  z.input_pitch = s.band_cols * s.block_in + 8;
  const int vector = 16 / element_bytes;
  z.grad_bits = bits_for(s.band_rows * s.block_out / vector);
  z.input_bits = bits_for(s.band_cols * s.block_in / vector);
  const std::int64_t tables = (std::int64_t(z.patch) + 2 * z.pixels) * 4;
  const std::int64_t stage = std::int64_t(z.pixels) * z.grad_pitch + std::int64_t(z.patch) * z.input_pitch;
  z.shared_bytes = (tables + 127) / 128 * 128 + kWeightGradStages * stage * element_bytes;
  z.partial_floats = std::int64_t(s.shares) * s.groups * kWeightGradThreads * kAccumulators;
  return z;
}

// What is wrong with the shape, or an empty string. shared_limit: bytes of shared memory that a CTA may have.
inline std::string weight_grad_error(const WeightGradShape& s, int element_bytes, std::int64_t shared_limit) {
  const auto text = [](const char* name, std::int64_t value, const char* expected) {
    return std::string(name) + " is " + std::to_string(value) + ", expected " + expected;
  };
  const auto block_fits = [](int b) { return b == 16 || b == 32 || b == 64; };
  if (!block_fits(s.block_out)) return text("block[0]", s.block_out, "16, 32 or 64");
  if (!block_fits(s.block_in)) return text("block[1]", s.block_in, "16, 32 or 64");
  const struct {
    const char* name;
    int value, least;
  } sizes[] = {
      {"images", s.images, 0},
      {"in_h", s.in_h, 1},
      {"in_w", s.in_w, 1},
      {"in_channels", s.in_channels, 1},
      {"out_h", s.out_h, 1},
      {"out_w", s.out_w, 1},
      {"out_channels", s.out_channels, 1},
      {"kernel_h", s.kernel_h, 1},
      {"kernel_w", s.kernel_w, 1},
      {"stride_h", s.stride_h, 1},
      {"stride_w", s.stride_w, 1},
      {"pad_h", s.pad_h, 0},
      {"pad_w", s.pad_w, 0},
      {"dilation_h", s.dilation_h, 1},
      {"dilation_w", s.dilation_w, 1},
      {"slots", s.slots, 0},
      {"band[0]", s.band_rows, 1},
      {"band[1]", s.band_cols, 1},
      {"tile[0]", s.tile_images, 1},
      {"tile[1]", s.tile_h, 1},
      {"tile[2]", s.tile_w, 1},
      {"groups", s.groups, 0},
      {"shares", s.shares, 1},
  };
  for (const auto& size : sizes) {
    if (size.value < size.least) return text(size.name, size.value, size.least ? "at least 1" : "at least 0");
  }
  const std::int64_t tile = std::int64_t(s.tile_images) * s.tile_h * s.tile_w;
  const std::int64_t reach_h =
      (s.tile_h - 1) * std::int64_t(s.stride_h) + (s.kernel_h - 1) * std::int64_t(s.dilation_h);
  const std::int64_t reach_w =
      (s.tile_w - 1) * std::int64_t(s.stride_w) + (s.kernel_w - 1) * std::int64_t(s.dilation_w);
  if (s.tile_images > 1023 || tile > 1024) return text("pixels of a tile", tile, "at most 1024 of 1023 images");
  if (reach_h > 1023 || reach_w > 1023)
    return text("a tile's reach", reach_h > reach_w ? reach_h : reach_w, "at most 1023");
  if (std::int64_t(s.band_rows) * s.block_out > 256) return text("band[0]", s.band_rows, "at most 256 channels");
  if (std::int64_t(s.band_cols) * s.block_in > 256) return text("band[1]", s.band_cols, "at most 256 channels");
  if (s.shares > 65535) return text("shares", s.shares, "at most 65535");
  const std::int64_t in_pixels = std::int64_t(s.images) * s.in_h * s.in_w;
  const std::int64_t out_pixels = std::int64_t(s.images) * s.out_h * s.out_w;
  if (in_pixels > INT32_MAX) return text("input's number of pixels", in_pixels, "less than 2^31");
  if (out_pixels > INT32_MAX) return text("grad_output's number of pixels", out_pixels, "less than 2^31");
  const WeightGradSizes z = weight_grad_sizes(s, element_bytes);
  if (z.tiles > INT32_MAX) return text("the number of tiles", z.tiles, "less than 2^31");
  if (z.shared_bytes > shared_limit) {
    return text("a CTA's shared memory", z.shared_bytes, "at most ") + std::to_string(shared_limit) + " bytes";
  }
  return "";
}

}  // namespace ddst::cuda
