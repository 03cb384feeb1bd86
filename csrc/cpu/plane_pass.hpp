// Plans the gather kernel's form for output blocks of one to three channels (planes.hpp).
#pragma once

#include <algorithm>
#include <numeric>

#include "gather_plan.hpp"

namespace ddst::cpu {

// Steps of the kernel: the output channels that read one block of source channels through one tap, a few at a time.
template <typename T>
struct PlaneLists {
  Array<PlaneStep> steps;
  Array<T> weights;
};

// values[id][k * k_stride + c * channel_stride]: channel k of the reduction, channel c of the output block.
template <typename T>
PlaneLists<T> plane_lists(const GatherShape& shape, const BlockLists& lists, const Array<int64_t>& tap_offset,
                          int64_t source_plane, const T* values, int64_t k_stride, int64_t channel_stride) {
  struct Output {
    int64_t channel;
    const T* weights;
  };
  const int64_t taps = static_cast<int64_t>(tap_offset.size());
  const int64_t keys = ceil_div(shape.source.channels, shape.block_k) * taps;
  const auto for_blocks = [&](const auto& f) {
    for (int64_t r = 0; r < lists.out_blocks; ++r) {
      const int64_t channels = std::min(shape.block_out, shape.out.channels - r * shape.block_out);
      for (int64_t i = lists.ptr[r]; i < lists.ptr[r + 1]; ++i) {
        const int64_t id = lists.id(i);
        f(lists.k_block[id] * taps + lists.tap[id], r, id, channels);
      }
    }
  };
  // readers[ends[key - 1] .. ends[key]): the output channels of one block of source channels and one tap.
  Array<int64_t> ends(keys + 1, 0);
  for_blocks([&](int64_t key, int64_t, int64_t, int64_t channels) { ends[key + 1] += channels; });
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  Array<Output> readers(ends[keys]);
  for_blocks([&](int64_t key, int64_t r, int64_t id, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) {
      readers[ends[key]++] = {r * shape.block_out + c,
                              values + id * shape.block_out * shape.block_k + c * channel_stride};
    }
  });
  PlaneLists<T> found;
  found.weights.resize(static_cast<int64_t>(readers.size()) * shape.block_k);
  found.steps.reserve(readers.size() / kPlaneChannels + keys);
  T* weight = found.weights.data();
  for (int64_t key = 0; key < keys; ++key) {
    const Output* const list = readers.data() + (key > 0 ? ends[key - 1] : 0);
    const int64_t first_k = key / taps * shape.block_k;
    const int64_t channels = std::min(shape.block_k, shape.source.channels - first_k);
    const int64_t count = readers.data() + ends[key] - list, parts = ceil_div(count, kPlaneChannels);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
      PlaneStep step{};
      step.source = first_k * source_plane + tap_offset[key % taps];
      step.weight = weight - found.weights.data();
      step.outputs = static_cast<int>(end - begin);
      step.channels = static_cast<int>(channels);
      step.kernel_row = static_cast<int>(key % taps / shape.kernel_w);
      for (int64_t i = begin; i < end; ++i) step.output[i - begin] = list[i].channel;
      for (int64_t k = 0; k < channels; ++k)
        for (int64_t i = begin; i < end; ++i) *weight++ = list[i].weights[k * k_stride];
      found.steps.push_back(step);
    }
  }
  return found;
}

