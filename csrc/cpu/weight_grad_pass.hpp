// Weight gradient and block scores as passes over chunks of pixels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

#include "activation.hpp"

namespace ddst::cpu {

// How a weight-gradient job cuts its blocks and its pixels, and how much scratch one task needs.
template <typename T>
struct WeightGradPlan {
  WeightGradJob<T> job{};
  Array<int32_t> order;
  int64_t chunks = 0;
  int64_t input_scratch = 0, grad_scratch = 0, runs = 0, taps = 0;
  int64_t slots = 0;          // partial gradients lie in slots, as values do; some may be free
  int64_t partial_block = 0;  // elements of one block's partial gradient
};

// A slice width of the menu that divides b_in: then partial gradients have the layout of values. Else 0.
inline int slice_over_in(const int* menu, int64_t block_in) {
  for (; *menu != 0; ++menu) {
    if (block_in % *menu == 0) return *menu;
  }
  return 0;
}

// For vectors over output channels: the register width that wastes fewest lanes.
inline int slice_over_out(const int* menu, int vector_width, int64_t block_out) {
  int best = vector_width;
  for (; *menu != 0; ++menu) {
    if (*menu <= vector_width && ceil_div(block_out, *menu) * *menu < ceil_div(block_out, best) * best) best = *menu;
  }
  return best;
}

template <typename T>
WeightGradPlan<T> plan_weight_grad(const Kernels<T>& kernels, const ConvGeometry& geometry, int64_t block_out,
                                   int64_t block_in, int64_t slots, int64_t n_blocks, const int32_t* order,
                                   const int32_t* block_row, const int32_t* block_col, const int32_t* block_tap) {
  WeightGradPlan<T> plan;
  plan.slots = slots;
  WeightGradJob<T>& job = plan.job;
  job.geometry = geometry;
  job.block_out = static_cast<int>(block_out);
  job.block_in = static_cast<int>(block_in);
  job.n_blocks = n_blocks;
  job.block_row = block_row;
  job.block_col = block_col;
  job.block_tap = block_tap;
  plan.taps = geometry.kernel_h * geometry.kernel_w;
  plan.order.assign(order, order + n_blocks);

  const int over_in = slice_over_in(kernels.weight_grad_slices, block_in);
  job.vector_over_in = over_in != 0;
  if (job.vector_over_in) {
    job.slice = over_in;
    job.slices = static_cast<int>(block_in / over_in);
    plan.partial_block = block_out * block_in;
  } else {
    job.slice = slice_over_out(kernels.weight_grad_slices, kernels.vector_width, block_out);
    job.slices = static_cast<int>(ceil_div(block_out, job.slice));
    plan.partial_block = static_cast<int64_t>(job.slices) * job.slice * block_in;
  }
  // Blocks of one row and tap share what registers hold.
  std::stable_sort(plan.order.begin(), plan.order.end(), [&](int32_t a, int32_t b) {
    return block_row[a] != block_row[b] ? block_row[a] < block_row[b] : block_tap[a] < block_tap[b];
  });

  const int64_t whole_in = job.vector_over_in ? block_in : 1, whole_out = job.vector_over_in ? 1 : job.slice;
  job.direct = geometry.stride_w == 1 && (job.vector_over_in || geometry.stride_h == 1) &&
               geometry.in_channels % whole_in == 0 && geometry.out_channels % whole_out == 0 &&
               block_out % whole_out == 0 &&
               (job.vector_over_in ? block_in : job.slice) * static_cast<int64_t>(sizeof(T)) % 64 == 0;

  // A chunk's packed activations should stay in L2, and be long enough to pay for loading the accumulators.
  const int64_t chunk_bytes = (job.vector_over_in ? 384 : 512) * 1024, most_pixels = job.vector_over_in ? 128 : 256;
  const int64_t pixel_bytes = (geometry.in_channels + geometry.out_channels) * static_cast<int64_t>(sizeof(T));
  const int64_t pixels = std::clamp<int64_t>(chunk_bytes / pixel_bytes, 32, most_pixels);
  const int64_t image_pixels = geometry.out_h * geometry.out_w;
  if (image_pixels <= pixels) {
    const int64_t groups = ceil_div(geometry.images * image_pixels, pixels);
    job.chunk_images =
        std::max<int64_t>(1, ceil_div(geometry.images, std::clamp<int64_t>(groups, 1, geometry.images + 1)));
    job.chunk_rows = geometry.out_h;
  } else {
    const int64_t parts = ceil_div(geometry.out_h, std::max<int64_t>(1, pixels / geometry.out_w));
    job.chunk_images = 1;
    job.chunk_rows = ceil_div(geometry.out_h, parts);
  }
  job.row_chunks = ceil_div(geometry.out_h, job.chunk_rows);
  plan.chunks = ceil_div(geometry.images, job.chunk_images) * job.row_chunks;

  const int64_t in_rows = std::min(
      geometry.in_h, (job.chunk_rows - 1) * geometry.stride_h + (geometry.kernel_h - 1) * geometry.dilation_h + 1);
  const int64_t in_pixels = in_rows * geometry.in_w * job.chunk_images;
  job.input_plane = plane_size<T>(in_pixels);
  const int64_t out_lanes = ceil_div(geometry.out_channels, block_out) *
                            (job.vector_over_in ? block_out : static_cast<int64_t>(job.slices) * job.slice);
  plan.runs = plan.taps * job.chunk_rows * (job.direct ? job.chunk_images : 1) + 1;
  // + 1: the kernel spaces its groups by an odd number of pixels.
  if (!job.vector_over_in) {
    plan.input_scratch = job.input_plane * geometry.in_channels;
  } else if (!job.direct) {
    plan.input_scratch = (in_pixels + 1) * ceil_div(geometry.in_channels, block_in) * block_in;
  }
  if (!job.direct) plan.grad_scratch = (job.chunk_rows * geometry.out_w * job.chunk_images + 1) * out_lanes;
  return plan;
}

// Called before a chunk is computed: puts its activations somewhere and points the job there. first: whether the task
// computes the first of the blocks, which one task does for every chunk.
template <typename T>
using ChunkStage = std::function<void(int64_t task, bool first, int64_t chunk, WeightGradJob<T>& job)>;

// Scratch of one task.
template <typename T>
struct WeightGradMemory {
  explicit WeightGradMemory(const WeightGradPlan<T>& plan)
      : input(plan.input_scratch), grad(plan.grad_scratch), runs(plan.runs + 1), run_begin(plan.taps + 1) {}
  Buffer<T> input, grad;
  Array<Run> runs;
  Array<int64_t> run_begin;

