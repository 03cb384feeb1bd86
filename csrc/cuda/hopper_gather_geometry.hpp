// How the gather kernel for sm_90a (hopper_gather.cuh) cuts a problem into tiles, where things lie in shared memory,
// what its tensor maps say: computed on the host.
//
// Lists that the kernel walks:
//
// A *record* for each (phase of the taps, group of 128 output channels, input block), in this order, as many ints as
// record_ints, a multiple of 4:
//   [blocks listed, 0, 0, 0 | an entry for each tap that has a block, ascending: tap | mask << 16 | rows]
// Entries are followed by one zero at least and padded to padded_taps. Bit i of a mask: output channels 16 i ... 16 i +
// 15 of the group have a block at the tap. Rows: slot * block_out, where a block begins among the packed values' rows,
// of the blocks by tap, then output channel. Products of four granules (GatherForm::granules = 4) take all blocks of 64
// neighbouring channels, if there is any: their masks have four equal bits each, and a block that is not there is
// listed with row slots * block_out, which is read as zeros since the tensor map ends before.
//
// An *order*: (phase * groups + group) for each of them, those with most blocks first.
#pragma once
#include "gather_geometry.hpp"
#include "tensor_map.hpp"

namespace ddst::cuda {

constexpr int kHopperPixels = 256, kHopperChannels = 128;  // of a CTA's tile
constexpr int kHopperConsumers = 256, kHopperThreads = kHopperConsumers + 128;
constexpr int kRecordsAhead = 4;  // stages that a record comes before its copies
constexpr int kMaxStages = 8;
constexpr int kGranuleBytes = kSlice * kSlice * 2;

struct GatherForm {
  int granules;   // of 16 output channels in one product: 1, or 4 with zeros multiplied
  int cluster;    // CTAs of one output group that share the copies of weights: 1 or 2
  int depth = 1;  // slices of 16 input channels in a stage: 1 or 2
  // Whether pixels are copied for each tap that has a block, by im2col; otherwise a patch with its halo is.
  bool im2col = false;
};

// patch_rows, patch_cols, image_pitch are of one part of the patch: the source pixels of equal (y % step, x % step), as
// many parts as taps meet. Slots of a part: [image][row][column], slot_bytes each.
//
// With im2col a tile is 256 pixels in the order of the images, a part is what one tap reads of them.
struct HopperGatherGeometry : GatherGeometry {
  int depth, slot_bytes;
  int im2col, origin_y, origin_x;  // origin: of im2col's first pixel, where the first tap reads
  int parts_y, parts_x, parts, part_bytes;
  int copied_bytes;                  // of a patch, or with im2col of a part
  int low_images;                    // log2 of the images between column and row in the order of a tile's pixels
  int squares;                       // 1: the order begins with the pixels of 2 x 2 squares
  int second_bit;                    // bit of a pixel's number, 3 to 7, that tells a warpgroup's m64 tiles apart
  int second;                        // bytes between a pixel of a warpgroup's first m64 tile and the one of its second
  int block_out;                     // rows of a packed block
  int tile_sets;                     // tiles of a phase, by cluster
  int items;                         // (phase, group, tile set)
  int stages, stage_bytes, weights;  // weights: their place in a stage
  int records, barriers, bytes;      // places in shared memory, its size
};

// Pixel m of the tile: columns, `low_images` of the images, rows, images, but for bit 6, which changes places with bit
// `second_bit`. Eight pixels in a row should lie in slots that differ modulo 8, hence images between columns and rows
// where there are less than 8 columns.
DDST_BOTH inline GridPixel hopper_grid_pixel(const HopperGatherGeometry& g, int m) {
  const int differ = (m >> 6 ^ m >> g.second_bit) & 1;
  m ^= differ << 6 | differ << g.second_bit;
  int low_row = 0, low_col = 0;
  const int cols = g.log_tile_cols - g.squares, rows = g.log_tile_rows - g.squares;
  if (g.squares) low_col = m & 1, low_row = m >> 1 & 1, m >>= 2;
  const int column = m & ((1 << cols) - 1), low_image = m >> cols & ((1 << g.low_images) - 1);
  m >>= cols + g.low_images;
  return {(m >> rows) << g.low_images | low_image, (m & ((1 << rows) - 1)) << g.squares | low_row,
          column << g.squares | low_col};
}

DDST_BOTH inline int hopper_slot(const HopperGatherGeometry& g, int m) {
  const GridPixel pixel = hopper_grid_pixel(g, m);
  return pixel.image * g.image_pitch + pixel.row * g.patch_cols + pixel.column;
}

// Finds a bit of m that may tell a warpgroup's m64 tiles apart: whose pixels are a multiple of 8 slots apart, so that
// the second tile repeats the swizzle of the first, which the kernel relies on. Slots are sums of what the bits stand
// for.
inline bool find_second_bit(HopperGatherGeometry& g) {
  for (const int bit : {6, 7, 5, 4, 3}) {
    g.second_bit = bit;
    if (hopper_slot(g, 64) % 8 == 0) return true;
  }
  return false;
}
// Whether eight pixels in a row have no bank conflict.
inline bool has_no_conflicts(const HopperGatherGeometry& g) {
  unsigned seen = 0;
  for (int m = 0; m < 8; ++m) seen |= 1u << hopper_slot(g, m) % 8;
  return seen == 0xff;
}

// 2^rows x 2^cols pixels of as many images as make 256. False if no patch for it lies well, or if it is certain to be
// more work (pixels multiplied and copied) than `most`.
inline bool set_hopper_tile(HopperGatherGeometry& g, int log_rows, int log_cols, std::int64_t most) {
  const int log_images = log2_ceil(kHopperPixels) - log_rows - log_cols;
  const int grid_height = ceil_div(g.out_height, g.phases_y), grid_width = ceil_div(g.out_width, g.phases_x);
  g.log_tile_images = log_images, g.log_tile_rows = log_rows, g.log_tile_cols = log_cols;
  g.low_images = g.squares || log_cols > 3 ? 0 : log_images < 3 - log_cols ? log_images : 3 - log_cols;
  g.tiles_y = ceil_div(grid_height, 1 << log_rows), g.tiles_x = ceil_div(grid_width, 1 << log_cols);
  g.tiles = ceil_div(g.images, 1 << log_images) * g.tiles_y * g.tiles_x;
  g.parts_y = g.step_y <= g.reach_y ? g.step_y : g.reach_y + 1;
  g.parts_x = g.step_x <= g.reach_x ? g.step_x : g.reach_x + 1;
  const int rows = (1 << log_rows) + g.reach_y / g.step_y, cols = (1 << log_cols) + g.reach_x / g.step_x;
  g.parts = g.parts_y * g.parts_x;
  const int per_slot = g.parts << log_images;
  if (most >= 0 && g.tiles * std::int64_t(kHopperPixels + rows * cols * per_slot) >= most) return false;
  // Padded patches cost bytes, bank conflicts time of ldmatrix alone: as much as a sixth more bytes, it is assumed.
  int least = 0;
  HopperGatherGeometry best = g;
  for (int more = 0; more < 64; ++more) {
    g.patch_rows = rows + more / 8, g.patch_cols = cols + more % 8, g.image_pitch = g.patch_rows * g.patch_cols;
    if (g.patch_rows * g.step_y > 256 || g.patch_cols * g.step_x > 256) continue;
    if ((least && g.image_pitch * 6 >= least) || !find_second_bit(g)) continue;
    const int cost = g.image_pitch * (has_no_conflicts(g) ? 6 : 7);
    if (least == 0 || cost < least) least = cost, best = g;
  }
  g = best;
  g.patch_half = g.patch_cols;
  g.patch_slots = g.image_pitch * per_slot;
  g.part_bytes = ceil_div(g.image_pitch << log_images, 8) * 8 * g.slot_bytes;
  g.copied_bytes = g.patch_slots * g.slot_bytes;
  g.second = hopper_slot(g, 64) * g.slot_bytes;
  return least > 0;
}

// 256 pixels in a row, whatever the sizes of the images: no tile but the last one has fewer.
inline void set_im2col_tile(HopperGatherGeometry& g) {
  g.log_tile_cols = log2_ceil(kHopperPixels);
  g.tiles = int((std::int64_t(g.images) * g.out_height * g.out_width + kHopperPixels - 1) / kHopperPixels);
  g.parts = g.parts_y = g.taps, g.parts_x = 1;
  g.patch_rows = 1, g.patch_cols = kHopperPixels;
  g.part_bytes = g.copied_bytes = kHopperPixels * g.slot_bytes;
  g.second_bit = 6, g.second = 64 * g.slot_bytes;
}
// The last pixels that im2col takes, as tensor maps count them: from the end of the image on.
inline int im2col_upper(int out, int step, int origin, int in) { return (out - 1) * step + origin - (in - 1); }

// Places in shared memory: stages (patch, weights) | records | barriers.
inline void set_hopper_layout(HopperGatherGeometry& g, int shared_limit) {
  g.weights = g.parts * g.part_bytes;
  g.stage_bytes = g.weights + g.depth * g.taps * (kHopperChannels / kSlice) * kGranuleBytes;
  for (g.stages = kMaxStages; g.stages > 0; --g.stages) {
    g.records = g.stages * g.stage_bytes;
    g.barriers = g.records + (g.stages + kRecordsAhead) * g.depth * g.record_ints * 4;
    g.bytes = g.barriers + (3 * g.stages + kRecordsAhead) * 8;
    if (g.bytes <= shared_limit) return;
  }
}

// What the kernel reads pixels by: a copy is one part of a patch, as many channels deep as a stage.
inline TensorMap hopper_input_map(const HopperGatherGeometry& g, const void* input) {
  const int box[4] = {g.depth * kSlice, g.patch_cols * g.step_x, g.patch_rows * g.step_y, 1 << g.log_tile_images};
  TensorMap map = patch_map(input, 2, g.images, g.in_height, g.in_width, g.in_channels, box, g.slot_bytes);
  map.steps[1] = g.step_x, map.steps[2] = g.step_y;
  if (g.im2col) {
    for (int& side : map.box) side = 0;
    map.im2col = 1, map.channels = kSlice, map.pixels = kHopperPixels;
    map.lower[0] = g.origin_x, map.lower[1] = g.origin_y;
    map.upper[0] = im2col_upper(g.out_width, g.step_x, g.origin_x, g.in_width);
    map.upper[1] = im2col_upper(g.out_height, g.step_y, g.origin_y, g.in_height);
  }
  return map;
}

// The shape of tile with the least work: pixels multiplied and copied. Leaves g.stages below 2 if none fits.
inline void set_best_tile(HopperGatherGeometry& g, int shared_limit) {
  const int log_pixels = log2_ceil(kHopperPixels);
  std::int64_t least = -1;
  HopperGatherGeometry best{};
  for (int rows = g.squares; rows <= log_pixels; ++rows)
    for (int cols = g.squares; rows + cols <= log_pixels; ++cols) {
      if (!set_hopper_tile(g, rows, cols, least)) continue;
      set_hopper_layout(g, shared_limit);
      const std::int64_t work = std::int64_t(g.tiles) * (kHopperPixels + g.patch_slots);
      if (g.stages >= 2 && (least < 0 || work < least)) least = work, best = g;
    }
  g = best;
}

// Why a form does not fit the problem, or an empty string.
inline std::string form_refusal(const HopperGatherGeometry& g, const GatherForm& form, const GatherShape& shape) {
  if (form.granules > 1 && (form.depth > 1 || form.im2col))
    return "products of four granules take patches of 16 channels";
  if (form.depth > 1 && form.im2col) return "im2col copies 16 channels";
  if (g.slices % form.depth)
    return "stages of 32 channels need an even number of slices of 16, got " + std::to_string(g.slices);
  if (form.im2col && shape.fused) return "a fused half block changes patches, which im2col does not copy";
  if (form.im2col && g.phases_y * g.phases_x > 1)
    return "im2col does not copy what the input gradient of a strided convolution reads";
  return "";
}

// Fills `g` and returns "", or says why the kernel cannot run the problem. halved: of a fused half block, whose source
// has half the sides of what is read.
inline std::string hopper_gather_geometry(const ddst_cuda_conv2d_problem& p, bool input_gradient,
                                          const GatherForm& form, int shared_limit, HopperGatherGeometry& g,
                                          const GatherShape& shape = {}, bool halved = false) {
  g = {};
  if (p.dtype != DDST_CUDA_BFLOAT16 && p.dtype != DDST_CUDA_FLOAT16)
    return "the kernel for sm_90a takes bfloat16 and float16";
  const std::string why = gather_facts(p, input_gradient, {kHopperPixels, kHopperChannels, 0}, g, shape);
  if (!why.empty()) return why;
  if (halved) return "the kernel for sm_90a does not upsample what it reads";
  g.squares = shape.squares, g.block_out = p.block_out;
  g.depth = form.depth, g.slot_bytes = form.depth * kSlice * 2, g.im2col = form.im2col;
  const std::string unfit = form_refusal(g, form, shape);
  if (!unfit.empty()) return unfit;
  g.record_ints -= g.padded_taps, g.padded_taps = ceil_div(g.taps + 1, 4) * 4, g.record_ints += g.padded_taps;

  if (form.im2col) {
    g.origin_y = input_gradient ? g.padding_y - g.reach_y : -g.padding_y;
    g.origin_x = input_gradient ? g.padding_x - g.reach_x : -g.padding_x;
    set_im2col_tile(g), set_hopper_layout(g, shared_limit);
    const std::string error = tensor_map_error(hopper_input_map(g, reinterpret_cast<const void*>(256)));  // anywhere
    if (!error.empty()) return "im2col, " + error;
  } else {
    g.stages = 0, set_best_tile(g, shared_limit);
  }
  if (g.stages < 2) return "two stages need more shared memory than " + std::to_string(shared_limit) + " bytes";
  g.tile_sets = ceil_div(g.tiles, form.cluster);
  const std::int64_t items = std::int64_t(g.tile_sets) * g.phases_y * g.phases_x * g.groups;
  if (items >= kPixelLimit) return "too many tiles for one launch";
  g.items = int(items);
  return "";
}

// Packed values as [columns / 16][rows][16]: a copy is a block's share of a slice, granules one after another. The
// forward pass takes 16 columns of all rows, the input gradient 16 rows of all columns.
inline TensorMap hopper_weights_map(const HopperGatherGeometry& g, const void* values, std::int64_t slots,
                                    bool input_gradient) {
  TensorMap map{};
  map.base = values, map.element_bytes = 2, map.rank = 3, map.swizzle = kSwizzle32;
  map.sizes[0] = kSlice, map.sizes[1] = slots * g.block_out, map.sizes[2] = g.block_columns / kSlice;
  map.strides[0] = 2, map.strides[1] = std::int64_t(g.block_columns) * 2, map.strides[2] = kSlice * 2;
  map.box[0] = kSlice, map.box[1] = input_gradient ? kSlice : g.block_out;
  map.box[2] = input_gradient ? g.block_columns / kSlice : 1;
  for (int i = 0; i < 3; ++i) map.steps[i] = 1;
  return map;
}

}  // namespace ddst::cuda
