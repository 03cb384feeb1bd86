// Plans products with panels of pixels (panel.hpp): when they are used, and who computes what.
#pragma once

#include <algorithm>
#include <cmath>

#include "gather_plan.hpp"

namespace ddst::cpu {

// Whether panels are faster than tiles that read pixels where they lie (gather.hpp), which pack the weights of the
// forward pass in each call instead. In multiply-adds: an element that is transposed costs as many as a vector has; a
// tile of gather.hpp that loads a number for each of its vectors takes 1.3 times as long, and longer where its slice
// wastes lanes; a tile of a single vector of pixels 1.25 times. Measured beside each other: docs/notes/cpu-kernels.md.
template <typename T>
bool uses_panels(const Kernels<T>& kernels, const GatherShape& shape, int64_t nnz, bool transposed) {
  constexpr int64_t kLeastChannels = 4;
  if (shape.block_out < kLeastChannels) return false;
  const double lanes = kernels.vector_width, pixels = static_cast<double>(shape.out.pixels());
  const SliceShape slice = choose_slice(kernels.gather_slices, shape.block_out);
  const SliceShape full = choose_slice(kernels.gather_slices, kernels.vector_width);
  const double waste = static_cast<double>(ceil_div(shape.block_out, slice.width) * slice.cost * full.width) /
                       (static_cast<double>(shape.block_out) * full.cost);
  const double loads = slice.width >= 2 * kernels.vector_width ? 1.0 : 1.3;
  const double weights = static_cast<double>(nnz * shape.block_out * shape.block_k);
  const double packed = transposed && shape.block_k > 1 ? lanes * weights : 0;
  const double vectors = std::ceil(pixels / lanes);
  const double tile = vectors > 1 ? 1.0 : 1.25;
  return tile * weights * vectors * lanes +
             lanes * pixels * static_cast<double>(shape.source.channels + shape.out.channels) <
         waste * loads * weights * pixels + packed;
}

// out[pixel][channel] = bias + source times the blocks of the lists. transposed: as in gather_pass.
template <typename T>
void panel_pass(const Kernels<T>& kernels, const GatherShape& shape, const BlockLists& lists, bool transposed,
                const T* values, const T* bias, const T* source, T* out) {
  static constexpr T kZero = 0;
  PanelJob<T> job{};
  job.source = source;
  job.out = out;
  job.pixels = shape.out.pixels();
  job.source_channels = shape.source.channels;
  job.out_channels = shape.out.channels;
  job.ptr = lists.ptr;
  job.ids = lists.ids;
  job.k_block = lists.k_block;
  job.weights = values;
  job.out_step = transposed ? shape.block_k : 1;
  job.k_step = transposed ? 1 : shape.block_out;
  job.init = bias == nullptr ? &kZero : bias;
  job.init_step = bias == nullptr ? 0 : 1;
  job.block_out = static_cast<int>(shape.block_out);
  job.block_k = static_cast<int>(shape.block_k);

  // Panels that stay in L2 beside the weights of a few output blocks.
  constexpr int64_t kGroupPanels = 256 * 1024;
  const int64_t vector_size = kernels.vector_width * shape.source.channels;
  const int64_t vectors = ceil_div(job.pixels, kernels.vector_width);
  job.group_vectors = std::clamp<int64_t>(kGroupPanels / (vector_size * static_cast<int64_t>(sizeof(T))),
                                          kernels.panel_vectors, std::max<int64_t>(vectors, kernels.panel_vectors));

  // Cut where the slowest task has least to do; pixels first, as each task packs those that it needs.
  const int64_t tasks = task_count(job.pixels * lists.nnz * shape.block_out * shape.block_k);
  int64_t pixel_shares = 1, block_shares = 1, least = 0;
  for (int64_t shares = 1; shares <= std::min(tasks, lists.out_blocks); ++shares) {
    const int64_t others = std::min(tasks / shares, vectors);
    int64_t entries = 0;
    for (int64_t share = 0; share < shares; ++share) {
      const int64_t begin = lists.first_block(share, shares), end = lists.first_block(share + 1, shares);
      entries = std::max<int64_t>(entries, lists.ptr[end] - lists.ptr[begin] + end - begin);
    }
    const int64_t k_blocks = ceil_div(shape.source.channels, shape.block_k);
    const int64_t cost = (entries + k_blocks) * ceil_div(vectors, others);
    if (least == 0 || cost < least) {
      least = cost;
      pixel_shares = others;
      block_shares = shares;
    }
  }
  const int64_t most_vectors = std::min(job.group_vectors, ceil_div(vectors, pixel_shares));
  const int64_t panels = most_vectors * vector_size;
  const Buffer<T> memory(panels * pixel_shares * block_shares);
  run_tasks(pixel_shares * block_shares, [&](int64_t task) {
    const int64_t p = task / block_shares, b = task % block_shares;
    kernels.panels(job, vectors * p / pixel_shares, vectors * (p + 1) / pixel_shares,
                   lists.first_block(b, block_shares), lists.first_block(b + 1, block_shares),
                   memory.get() + task * panels);
  });
}

}  // namespace ddst::cpu