// What gather_pass computes, for axes of stride 1.
template <typename T>
void plane_pass(const Kernels<T>& kernels, GatherShape shape, const BlockLists& lists, const AxisPlan& rows,
                const AxisPlan& cols, bool transposed, const T* values, const T* bias, const T* source, T* out) {
  const auto [row_least, row_most] = std::minmax_element(rows.offset.begin(), rows.offset.end());
  const auto [col_least, col_most] = std::minmax_element(cols.offset.begin(), cols.offset.end());
  if (rows.offset.size() * cols.offset.size() == 1 && *row_least == 0 && *col_least == 0) {  // pixels without images
    for (ImageShape* s : {&shape.source, &shape.out}) *s = {1, s->channels, s->pixels(), 1};
  }
  PlaneJob<T> job{};
  job.source = source;
  job.out = out;
  job.images = shape.out.images;
  job.source_h = shape.source.h;
  job.source_w = shape.source.w;
  job.source_channels = shape.source.channels;
  job.out_h = shape.out.h;
  job.out_w = shape.out.w;
  job.out_channels = shape.out.channels;
  job.left = std::max<int64_t>(0, -*col_least);
  job.top = std::max<int64_t>(0, -*row_least);
  job.halo_rows = job.top + std::max<int64_t>(0, *row_most);
  const int64_t right = std::max<int64_t>(0, job.out_w + *col_most - job.source_w);
  const int64_t bottom = std::max<int64_t>(0, job.out_h + *row_most - job.source_h);
  // Vectors that end with a row skip the rows that a tap has outside the image, but must not waste lanes on it.
  const int64_t row_vectors = ceil_div(job.out_w, kernels.vector_width);
  job.source_pitch = std::max(job.source_w + std::max(job.left, right), job.out_w);
  job.row_vectors = row_vectors * kernels.vector_width <= job.source_pitch ? row_vectors : 0;
  job.out_pitch = job.row_vectors > 0 ? row_vectors * kernels.vector_width : job.source_pitch;
  const int64_t image_rows = std::max(job.source_h + std::max(job.top, bottom), job.out_h);
  job.source_image_pitch = image_rows * job.source_pitch;
  job.out_image_pitch = (job.row_vectors > 0 ? job.out_h : image_rows) * job.out_pitch;
  job.row_offset = rows.offset.data();
  job.kernel_h = static_cast<int64_t>(rows.offset.size());

  // The planes of a chunk should stay in L2, and be long enough to pay for loading the accumulators.
  constexpr int64_t kPlanesBytes = 640 * 1024;
  const int64_t pixel_bytes = (job.source_channels + job.out_channels) * static_cast<int64_t>(sizeof(T));
  const int64_t multiply_adds = shape.out.pixels() * lists.nnz * shape.block_out * shape.block_k;
  const int64_t tasks = task_count(multiply_adds);
  const int64_t share = ceil_div(job.images * job.source_image_pitch, tasks);
  const int64_t positions = std::min(share, std::clamp<int64_t>(kPlanesBytes / pixel_bytes, 64, 2048));
  job.chunk_images = std::clamp<int64_t>(positions / job.source_image_pitch, 1, job.images);
  const int64_t strips = job.chunk_images > 1 ? 1 : ceil_div(job.out_h * job.source_pitch, positions);
  job.chunk_rows = ceil_div(job.out_h, std::min(strips, job.out_h));
  job.row_chunks = ceil_div(job.out_h, job.chunk_rows);
  const auto chunk_positions = [&](int64_t pitch, int64_t image_pitch) {
    return job.chunk_images > 1 ? job.chunk_images * image_pitch : job.chunk_rows * pitch;
  };
  const int64_t out_positions = chunk_positions(job.out_pitch, job.out_image_pitch) + kernels.vector_width;
  const int64_t halo = job.halo_rows * job.source_pitch + job.left + std::max<int64_t>(0, *col_most);
  job.out_plane = plane_size<T>(out_positions);
  job.source_plane =
      plane_size<T>(chunk_positions(job.source_pitch, job.source_image_pitch) + halo + kernels.vector_width);
  Array<int64_t> tap_offset;
  for (int64_t row : rows.offset)
    for (int64_t col : cols.offset) tap_offset.push_back((row + job.top) * job.source_pitch + col + job.left);
  const PlaneLists<T> plane_steps =
      transposed ? plane_lists(shape, lists, tap_offset, job.source_plane, values, 1, shape.block_k)
                 : plane_lists(shape, lists, tap_offset, job.source_plane, values, shape.block_out, 1);
  job.steps = plane_steps.steps.data();
  job.n_steps = static_cast<int64_t>(plane_steps.steps.size());
  job.weights = plane_steps.weights.data();
  Array<T> init(job.out_channels, T(0));
  if (bias != nullptr) std::copy(bias, bias + job.out_channels, init.begin());
  job.init = init.data();

  const int64_t chunks = ceil_div(job.images, job.chunk_images) * job.row_chunks;
  const int64_t runners = std::min(tasks, chunks);
  const int64_t most_vectors = ceil_div(out_positions, kernels.vector_width) * job.kernel_h;
  Array<Buffer<T>> source_planes, out_planes;
  Array<Array<PlaneVector>> vectors(runners, Array<PlaneVector>(most_vectors));
  Array<Array<int64_t>> vectors_begin(runners, Array<int64_t>(job.kernel_h + 1));
  for (int64_t i = 0; i < runners; ++i) {
    source_planes.emplace_back(job.source_plane * job.source_channels);
    out_planes.emplace_back(job.out_plane * job.out_channels);
  }
  run_tasks(runners, [&](int64_t task) {
    kernels.planes(job, chunks * task / runners, chunks * (task + 1) / runners, source_planes[task].get(),
                   out_planes[task].get(), vectors[task].data(), vectors_begin[task].data());
  });
}

}  // namespace ddst::cpu
