// Forward and input gradient as one pass: chooses the form of the gather kernel, and runs it.
#pragma once

#include <algorithm>
#include <vector>

#include "plane_gather_pass.hpp"
#include "plane_pass.hpp"

namespace ddst::cpu {

// Whether vectors run over pixels. With fewer pixels the transposition and its lists cost more than they gain.
template <typename T>
bool runs_over_pixels(const Kernels<T>& kernels, const GatherShape& shape, const AxisPlan& rows, const AxisPlan& cols) {
  constexpr int64_t kLeastPixels = 512;
  return shape.block_out <= kernels.most_plane_channels && !rows.offset.empty() && !cols.offset.empty() &&
         shape.out.pixels() >= kLeastPixels;
}

// out = bias + gathered products. transposed: the vector runs over b_out (forward), else over b_in (input gradient).
template <typename T>
void gather_pass(const Kernels<T>& kernels, const GatherShape& shape, const BlockLists& lists, const AxisPlan& rows,
                 const AxisPlan& cols, bool transposed, const T* values, const T* bias, const T* source, T* out) {
  if (runs_over_pixels(kernels, shape, rows, cols)) {
    if (shape.block_out < kernels.plane_slices[0].width)
      return plane_pass(kernels, shape, lists, rows, cols, transposed, values, bias, source, out);
    return plane_gather_pass(kernels, shape, lists, rows, cols, transposed, values, bias, source, out);
  }
  const DotShape* dot = choose_dot(kernels.gather_dots, shape.block_out, shape.block_k);
  SliceShape slice = choose_slice(kernels.gather_slices, shape.block_out);
  if (dot != nullptr) slice = {static_cast<int>(shape.block_out), dot->tile_pixels, 0};
  const PackedWeights<T> weights(kernels, shape, lists.nnz, slice.width, dot != nullptr, transposed, values);
  const std::vector<T> init = sliced_bias(shape, lists.out_blocks, slice.width, bias);
  const GatherPlan plan =
      plan_gather(shape, lists, rows, cols, slice.tile_pixels, sizeof(T), weights.block_size * sizeof(T));

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
  job.weights = weights.data();
  job.weights_slice = weights.slice_size;
  job.init = init.data();
  job.out_blocks = lists.out_blocks;
  job.out_channels = shape.out.channels;
  job.source_channels = shape.source.channels;
  job.block_out = static_cast<int>(shape.block_out);
  job.slice = slice.width;
  job.slices = static_cast<int>(weights.slices);
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
