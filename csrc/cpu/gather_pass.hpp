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
  const GatherPlan plan =
      plan_gather(shape, lists, rows, cols, slice.tile_pixels, sizeof(T), weights_block * sizeof(T));

  // Values that are in streaming order already are not copied: [k][channel] with one slice for the whole block, or
  // [channel][k] for a dot.
  const bool whole_slice = slice.width == shape.block_out;
  const bool direct = dot != nullptr ? transposed || shape.block_out == 1 : !transposed && whole_slice;
  Buffer<T> packed;
  if (!direct) {
    packed = Buffer<T>(lists.nnz * weights_block);
    const int b_out = static_cast<int>(transposed ? shape.block_out : shape.block_k);
    const int b_in = static_cast<int>(transposed ? shape.block_k : shape.block_out);
    const int64_t tasks = task_count(lists.nnz * weights_block * 4);
    run_tasks(tasks, [&](int64_t task) {
      kernels.pack_weights(values, b_out, b_in, dot != nullptr ? b_out : slice.width, transposed || dot != nullptr,
                           lists.nnz * task / tasks, lists.nnz * (task + 1) / tasks, packed.get());
    });
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

  // Tiles are shared out first; output blocks too where there are fewer tiles than threads.
  const int64_t tasks = task_count(plan.multiply_adds);
  const int64_t tile_tasks = std::min(tasks, plan.tiles);
  const int64_t block_tasks = std::min(std::max<int64_t>(1, tasks / tile_tasks), lists.out_blocks);
  run_tasks(tile_tasks * block_tasks, [&](int64_t task) {
    const int64_t t = task / block_tasks, b = task % block_tasks;
    kernels.gather(job, plan.tiles * t / tile_tasks, plan.tiles * (t + 1) / tile_tasks,
                   lists.out_blocks * b / block_tasks, lists.out_blocks * (b + 1) / block_tasks);
  });
}

}  // namespace ddst::cpu
