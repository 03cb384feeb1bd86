// Forward and input gradient as one pass: chooses the form of the gather kernel, and runs it.
#pragma once

#include <algorithm>
#include <vector>

#include "gather_plan.hpp"
#include "plane_pass.hpp"

namespace ddst::cpu {

// Whether an output is stored past the caches: lines that are overwritten whole need not be fetched first. Smaller
// outputs are better found in the caches by what comes next.
template <typename T>
bool streams(const T* out, int64_t slice, const ImageShape& shape) {
  constexpr int64_t kLeastBytes = 4 * 1024 * 1024, kLine = 64, kElement = sizeof(T);
  return slice * kElement % kLine == 0 && shape.channels * kElement % kLine == 0 &&
         reinterpret_cast<intptr_t>(out) % kLine == 0 && shape.pixels() * shape.channels * kElement >= kLeastBytes;
}

// Whether vectors run over pixels. With fewer pixels the lists that this takes cost more than it gains.
inline bool runs_over_pixels(const GatherShape& shape, const AxisPlan& rows, const AxisPlan& cols) {
  constexpr int64_t kMostChannels = 4, kLeastPixels = 512;
  return shape.block_out <= kMostChannels && !rows.offset.empty() && !cols.offset.empty() &&
         shape.out.pixels() >= kLeastPixels;
}

// A pass as tasks: tile_shares x block_shares.
struct Split {
  int64_t tile_shares, block_shares;
  int64_t tasks() const { return tile_shares * block_shares; }
};

// Cuts a pass where the slowest task has least to do, in units of one entry's multiply-adds for one pixel. A task packs
// the weights of its blocks for itself where they are packed at all, and fetches the source of its tiles.
inline Split choose_split(const GatherPlan& plan, const GatherShape& shape, const BlockLists& lists, bool packs,
                          int64_t tasks) {
  constexpr double kPackEntry = 10, kReadEntry = 2, kReadLine = 0.3;
  const double pixels = static_cast<double>(shape.out.pixels());
  const double read_pixel = kReadLine * static_cast<double>(shape.source.channels) / 16;
  Split best{1, 1};
  double best_cost = 1e300;
  for (int64_t block_shares = 1; block_shares <= std::min(tasks, lists.out_blocks); ++block_shares) {
    if (tasks % block_shares != 0 && block_shares != lists.out_blocks) continue;
    const int64_t tile_shares = std::min(tasks / block_shares, plan.tiles);
    int64_t entries = 0;  // of the largest share of blocks
    for (int64_t share = 0, begin = 0; share < block_shares; ++share) {
      const int64_t end = lists.first_block(share + 1, block_shares);
      entries = std::max<int64_t>(entries, lists.ptr[end] - lists.ptr[begin] + end - begin);
      begin = end;
    }
    const double share_pixels =
        pixels * static_cast<double>(ceil_div(plan.tiles, tile_shares)) / static_cast<double>(plan.tiles);
    const double cost =
        static_cast<double>(entries) * (share_pixels + (packs ? kPackEntry : kReadEntry)) + share_pixels * read_pixel;
    if (cost < best_cost) {
      best_cost = cost;
      best = {tile_shares, block_shares};
    }
  }
  return best;
}

// Pixels a power of two apart compete for the same lines of an L1 cache of 8 ways, which then holds no tile of more.
inline int64_t tile_pixels_of(const SliceShape& slice, int64_t pixel_bytes) {
  constexpr int64_t kWayBytes = 4096, kWays = 8;
  return pixel_bytes % kWayBytes == 0 ? std::min<int64_t>(slice.tile_pixels, kWays) : slice.tile_pixels;
}

// out = bias + gathered products. transposed: the vector runs over b_out (forward), else over b_in (input gradient).
template <typename T>
void gather_pass(const Kernels<T>& kernels, const GatherShape& shape, const BlockLists& lists, const AxisPlan& rows,
                 const AxisPlan& cols, bool transposed, const T* values, const T* bias, const T* source, T* out) {
  if (runs_over_pixels(shape, rows, cols)) {
    return plane_pass(kernels, shape, lists, rows, cols, transposed, values, bias, source, out);
  }
  const DotShape* dot = choose_dot(kernels.gather_dots, shape.block_out, shape.block_k);
  SliceShape slice = choose_slice(kernels.gather_slices, shape.block_out);
  if (dot != nullptr) slice = {static_cast<int>(shape.block_out), dot->tile_pixels, 0};
  const int64_t slices = ceil_div(shape.block_out, slice.width);
  const int64_t weights_block = slices * slice.width * shape.block_k;

  // Values that are in streaming order already are not copied: [k][channel] with one slice for the whole block, or
  // [channel][k] for a dot.
  const bool whole_slice = slice.width == shape.block_out;
  const bool direct = dot != nullptr ? transposed || shape.block_out == 1 : !transposed && whole_slice;
  const GatherPlan plan =
      plan_gather(shape, lists, rows, cols, tile_pixels_of(slice, shape.source.channels * sizeof(T)), sizeof(T),
                  weights_block * sizeof(T), !direct);
  const Split split = choose_split(plan, shape, lists, !direct, task_count(plan.multiply_adds));

  // Packs the blocks of positions [begin, end) of the lists.
  const auto pack = [&](int64_t begin, int64_t end, T* packed) {
    const int b_out = static_cast<int>(transposed ? shape.block_out : shape.block_k);
    const int b_in = static_cast<int>(transposed ? shape.block_k : shape.block_out);
    const int width = dot != nullptr ? b_out : slice.width;
    if (lists.ids == nullptr) {
      return kernels.pack_weights(values, b_out, b_in, width, transposed || dot != nullptr, begin, end, packed);
    }
    for (int64_t i = begin; i < end; ++i) {
      kernels.pack_weights(values + lists.ids[i] * b_out * b_in, b_out, b_in, width, transposed || dot != nullptr, 0, 1,
                           packed + i * weights_block);
    }
  };
  // Small weights are packed by each task for itself: what another core has packed comes slower than it is packed.
  constexpr int64_t kMostOwnBytes = 512 * 1024;
  const int64_t packed_size = direct ? 0 : lists.nnz * weights_block;
  const bool own = split.tile_shares == 1 || packed_size * static_cast<int64_t>(sizeof(T)) <= kMostOwnBytes;
  const Buffer<T> packed(own ? split.tile_shares * packed_size : packed_size);
  if (!direct && !own) {
    const int64_t tasks = split.tasks();
    run_tasks(tasks,
              [&](int64_t task) { pack(lists.nnz * task / tasks, lists.nnz * (task + 1) / tasks, packed.get()); });
  }

  const int64_t init_size = lists.out_blocks * slices * slice.width;
  std::vector<T> init(init_size, T(0));
  if (bias != nullptr) {
    for (int64_t c = 0; c < shape.out.channels; ++c) {
      init[c / shape.block_out * slices * slice.width + c % shape.block_out] = bias[c];
    }
  }

  GatherJob<T> job;
  job.source = source;
  job.out = out;
  job.source_pixel = shape.source.channels;
  job.source_row = shape.source.w * job.source_pixel;
  job.source_image = shape.source.h * job.source_row;
  job.out_pixel = shape.out.channels;
  job.out_row = shape.out.w * job.out_pixel;
  job.out_image = shape.out.h * job.out_row;
  job.row_base = rows.base.data();
  job.col_base = cols.base.data();
  job.classes = plan.classes.data();
  job.n_classes = static_cast<int64_t>(plan.classes.size());
  job.entries = plan.entries.data();
  job.weights = direct ? values : packed.get();
  job.weights_slice = slice.width * shape.block_k;
  job.init = init.data();
  job.out_blocks = lists.out_blocks;
  job.out_channels = shape.out.channels;
  job.source_channels = shape.source.channels;
  job.block_out = static_cast<int>(shape.block_out);
  job.slice = slice.width;
  job.slices = static_cast<int>(slices);
  job.block_k = static_cast<int>(shape.block_k);
  job.block_k_cut = static_cast<int>(shape.source.channels % shape.block_k);
  job.dot_lanes = dot == nullptr ? 0 : dot->lanes;

  job.stream = streams(out, slice.width, shape.out);

  run_tasks(split.tasks(), [&](int64_t task) {
    const int64_t t = task / split.block_shares, b = task % split.block_shares;
    const int64_t tile_begin = plan.first_tile(t, split.tile_shares);
    const int64_t tile_end = plan.first_tile(t + 1, split.tile_shares);
    const int64_t block_begin = lists.first_block(b, split.block_shares);
    const int64_t block_end = lists.first_block(b + 1, split.block_shares);
    if (tile_begin == tile_end || block_begin == block_end) return;
    GatherJob<T> mine = job;
    if (!direct && own) {
      T* const copy = packed.get() + t * packed_size;
      pack(lists.ptr[block_begin], lists.ptr[block_end], copy);
      mine.weights = copy;
    }
    kernels.gather(mine, tile_begin, tile_end, block_begin, block_end);
  });
}

}  // namespace ddst::cpu