  void run(const Kernels<T>& kernels, const WeightGradJob<T>& job, int64_t chunk_begin, int64_t chunk_end,
           int64_t block_begin, int64_t block_end, T* partial) {
    if (chunk_begin == chunk_end || block_begin == block_end) return;
    // runs + 1: the kernel looks at the run before the first.
    kernels.weight_grad(job, chunk_begin, chunk_end, block_begin, block_end, partial, input.get(), grad.get(),
                        runs.data() + 1, run_begin.data());
  }
};

// One block's gradient in the layout of values, with zeros outside the channel counts.
template <typename T>
void finish_block(const WeightGradJob<T>& job, int64_t id, const T* partial, T* out) {
  const int64_t b_out = job.block_out, b_in = job.block_in;
  const int64_t rows = std::min(b_out, job.geometry.out_channels - (job.first_row + job.block_row[id]) * b_out);
  const int64_t cols = std::min(b_in, job.geometry.in_channels - job.block_col[id] * b_in);
  if (job.vector_over_in) {
    if (partial != out) std::memcpy(out, partial, sizeof(T) * b_out * b_in);
  } else {
    const int64_t padded = static_cast<int64_t>(job.slices) * job.slice;
    for (int64_t o = 0; o < b_out; ++o)
      for (int64_t i = 0; i < b_in; ++i) out[o * b_in + i] = partial[i * padded + o];
  }
  // Lanes without a channel were multiplied by packed zeros, which leaves NaN where the other operand is not finite.
  if (cols < b_in) {
    for (int64_t o = 0; o < rows; ++o) std::fill(out + o * b_in + cols, out + (o + 1) * b_in, T(0));
  }
  if (rows < b_out) std::fill(out + rows * b_in, out + b_out * b_in, T(0));
}

// How many shares a weight gradient's pixels are summed in. Where each of the tasks can read both activations and not
// wait for them longer than half the time it computes, tasks share out the blocks alone: one share. Else one a task.
template <typename T>
int64_t pixel_shares(const WeightGradPlan<T>& plan, int64_t multiply_adds, int64_t tasks) {
  if (weight_grad_shares() != 0) return tasks_worth(multiply_adds, weight_grad_shares());
  constexpr int64_t kCachedBytes = 1024 * 1024, kMultiplyAddsPerByte = 3, kLeastBlocks = 8;
  const ConvGeometry& g = plan.job.geometry;
  const int64_t bytes = g.images * static_cast<int64_t>(sizeof(T)) *
                        (g.in_h * g.in_w * g.in_channels + g.out_h * g.out_w * g.out_channels);
  const bool waits = bytes > kCachedBytes && multiply_adds / tasks < 2 * kMultiplyAddsPerByte * bytes;
  return plan.job.direct && !waits && plan.job.n_blocks >= kLeastBlocks * tasks ? 1 : tasks;
}

// Shares of the pixels, and of the blocks: a task each.
struct WeightGradSplit {
  int64_t chunk_tasks, block_tasks;
};

template <typename T>
WeightGradSplit weight_grad_split(const WeightGradPlan<T>& plan) {
  const WeightGradJob<T>& job = plan.job;
  const ConvGeometry& g = job.geometry;
  if (plan.chunks == 0 || job.n_blocks == 0) return {1, 1};
  const int64_t multiply_adds = g.images * g.out_h * g.out_w * job.n_blocks * job.block_out * job.block_in;
  const int64_t tasks = task_count(multiply_adds);
  const int64_t chunk_tasks = std::min(pixel_shares(plan, multiply_adds, tasks), plan.chunks);
  return {chunk_tasks, std::min(std::max<int64_t>(1, tasks / chunk_tasks), job.n_blocks)};
}

// Zeros where a weight gradient [slots][b_out][b_in] has no block.
template <typename T>
void clear_free_slots(const Topology& topology, const WeightGrid& grid, T* grad) {
  const int64_t block_size = grid.block_out * grid.block_in;
  for (int64_t i = topology.nnz; i < topology.slots; ++i) {
    std::fill_n(grad + topology.row_order[i] * block_size, block_size, T(0));
  }
}

// grad [slots][b_out][b_in], of which the free ones are not written. The pixels are cut into shares with a private sum
// each, which are added in a fixed order: the result depends on the number of shares, not on timing.
template <typename T>
void weight_grad_pass(const Kernels<T>& kernels, WeightGradPlan<T>& plan, const T* input, const T* grad_output, T* grad,
                      const ChunkStage<T>& stage = nullptr) {
  WeightGradJob<T>& job = plan.job;
  job.input = input;
  job.grad_output = grad_output;
  job.order = plan.order.data();
  const int64_t block_size = static_cast<int64_t>(job.block_out) * job.block_in;
  if (plan.chunks == 0) {
    std::fill(grad, grad + plan.slots * block_size, T(0));
    return;
  }
  const WeightGradSplit split = weight_grad_split(plan);
  const int64_t chunk_tasks = split.chunk_tasks, block_tasks = split.block_tasks;

  Array<WeightGradMemory<T>> memory;
  Array<Buffer<T>> partials(chunk_tasks);
  for (int64_t i = 0; i < chunk_tasks * block_tasks; ++i) memory.emplace_back(plan);
  for (int64_t i = 0; i < chunk_tasks; ++i) {
    if (i > 0 || !job.vector_over_in) partials[i] = Buffer<T>(plan.slots * plan.partial_block);
  }
  const auto partial = [&](int64_t i) { return i == 0 && job.vector_over_in ? grad : partials[i].get(); };
  const auto finish = [&](int64_t position) {
    const int64_t id = plan.order[position];
    T* const sum = partial(0) + id * plan.partial_block;
    for (int64_t c = 1; c < chunk_tasks; ++c) {
      const T* const other = partial(c) + id * plan.partial_block;
      for (int64_t i = 0; i < plan.partial_block; ++i) sum[i] += other[i];
    }
    finish_block(job, id, sum, grad + id * block_size);
  };
  run_tasks(chunk_tasks * block_tasks, [&](int64_t task) {
    const int64_t c = task / block_tasks, b = task % block_tasks;
    const int64_t begin = job.n_blocks * b / block_tasks, end = job.n_blocks * (b + 1) / block_tasks;
    T* const sum = partial(c);
    for (int64_t i = begin; i < end; ++i) {
      T* const block = sum + plan.order[i] * plan.partial_block;
      std::fill(block, block + plan.partial_block, T(0));
    }
    const int64_t chunk_begin = plan.chunks * c / chunk_tasks, chunk_end = plan.chunks * (c + 1) / chunk_tasks;
    for (int64_t chunk = chunk_begin; stage && chunk < chunk_end; ++chunk) {
      WeightGradJob<T> staged = job;
      stage(task, b == 0, chunk, staged);
      memory[task].run(kernels, staged, chunk, chunk + 1, begin, end, sum);
    }
    if (!stage) memory[task].run(kernels, job, chunk_begin, chunk_end, begin, end, sum);
    for (int64_t i = begin; i < end && chunk_tasks == 1; ++i) finish(i);
  });
  if (chunk_tasks == 1) return;
  const int64_t finish_tasks = task_count(job.n_blocks * plan.partial_block * chunk_tasks);
  run_tasks(finish_tasks, [&](int64_t task) {
    for (int64_t i = job.n_blocks * task / finish_tasks; i < job.n_blocks * (task + 1) / finish_tasks; ++i) finish(i);
  });
}

// scores [rows][cols][taps]: norms of the dense gradient's blocks, a few block rows at a time.
template <typename T>
void block_scores_pass(const Kernels<T>& kernels, const ConvGeometry& g, const WeightGrid& grid, const T* input,
                       const T* grad_output, T* scores) {
  constexpr int64_t kScratchBytes = 2 * 1024 * 1024;
  const int64_t row_blocks = grid.cols * grid.taps;
  const int64_t block_size = grid.block_out * grid.block_in;
  const int64_t row_bytes = row_blocks * block_size * static_cast<int64_t>(sizeof(T));
  const int64_t tasks =
      std::min(task_count(g.images * g.out_h * g.out_w * grid.rows * row_blocks * block_size), grid.rows);
  const int64_t group_rows = std::max<int64_t>(1, std::min(kScratchBytes / row_bytes, ceil_div(grid.rows, tasks)));
  const int64_t groups = ceil_div(grid.rows, group_rows);
  const int64_t runners = std::min(tasks, groups);

  // The blocks of one group of rows; the kernel sees the group as a weight of its own, with shifted output channels.
  const int64_t group_blocks = group_rows * row_blocks;
  Array<int32_t> order(group_blocks), block_row(group_blocks), block_col(group_blocks), block_tap(group_blocks);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t i = 0; i < group_blocks; ++i) {
    block_row[i] = static_cast<int32_t>(i / row_blocks);
    block_col[i] = static_cast<int32_t>(i % row_blocks / grid.taps);
    block_tap[i] = static_cast<int32_t>(i % grid.taps);
  }
  Array<Buffer<T>> sums, blocks;
  Array<WeightGradMemory<T>> memory;
  WeightGradPlan<T> plan = plan_weight_grad(kernels, g, grid.block_out, grid.block_in, group_blocks, group_blocks,
                                            order.data(), block_row.data(), block_col.data(), block_tap.data());
  for (int64_t i = 0; i < runners; ++i) {
    memory.emplace_back(plan);
    sums.emplace_back(group_blocks * plan.partial_block);
    blocks.emplace_back(block_size);
  }
  run_tasks(runners, [&](int64_t task) {
    for (int64_t group = groups * task / runners; group < groups * (task + 1) / runners; ++group) {
      const int64_t first_row = group * group_rows;
      const int64_t rows = std::min(group_rows, grid.rows - first_row);
      WeightGradJob<T> job = plan.job;
      job.input = input;
      job.grad_output = grad_output;
      job.order = plan.order.data();
      job.first_row = first_row;
      const int64_t count = rows * row_blocks;
      T* const sum = sums[task].get();
      std::fill(sum, sum + count * plan.partial_block, T(0));
      memory[task].run(kernels, job, 0, plan.chunks, 0, count, sum);
      for (int64_t id = 0; id < count; ++id) {
        T* const block = blocks[task].get();
        finish_block(job, id, sum + id * plan.partial_block, block);
        double squares = 0;
        for (int64_t i = 0; i < block_size; ++i)
          squares += static_cast<double>(block[i]) * static_cast<double>(block[i]);
        scores[first_row * row_blocks + id] = static_cast<T>(std::sqrt(squares));
      }
    }
  });
}

}  // namespace ddst::cpu
