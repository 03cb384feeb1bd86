// Plans the gather kernel's form whose vectors run over pixels while an output block's sums stay in registers
// (plane_gather.hpp).
#pragma once

#include <algorithm>
#include <numeric>

#include "gather_common.hpp"

namespace ddst::cpu {

// Images side by side for which vectors of so many lanes cover the rows with least waste.
inline int64_t choose_group(int64_t images, int64_t out_w, int64_t lanes) {
  int64_t best = 1, least = 0;
  for (int64_t group : {1, 4, 8, 16, 2}) {
    const int64_t vectors = ceil_div(images, group) * ceil_div(out_w * group, lanes);
    if (least == 0 || vectors < least) {
      best = group;
      least = vectors;
    }
  }
  return best;
}

// What gather_pass computes, for axes of stride 1.
template <typename T>
void plane_gather_pass(const Kernels<T>& kernels, GatherShape shape, const BlockLists& lists, const AxisPlan& rows,
                       const AxisPlan& cols, bool transposed, const T* values, const T* bias, const T* source, T* out) {
  constexpr int64_t kElement = sizeof(T);
  const auto [row_least, row_most] = std::minmax_element(rows.offset.begin(), rows.offset.end());
  const auto [col_least, col_most] = std::minmax_element(cols.offset.begin(), cols.offset.end());
  if (rows.offset.size() * cols.offset.size() == 1 && *row_least == 0 && *col_least == 0) {
    // Pixels that know no neighbours may stand in any rows.
    const int64_t pixels = shape.out.pixels(), width = std::gcd(pixels, int64_t{64});
    for (ImageShape* s : {&shape.source, &shape.out}) {
      if (width >= 16) *s = {1, s->channels, pixels / width, width};
    }
  }
  const SliceShape slice = choose_slice(kernels.plane_slices, shape.block_out);
  const BlockWeights<T> weights(kernels, shape, lists, slice.width, false, transposed, values);
  const Buffer<T> packed = weights.pack_all();
  const Array<T> init = sliced_bias(shape, lists.out_blocks, slice.width, bias);

  PlaneGatherJob<T> job{};
  job.source = source;
  job.out = out;
  job.images = shape.out.images;
  job.source_h = shape.source.h;
  job.source_w = shape.source.w;
  job.source_channels = shape.source.channels;
  job.out_h = shape.out.h;
  job.out_w = shape.out.w;
  job.out_channels = shape.out.channels;
  job.group = choose_group(job.images, job.out_w, kernels.vector_width);
  job.top = std::max<int64_t>(0, -*row_least);
  job.left = std::max<int64_t>(0, -*col_least);
  job.halo_rows = job.top + std::max<int64_t>(0, *row_most);
  const int64_t right = std::max<int64_t>(0, job.out_w + *col_most - job.source_w);
  job.row_pitch = (job.source_w + std::max(job.left, right)) * job.group;

  // The planes of a strip should stay in L2.
  constexpr int64_t kPlanesBytes = 384 * 1024;
  const int64_t tasks = task_count(shape.out.pixels() * lists.nnz * shape.block_out * shape.block_k);
  const int64_t groups = ceil_div(job.images, job.group);
  const int64_t most_rows = kPlanesBytes / (job.row_pitch * job.source_channels * kElement) - job.halo_rows;
  const int64_t strips = std::max(ceil_div(job.out_h, std::max<int64_t>(1, most_rows)), ceil_div(tasks, groups));
  job.strip_rows = ceil_div(job.out_h, std::min(strips, job.out_h));
  job.strips = ceil_div(job.out_h, job.strip_rows);
  const int64_t row_positions = ceil_div(job.out_w * job.group, kernels.vector_width) * kernels.vector_width;
  job.source_plane = plane_size<T>((job.strip_rows + job.halo_rows) * job.row_pitch + row_positions +
                                   (job.left + std::max<int64_t>(0, *col_most)) * job.group);

  Array<int32_t> row_class(job.out_h);
  Array<Entry> entries;
  Array<int64_t> list_begin, list_full;
  const int64_t cut = shape.source.channels % shape.block_k;
  const int64_t last_k_block = ceil_div(shape.source.channels, shape.block_k) - 1;
  job.classes = static_cast<int64_t>(rows.groups.size());
  entries.reserve(lists.nnz * job.classes);
  for (int64_t c = 0; c < job.classes; ++c) {
    const AxisPlan::Group& group = rows.groups[c];
    if (c > 0) {  // class 0 has all others
      for (int32_t row : group.coords) row_class[row] = static_cast<int32_t>(c);
    }
    for (int64_t r = 0; r < lists.out_blocks; ++r) {
      list_begin.push_back(static_cast<int64_t>(entries.size()));
      int64_t full = 0;
      for (int64_t i = lists.ptr[r]; i < lists.ptr[r + 1]; ++i) {
        const int64_t id = lists.id(i), k_block = lists.k_block[id];
        const int64_t kh = lists.tap[id] / shape.kernel_w, kw = lists.tap[id] % shape.kernel_w;
        if (!group.inside[kh]) continue;
        const int64_t at = k_block * shape.block_k * job.source_plane + (job.top + rows.offset[kh]) * job.row_pitch +
                           (job.left + cols.offset[kw]) * job.group;
        entries.push_back({at * kElement, (weights.direct ? id : i) * weights.block_size * kElement});
        // Both list orders put the last reduction block last, so the cut entries are a tail.
        full += cut == 0 || k_block != last_k_block;
      }
      list_full.push_back(list_begin.back() + full);
    }
    list_begin.push_back(static_cast<int64_t>(entries.size()));
  }
  job.row_class = row_class.data();
  job.entries = entries.data();
  job.list_begin = list_begin.data();
  job.list_full = list_full.data();
  job.weights = weights.direct ? values : packed.get();
  job.weights_slice = weights.slice_size;
  job.init = init.data();
  job.stream = shape.block_out % slice.width == 0 && streams(out, 64 / kElement, shape.out);
  job.out_blocks = lists.out_blocks;
  job.block_out = static_cast<int>(shape.block_out);
  job.slice = slice.width;
  job.slices = static_cast<int>(weights.slices);
  job.block_k = static_cast<int>(shape.block_k);
  job.block_k_cut = static_cast<int>(cut);

  const int64_t chunks = groups * job.strips, runners = std::min(tasks, chunks);
  const int64_t planes = job.source_plane * job.source_channels, positions = job.strip_rows * row_positions;
  Array<Buffer<T>> memory;
  Array<Array<const char*>> pixels;
  Array<Array<T*>> outs;
  for (int64_t i = 0; i < runners; ++i) {
    memory.emplace_back(2 * planes + job.out_channels);
    pixels.emplace_back(positions / kernels.vector_width);
    outs.emplace_back(positions);
  }
  run_tasks(runners, [&](int64_t task) {
    T* const scratch = memory[task].get();
    kernels.plane_gather(job, chunks * task / runners, chunks * (task + 1) / runners, scratch, scratch + 2 * planes,
                         pixels[task].data(), outs[task].data());
  });
}

}  // namespace ddst::cpu
