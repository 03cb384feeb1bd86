// Copies of the gather kernel: the patch of pixels, the active weight blocks and the records that list them.
#pragma once
#include <type_traits>

#include "device/primitives.cuh"
#include "gather_geometry.hpp"
#include "tf32x3.cuh"

namespace ddst::cuda {

template <class T>
struct GatherParams {
  dev::global_ptr<const T> input;   // [images, in_height, in_width, in_channels]
  dev::global_ptr<const T> values;  // [nnz, block_out, block_in]
  dev::global_ptr<const int> records;
  dev::global_ptr<const T> bias, residual;  // or null
  dev::global_ptr<T> output;
  int relu;
  GatherGeometry g;
  GatherLayout layout;
};

// Number: what is multiplied (tf32x3.cuh), T: the type of the tensors. kTransposed: the input gradient. Source: what
// pixels go through on their way.
template <class Number_, bool kTransposed_, bool kLarge, class Source_>
struct GatherTraits {
  using Number = Number_;
  using T = stored_t<Number>;
  using Source = Source_;
  using Params = typename Source::template Params<T>;
  static constexpr bool kTransposed = kTransposed_;
  static constexpr GatherTile kTile = gather_tile(kLarge, sizeof(T));
  static constexpr int kStages = kTile.stages, kThreads = kTile.threads(), kRecords = kTile.records();
  static constexpr int kMinBlocks = kLarge ? 1 : sizeof(T) == 2 ? 4 : std::is_same_v<Number, float> ? 3 : 2;  // per SM
  static constexpr int kGranules = kTile.channels / kSlice;  // of 16 output channels
  static constexpr int kPixelTiles = 2;                      // of 16 pixels, per warp
  static constexpr int kVector = 16 / int(sizeof(T));        // elements in 16 bytes
  static constexpr int kChunks = kSlice / kVector;           // 16-byte chunks of a pixel, or of a row of a granule
  static constexpr int kGranuleElements = kSlice * kSlice;
};

// Pixel `m` of the block of threads' tile; images are the fastest dimension, then columns.
DDST_DEVICE GridPixel grid_pixel(const GatherGeometry& g, int m) {
  return {m & ((1 << g.log_tile_images) - 1), m >> (g.log_tile_images + g.log_tile_cols),
          m >> g.log_tile_images & ((1 << g.log_tile_cols) - 1)};
}

// What lies between stored pixels and the product, and behind it: nothing. gather_fused.cuh has the other policy.
struct PlainSource {
  template <class T>
  using Params = GatherParams<T>;
  static constexpr bool kFused = false;
  // The stored pixel of a place in the image, negative if there is none.
  template <class T>
  static DDST_DEVICE int pixel(const GatherParams<T>& p, int image, int y, int x) {
    return (image * p.g.in_height + y) * p.g.in_width + x;
  }
  template <class T>
  static DDST_DEVICE GridPixel grid_pixel(const GatherParams<T>& p, int m) {
    return cuda::grid_pixel(p.g, m);
  }
};

// Place of a 16-byte chunk of a row of kChunks chunks; rows that differ modulo 8 hit 8 different bank groups. The
// pattern repeats after 8 rows.
template <int kChunks>
DDST_DEVICE int swizzled(unsigned row, unsigned chunk) {  // unsigned: divisions by constants are shifts
  static_assert(kChunks == 2 || kChunks == 4);
  return int(row * kChunks + (chunk ^ (row / (8 / kChunks) % kChunks)));
}

// What a block of threads computes.
struct GatherPlace {
  int group, first_image, first_row, first_col;  // of the grid of its phase
  int phase_y, phase_x;                          // of the output pixels
  int tap_phase;                                 // of the taps that these pixels use
};

DDST_DEVICE GatherPlace gather_place(const GatherGeometry& g, int index) {
  GatherPlace place;
  place.group = index % g.groups, index /= g.groups;
  const int phase = index / g.tiles;
  index %= g.tiles;
  place.first_col = index % g.tiles_x << g.log_tile_cols, index /= g.tiles_x;
  place.first_row = index % g.tiles_y << g.log_tile_rows;
  place.first_image = index / g.tiles_y << g.log_tile_images;
  place.phase_y = phase / g.phases_x, place.phase_x = phase % g.phases_x;
  place.tap_phase =
      (place.phase_y + g.padding_y) % g.phases_y * g.phases_x + (place.phase_x + g.padding_x) % g.phases_x;
  return place;
}

// Source row (or column) of grid position 0, offset 0.
template <bool kTransposed>
DDST_DEVICE int source_origin(int padding, int phase, int phases, int reach) {
  return kTransposed ? (phase + padding) / phases - reach : -padding;
}
// Offset of tap row (or column) k.
template <bool kTransposed>
DDST_DEVICE int tap_offset(int k, int phases, int reach) {
  return kTransposed ? reach - k / phases : k;
}

// Fills `sources` (stored pixel of each patch slot, -1 outside) and `shifts` (slots between a pixel's and a tap's).
template <class Traits>
DDST_DEVICE void build_tables(const typename Traits::Params& p, const GatherPlace& place, dev::shared_ptr<int> sources,
                              dev::shared_ptr<int> shifts) {
  const GatherGeometry& g = p.g;
  const int top = place.first_row * g.step_y +
                  source_origin<Traits::kTransposed>(g.padding_y, place.phase_y, g.phases_y, g.reach_y);
  const int left = place.first_col * g.step_x +
                   source_origin<Traits::kTransposed>(g.padding_x, place.phase_x, g.phases_x, g.reach_x);
  for (int slot = dev::thread_index(); slot < g.patch_slots; slot += Traits::kThreads) {
    const int image = place.first_image + slot / g.image_pitch, in_image = slot % g.image_pitch;
    const int row = in_image / g.patch_cols, column = in_image % g.patch_cols;
    const int y = top + row, x = left + column % g.patch_half * g.step_x + column / g.patch_half;
    const bool inside = image < g.images && row < g.patch_rows && y >= 0 && y < g.in_height && x >= 0 && x < g.in_width;
    dev::store(sources + slot, inside ? Traits::Source::pixel(p, image, y, x) : -1);
  }
  const int tap = dev::thread_index();
  if (tap < g.taps) {
    const int dy = tap_offset<Traits::kTransposed>(tap / g.kernel_width, g.phases_y, g.reach_y);
    const int dx = tap_offset<Traits::kTransposed>(tap % g.kernel_width, g.phases_x, g.reach_x);
    dev::store(shifts + tap, dy * g.patch_cols + dx % g.step_x * g.patch_half + dx / g.step_x);
  }
}

// The record of (phase of the taps, group of output blocks, input block):
// [number of blocks, 0, 0, 0 | per tap: bit n set if channels 16 n .. 16 n + 15 of the group have a block | blocks'
// slots].
template <class Traits>
DDST_DEVICE void stage_record(const GatherParams<typename Traits::T>& p, const GatherPlace& place,
                              dev::shared_ptr<int> target, int slice) {
  const std::int64_t line =
      std::int64_t(place.tap_phase * p.g.groups + place.group) * p.g.in_blocks + (slice >> p.g.log_slices_per_block);
  const int i = dev::thread_index() * 4;
  if (i < p.g.record_ints) dev::cp_async16(target + i, p.records + (line * p.g.record_ints + i), 16);
}

// In both copies a thread keeps to one chunk of a row, and its rows are a multiple of 8 apart: one place in the
// swizzle. It looks up several rows before it copies them, as each look-up has to be waited for.
constexpr int kLookUps = 4;

template <class Traits>
DDST_DEVICE void stage_patch(const GatherParams<typename Traits::T>& p, dev::shared_ptr<typename Traits::T> patch,
                             dev::shared_ptr<int> sources, int slice) {
  constexpr int kChunks = Traits::kChunks, kRows = Traits::kThreads / kChunks;
  static_assert(kRows % 8 == 0);
  const unsigned thread = dev::thread_index(), chunk = thread % kChunks;
  const int channel = slice * kSlice + int(chunk) * Traits::kVector, slots = p.g.patch_slots;
  const bool inside = channel < p.g.in_channels;
  const auto input = p.input + (inside ? channel : 0);
  auto target = patch + swizzled<kChunks>(thread / kChunks, chunk) * Traits::kVector;
  for (int slot = thread / kChunks; slot < slots; slot += kLookUps * kRows) {
    int source[kLookUps];
    DDST_UNROLL
    for (int i = 0; i < kLookUps; ++i)
      if (slot + i * kRows < slots) source[i] = dev::load(sources + (slot + i * kRows));
    DDST_UNROLL
    for (int i = 0; i < kLookUps; ++i) {
      if (slot + i * kRows >= slots) break;
      const auto pixel = unsigned(source[i] < 0 ? 0 : source[i]);
      dev::cp_async16(target + i * kRows * kSlice,
                      input + std::int64_t(std::uint64_t(pixel) * unsigned(p.g.in_channels)),
                      inside && source[i] >= 0 ? 16 : 0);
    }
    target = target + kLookUps * kRows * kSlice;
  }
}

// The listed blocks' share of a slice, as granules of 16 x 16 in the order of the record. A granule is [output
// channel][input channel]; of the input gradient, whose output channels are a block's columns, [input][output].
template <class Traits>
DDST_DEVICE void stage_weights(const GatherParams<typename Traits::T>& p, dev::shared_ptr<typename Traits::T> weights,
                               dev::shared_ptr<int> record, int slice) {
  constexpr int kChunks = Traits::kChunks, kRows = Traits::kThreads / kChunks;
  const int log_side = p.g.log_channels_per_block, columns = p.g.block_columns;
  const int first = (slice & ((1 << p.g.log_slices_per_block) - 1)) * kSlice;
  const auto ids = record + (kRecordHeader + p.g.padded_taps);
  const unsigned thread = dev::thread_index(), chunk = thread % kChunks;
  auto target = weights + swizzled<kChunks>(thread / kChunks, chunk) * Traits::kVector;
  const auto values = p.values + (int(chunk) * Traits::kVector + first * (Traits::kTransposed ? columns : 1));
  const int rows = dev::load(record) << log_side;
  for (int row = thread / kChunks; row < rows; row += kLookUps * kRows) {
    int id[kLookUps];
    DDST_UNROLL
    for (int i = 0; i < kLookUps; ++i)
      if (row + i * kRows < rows) id[i] = dev::load(ids + ((row + i * kRows) >> log_side));
    DDST_UNROLL
    for (int i = 0; i < kLookUps; ++i) {
      if (row + i * kRows >= rows) break;
      const unsigned line = unsigned(row + i * kRows) & ((1u << log_side) - 1);  // of its block's granules
      const unsigned place =
          Traits::kTransposed ? line % kSlice * unsigned(columns) + line / kSlice * kSlice : line * unsigned(columns);
      const auto block = std::uint64_t(unsigned(id[i])) * unsigned(p.g.block_elements);
      dev::cp_async16(target + i * kRows * kSlice, values + std::int64_t(block + place), 16);
    }
    target = target + kLookUps * kRows * kSlice;
  }
}

}  // namespace ddst::cuda
