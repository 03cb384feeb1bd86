// How the gather kernel (conv2d_gather.cuh) cuts a problem into tiles: computed once per launch, on the host.
//
// Forward: output pixel (Y, X) reads input pixels (Y * stride - padding + kh, ...).
//
// Input gradient: pixel (Y, X) of the forward input reads those pixels (Y + padding - kh) / stride of grad_output for
// which the division is exact. Pixels with equal (Y % stride, X % stride), a phase, use the same taps, so that a phase
// is a gather of stride 1; a launch holds stride_y * stride_x phases.
//
// Both are: grid pixel (i, j) of a phase reads source pixel (i * step + origin + offset(tap), ...).
#pragma once
#include <cstdint>
#include <string>

#include "ddst_cuda.h"

#ifdef __CUDACC__
#define DDST_BOTH __host__ __device__
#else
#define DDST_BOTH
#endif

namespace ddst::cuda {

constexpr int kSlice = 16;        // input channels per stage, and the side of a granule of weights
constexpr int kRecordHeader = 4;  // ints before the masks of a record: [number of blocks, unused...]
constexpr int kMaxTaps = 16;
constexpr std::int64_t kPixelLimit = (std::int64_t(1) << 31) - 1024;  // room for the last tile

struct GatherGeometry {
  int images, in_height, in_width, in_channels;  // of what is read
  int out_height, out_width, out_channels;       // of what is written
  int kernel_width, taps, padded_taps;           // padded_taps: multiple of 4, the masks of a record
  int step_y, step_x;                            // source pixels between grid pixels
  int phases_y, phases_x;                        // grid pixel i of phase f is output pixel i * phases + f
  int padding_y, padding_x;
  int reach_y, reach_x;  // largest offset of a tap
  int log_tile_images, log_tile_rows, log_tile_cols;
  int tiles_y, tiles_x, tiles;             // tiles: of one phase
  int groups;                              // of output channels
  int patch_rows, patch_cols, patch_half;  // patch_cols = step_x * patch_half: columns sorted by x % step_x
  int image_pitch, patch_slots;            // slots of one image, of the patch
  int slices, log_slices_per_block;        // of input channels
  int log_channels_per_block;              // output channels of a block
  int block_columns, block_elements;       // of the packed block
  int record_ints;                         // size of a record, multiple of 4
  int in_blocks;
};

struct GridPixel {
  int image, row, column;  // within the tile of a block of threads
};

// What a fused half block (gather_fused.cuh) asks of the geometry; squares: the 2 x 2 pixels of one are in one tile.
struct GatherShape {
  bool fused, squares;
};

// Tile of a block of threads.
struct GatherTile {
  int pixels, channels, stages;
  constexpr int threads() const { return pixels; }          // a warp has 32 pixels
  constexpr int records() const { return 2 * stages - 1; }  // in shared memory; see conv2d_gather.cuh
};
constexpr GatherTile gather_tile(bool large, int element_bytes) {
  // Stages: what fits. In 16 bits, 3x3 takes 145 kB for a large tile, 50 kB for a small one, and four of these fit.
  return large ? GatherTile{256, 128, element_bytes == 4 ? 2 : 3} : GatherTile{128, 64, 2};
}

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int log2_ceil(int n) {
  int log = 0;
  while ((std::int64_t(1) << log) < n) ++log;
  return log;
}

// Blocks of threads of a launch.
inline int gather_blocks(const GatherGeometry& g) { return g.tiles * g.phases_y * g.phases_x * g.groups; }

// Byte offsets into shared memory: stages | records | source pixel of each patch slot | slot offset of each tap.
struct GatherLayout {
  int patch_bytes, stage_bytes, records, sources, shifts, bytes;
};
inline GatherLayout gather_layout(const GatherGeometry& g, const GatherTile& tile, int element_bytes) {
  GatherLayout l{};
  l.patch_bytes = ceil_div(g.patch_slots * kSlice * element_bytes, 128) * 128;
  l.stage_bytes = l.patch_bytes + g.taps * tile.channels * kSlice * element_bytes;
  l.records = tile.stages * l.stage_bytes;
  l.sources = l.records + tile.records() * g.record_ints * 4;
  l.shifts = l.sources + g.patch_slots * 4;
  l.bytes = l.shifts + g.taps * 4;
  return l;
}

// Shape of the pixel tile and of its patch: powers of two, 2^rows * 2^cols * 2^images = tile.pixels.
inline void set_pixel_tile(GatherGeometry& g, const GatherTile& tile, int log_rows, int log_cols) {
  const int log_images = log2_ceil(tile.pixels) - log_rows - log_cols;
  const int grid_height = ceil_div(g.out_height, g.phases_y), grid_width = ceil_div(g.out_width, g.phases_x);
  g.log_tile_images = log_images, g.log_tile_rows = log_rows, g.log_tile_cols = log_cols;
  g.tiles_y = ceil_div(grid_height, 1 << log_rows), g.tiles_x = ceil_div(grid_width, 1 << log_cols);
  g.tiles = ceil_div(g.images, 1 << log_images) * g.tiles_y * g.tiles_x;  // at most the number of pixels
  g.patch_rows = ((1 << log_rows) - 1) * g.step_y + g.reach_y + 1;
  g.patch_half = ceil_div(((1 << log_cols) - 1) * g.step_x + g.reach_x + 1, g.step_x);
  g.patch_cols = g.patch_half * g.step_x;
  g.image_pitch = g.patch_rows * g.patch_cols;
  // Images are the fastest dimension of a tile: eight pixels that ldmatrix reads together must differ modulo 8.
  const int spread = log_images >= 3 ? 1 : 8 >> log_images;  // the pitch is an odd multiple of this
  while (log_images > 0 && (g.image_pitch % spread || g.image_pitch / spread % 2 == 0)) ++g.image_pitch;
  g.patch_slots = g.image_pitch << log_images;
}

// Fills what does not depend on the shape of the pixel tile and returns "", or says why no gather kernel can run it.
inline std::string gather_facts(const ddst_cuda_conv2d_problem& p, bool input_gradient, const GatherTile& tile,
                                GatherGeometry& g, const GatherShape& shape) {
  const int element_bytes = ddst_cuda_element_bytes(p.dtype), vector = 16 / element_bytes;
  const auto text = [](int a, int b) { return std::to_string(a) + " x " + std::to_string(b); };
  const auto side = [](int b) { return b == 16 || b == 32 || b == 64; };
  const auto stride = [](int s) { return s == 1 || s == 2; };
  if (p.dtype < 0 || p.dtype > DDST_CUDA_FLOAT32) return "dtype must be bfloat16, float16 or float32";
  if (p.dtype == DDST_CUDA_FLOAT32 && tile.channels > gather_tile(false, 4).channels)
    return "float32 in full precision has no large tile";  // multiplication is the limit: it would save nothing
  if (!side(p.block_out) || !side(p.block_in))
    return "block must have sides of 16, 32 or 64, got " + text(p.block_out, p.block_in);
  if (!stride(p.stride_y) || !stride(p.stride_x)) return "stride must be 1 or 2, got " + text(p.stride_y, p.stride_x);
  if (p.kernel_height < 1 || p.kernel_width < 1 || p.kernel_height > kMaxTaps || p.kernel_width > kMaxTaps ||
      p.kernel_height * p.kernel_width > kMaxTaps)
    return "the kernel must have at most 16 taps, got " + text(p.kernel_height, p.kernel_width);
  if (p.in_channels % vector || p.out_channels % vector)
    return "channels must be multiples of " + std::to_string(vector) + ", got " + std::to_string(p.in_channels) +
           " in, " + std::to_string(p.out_channels) + " out";
  if (p.images < 1 || p.height < 1 || p.width < 1 || p.out_height < 1 || p.out_width < 1 || p.in_channels < 1 ||
      p.out_channels < 1 || p.padding_y < 0 || p.padding_x < 0)
    return "images, sizes and channels must be positive and the padding not negative";
  if (std::int64_t(p.images) * p.height * p.width >= kPixelLimit ||
      std::int64_t(p.images) * p.out_height * p.out_width >= kPixelLimit)
    return "the images must have less than 2^31 pixels in all";

  if (shape.squares && input_gradient && p.stride_y * p.stride_x > 1)
    return "the input gradient of an upsampled map has stride 1 only";

  g = {};
  g.images = p.images;
  g.in_height = input_gradient ? p.out_height : p.height, g.in_width = input_gradient ? p.out_width : p.width;
  g.out_height = input_gradient ? p.height : p.out_height, g.out_width = input_gradient ? p.width : p.out_width;
  g.in_channels = input_gradient ? p.out_channels : p.in_channels;
  g.out_channels = input_gradient ? p.in_channels : p.out_channels;
  const bool pointwise =
      p.kernel_height * p.kernel_width == 1 && p.stride_y * p.stride_x == 1 && p.padding_y == 0 && p.padding_x == 0;
  if (pointwise && !shape.fused) {  // the images play no role: one row of pixels
    g.in_width = g.out_width = p.images * p.height * p.width;
    g.images = g.in_height = g.out_height = 1;
  }
  g.kernel_width = p.kernel_width, g.taps = p.kernel_height * p.kernel_width, g.padded_taps = ceil_div(g.taps, 4) * 4;
  g.step_y = input_gradient ? 1 : p.stride_y, g.step_x = input_gradient ? 1 : p.stride_x;
  g.phases_y = input_gradient ? p.stride_y : 1, g.phases_x = input_gradient ? p.stride_x : 1;
  g.padding_y = p.padding_y, g.padding_x = p.padding_x;
  g.reach_y = (p.kernel_height - 1) / g.phases_y, g.reach_x = (p.kernel_width - 1) / g.phases_x;
  const int block_rows = input_gradient ? p.block_in : p.block_out, depth = input_gradient ? p.block_out : p.block_in;
  g.groups = ceil_div(g.out_channels, tile.channels);
  g.slices = ceil_div(g.in_channels, kSlice), g.log_slices_per_block = log2_ceil(depth / kSlice);
  g.in_blocks = ceil_div(g.in_channels, depth);
  g.log_channels_per_block = log2_ceil(block_rows);
  g.block_columns = p.block_in, g.block_elements = p.block_out * p.block_in;
  g.record_ints = kRecordHeader + g.padded_taps + ceil_div(g.taps * (tile.channels / block_rows), 4) * 4;
  return "";
}

// Fills `g` and returns "", or says why the kernel cannot run the problem.
inline std::string gather_geometry(const ddst_cuda_conv2d_problem& p, bool input_gradient, const GatherTile& tile,
                                   int shared_limit, GatherGeometry& g, const GatherShape& shape = {}) {
  const std::string why = gather_facts(p, input_gradient, tile, g, shape);
  if (!why.empty()) return why;

  // The shape with the least work: pixels multiplied plus pixels copied, over all tiles.
  const int log_pixels = log2_ceil(tile.pixels);
  std::int64_t least = -1;
  GatherGeometry best{};
  for (int rows = shape.squares; rows <= log_pixels; ++rows)
    for (int cols = shape.squares; rows + cols <= log_pixels; ++cols) {
      set_pixel_tile(g, tile, rows, cols);
      if (gather_layout(g, tile, ddst_cuda_element_bytes(p.dtype)).bytes > shared_limit) continue;
      const std::int64_t work = std::int64_t(g.tiles) * (tile.pixels + g.patch_slots);
      if (least < 0 || work < least) least = work, best = g;
    }
  if (least < 0) return "the tile needs more shared memory than " + std::to_string(shared_limit) + " bytes";
  g = best;
  if (std::int64_t(g.tiles) * g.phases_y * g.phases_x * g.groups >= kPixelLimit) return "too many tiles for one launch";
  return "";
}

}  // namespace ddst::cuda
