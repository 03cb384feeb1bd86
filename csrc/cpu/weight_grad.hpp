// The weight-gradient kernel (and block scores, which are norms of it). Included only by kernels_*.cpp.
#pragma once

#include "kernels.hpp"
#include "microkernel.hpp"
#include "pixel_chunks.hpp"

namespace ddst::cpu {
namespace {

// Form 1, the vector over input channels: V vectors, from as many blocks of one row and tap as it takes, x J
// neighbouring output channels.
template <typename T, int N, int V, int J>
__attribute__((noinline)) void outer_tile(const Run* run, const Run* end, const T* const* vectors,
                                          int64_t vector_stride, Operand<T> scalars, T* const* grads,
                                          int64_t grad_stride, const char* next) {
  using S = Simd<T, N>;
  compiler_barrier();
  typename S::V acc[J][V];
  const char* vector[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    vector[v] = reinterpret_cast<const char*>(vectors[v]);
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) acc[j][v] = S::load(grads[v] + j * grad_stride);
  }
  const int64_t x_step = vector_stride * static_cast<int64_t>(sizeof(T)), y_step = scalars.pixel_bytes();
  for (; run != end; ++run) {
    int64_t x = run->in * x_step;
    const char* y = reinterpret_cast<const char*>(scalars.first) + run->out * y_step;
#pragma GCC unroll 2
    for (int64_t i = run->length; i > 0; --i) {
      typename S::V xv[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) xv[v] = S::load_at(vector[v], x);
      outer_step<T, N, V, J>(acc, xv, y);
      x += x_step;
      y += y_step;
      __builtin_prefetch(next, 0, 2);
      next += 64;
    }
  }
  compiler_barrier();
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) S::store(grads[v] + j * grad_stride, acc[j][v]);
  }
}

// Form 2, the vector over output channels: planes of J input channels, from as many blocks as it takes.
template <typename T, int N, int J>
__attribute__((noinline)) void gather_outer_tile(const Run* run, const Run* end, Operand<T> vectors,
                                                 const T* const* planes, T* const* grads, const char* next) {
  using S = Simd<T, N>;
  compiler_barrier();
  constexpr int kTogether = kPixelsTogether<N>;
  typename S::V acc[J][1];
  const char* scalar[J];
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j) {
    acc[j][0] = S::load(grads[j]);
    scalar[j] = reinterpret_cast<const char*>(planes[j]);
  }
  const int64_t y_step = vectors.pixel_bytes();
  for (; run != end; ++run) {
    const char* y = reinterpret_cast<const char*>(vectors.first) + run->out * y_step;
    int64_t offset = run->in * static_cast<int64_t>(sizeof(T)), i = run->length;
    for (; i >= kTogether; i -= kTogether) {
      gather_outer_steps<T, N, J, kTogether>(acc, y, y_step, scalar, offset);
      y += kTogether * y_step;
      offset += kTogether * static_cast<int64_t>(sizeof(T));
#pragma GCC unroll 4
      for (int line = 0; line < kTogether; ++line, next += 64) __builtin_prefetch(next, 0, 2);
    }
    if constexpr (kTogether > 1) {
#pragma GCC unroll 1
      for (; i > 0; --i, y += y_step, offset += sizeof(T))
        gather_outer_steps<T, N, J, 1>(acc, y, y_step, scalar, offset);
    }
  }
  compiler_barrier();  // grads is read again: kept over the loop it would lie in vector registers
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j) S::store(grads[j], acc[j][0]);
}

template <typename T>
using OuterFunction = void (*)(const Run*, const Run*, const T* const*, int64_t, Operand<T>, T* const*, int64_t,
                               const char*);
template <typename T>
using GatherOuterFunction = void (*)(const Run*, const Run*, Operand<T>, const T* const*, T* const*, const char*);

constexpr int kMaxOuter = 16;
constexpr int kMaxVectors = 3;

// Output channels that fit the registers beside so many vectors.
constexpr int most_channels(int registers, int vectors) {
  const int most = (registers - 1 - vectors) / vectors;
  return most < kMaxOuter ? most : kMaxOuter;
}

template <typename T, int N, int kRegisters, int V = 1, int J = 1>
DDST_INLINE void fill_outer(OuterFunction<T> (&table)[kMaxVectors + 1][kMaxOuter + 1]) {
  table[V][J] = &outer_tile<T, N, V, J>;
  if constexpr (J < most_channels(kRegisters, V)) {
    fill_outer<T, N, kRegisters, V, J + 1>(table);
  } else if constexpr (V < kMaxVectors) {
    fill_outer<T, N, kRegisters, V + 1>(table);
  }
}
template <typename T, int N, int kMax, int J = 1>
DDST_INLINE void fill_gather_outer(GatherOuterFunction<T>* table) {
  table[J] = &gather_outer_tile<T, N, J>;
  if constexpr (J < kMax) fill_gather_outer<T, N, kMax, J + 1>(table);
}

// End of the blocks from `position` on that have its row and tap.
template <typename T>
DDST_INLINE int64_t same_row_and_tap(const WeightGradJob<T>& job, int64_t position, int64_t end) {
  const int64_t first = job.order[position];
  while (++position < end && job.block_row[job.order[position]] == job.block_row[first] &&
         job.block_tap[job.order[position]] == job.block_tap[first]) {
  }
  return position;
}

template <typename T, int N, int kRegisters>
void weight_grad_over_in(const WeightGradJob<T>& job, int64_t chunk_begin, int64_t chunk_end, int64_t block_begin,
                         int64_t block_end, T* partial, T* input_scratch, T* grad_scratch, Run* runs,
                         int64_t* run_begin) {
  const auto& g = job.geometry;
  OuterFunction<T> table[kMaxVectors + 1][kMaxOuter + 1];
  fill_outer<T, N, kRegisters>(table);
  const int64_t row_begin = job.first_row + job.block_row[job.order[block_begin]];
  const int64_t row_end = job.first_row + job.block_row[job.order[block_end - 1]] + 1;
  const Grouping in{job.block_in, job.slice, job.slices};
  const Grouping out{job.block_out, job.block_out, 1};
  const int64_t in_blocks = (g.in_channels + in.block - 1) / in.block;
  // Slices of a block share source lines. Beyond them, vectors of whole lines cost more reads than they save.
  const int together = job.slices > 1 ? 2 : N * sizeof(T) < 64 ? kMaxVectors : 1;
  int64_t tiles = 0;
  for (int64_t position = block_begin, end; position < block_end; position = end) {
    end = same_row_and_tap(job, position, block_end);
    tiles += ceil_div((end - position) * job.slices, together);
  }
  tiles *= ceil_div(job.block_out, most_channels(kRegisters, together));
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    const ChunkView<T> view = chunk_view(job, chunk);
    const ChunkRows<T> rows = chunk_rows(job, view);
    const ChunkSide<T> in_side = chunk_side(job.direct, rows.in, g.stride_w, in, 0, in_blocks, input_scratch);
    const ChunkSide<T> out_side = chunk_side(job.direct, rows.out, 1, out, row_begin, row_end, grad_scratch);
    build_runs(job, view, runs, run_begin);
    ChunkPrefetcher prefetcher;
    const int64_t pixels = rows.out.pixels();
    prefetcher.start(job, chunk + 1, chunk_end, tiles);
    for (int64_t position = block_begin, group_end; position < block_end; position = group_end) {
      group_end = same_row_and_tap(job, position, block_end);
      const int64_t id = job.order[position], row = job.first_row + job.block_row[id];
      const Run* begin = runs + run_begin[job.block_tap[id]];
      const Run* end = runs + run_begin[job.block_tap[id] + 1];
      if (begin == end) continue;
      const Operand<T> scalars = out_side.group(row);
      int64_t channels = g.out_channels - row * job.block_out;
      if (channels > job.block_out) channels = job.block_out;
      const int64_t count = (group_end - position) * job.slices, vector_parts = ceil_div(count, together);
      for (int64_t vector_part = 0; vector_part < vector_parts; ++vector_part) {
        const int64_t first = count * vector_part / vector_parts, last = count * (vector_part + 1) / vector_parts;
        const int vector_count = static_cast<int>(last - first);
        const T* vectors[kMaxVectors];
        T* grads[kMaxVectors];
        for (int v = 0; v < vector_count; ++v) {
          const int64_t block = job.order[position + (first + v) / job.slices], slice = (first + v) % job.slices;
          vectors[v] = in_side.group(static_cast<int64_t>(job.block_col[block]) * job.slices + slice).first;
          grads[v] = partial + block * job.block_out * job.block_in + slice * job.slice;
        }
        const int64_t parts = ceil_div(channels, most_channels(kRegisters, vector_count));
        for (int64_t part = 0, j = 0; part < parts; ++part) {
          const int64_t next = channels * (part + 1) / parts;
          table[vector_count][next - j](begin, end, vectors, in_side.pixel_stride, {scalars.first + j, scalars.stride},
                                        grads, job.block_in, prefetcher.next(pixels));
          for (int v = 0; v < vector_count; ++v) grads[v] += (next - j) * job.block_in;
          j = next;
        }
      }
    }
  }
}

template <typename T, int N, int kMaxJ>
void weight_grad_over_out(const WeightGradJob<T>& job, int64_t chunk_begin, int64_t chunk_end, int64_t block_begin,
                          int64_t block_end, T* partial, T* input_scratch, T* grad_scratch, Run* runs,
                          int64_t* run_begin) {
  const auto& g = job.geometry;
  GatherOuterFunction<T> table[kMaxOuter + 1];
  fill_gather_outer<T, N, kMaxJ>(table);
  const int64_t row_begin = job.first_row + job.block_row[job.order[block_begin]];
  const int64_t row_end = job.first_row + job.block_row[job.order[block_end - 1]] + 1;
  const Grouping out{job.block_out, job.slice, job.slices};
  const int64_t padded_out = static_cast<int64_t>(job.slices) * job.slice;
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    const ChunkView<T> view = chunk_view(job, chunk);
    const ChunkRows<T> rows = chunk_rows(job, view);
    pack_planes(job.direct, rows.in, g.stride_w, input_scratch, job.input_plane);
    const ChunkSide<T> out_side = chunk_side(job.direct, rows.out, 1, out, row_begin, row_end, grad_scratch);
    build_runs(job, view, runs, run_begin);
    ChunkPrefetcher prefetcher;
    const int64_t pixels = rows.out.pixels();
    prefetcher.start(job, chunk + 1, chunk_end, ceil_div((block_end - block_begin) * job.block_in, kMaxJ) * job.slices);
    for (int64_t position = block_begin; position < block_end;) {
      // All blocks of one row and tap share the vectors: their input channels fill the registers together.
      const int32_t block_row = job.block_row[job.order[position]], tap = job.block_tap[job.order[position]];
      const int64_t row = job.first_row + block_row;
      const int64_t group_end = same_row_and_tap(job, position, block_end);
      const Run* begin = runs + run_begin[tap];
      const Run* end = runs + run_begin[tap + 1];
      if (begin == end) {
        position = group_end;
        continue;
      }
      // The last block row may end before its last slices: nothing lies there where grad_output is read in place.
      const int64_t room = ceil_div(g.out_channels - row * job.block_out, job.slice);
      const int slices = room < job.slices ? static_cast<int>(room) : job.slices;
      int64_t left = 0;  // input channels of the group that no tile has taken yet
      for (int64_t i = position; i < group_end; ++i) {
        const int64_t rest = g.in_channels - static_cast<int64_t>(job.block_col[job.order[i]]) * job.block_in;
        left += rest < job.block_in ? rest : job.block_in;
      }
      int64_t channel = 0;
      while (position < group_end) {
        const T* planes[kMaxOuter];
        T* grads[kMaxOuter];
        int count = 0;
        const int64_t parts = ceil_div(left, kMaxJ);
        const int64_t most = parts > 0 ? ceil_div(left, parts) : 1;  // tiles of equal size: narrow ones wait for loads
        left -= most;
        while (count < most && position < group_end) {
          const int64_t id = job.order[position];
          const int64_t c = job.block_col[id] * job.block_in + channel;
          if (channel == job.block_in || c >= g.in_channels) {
            channel = 0;
            ++position;
            continue;
          }
          planes[count] = input_scratch + c * job.input_plane;
          grads[count] = partial + (id * job.block_in + channel) * padded_out;
          ++count;
          ++channel;
        }
        for (int slice = 0; slice < slices && count > 0; ++slice) {
          const Operand<T> vectors = out_side.group(row * job.slices + slice);
          table[count](begin, end, vectors, planes, grads, prefetcher.next(pixels));
          for (int j = 0; j < count; ++j) grads[j] += job.slice;
        }
      }
    }
  }
}

}  // namespace
}  // namespace ddst::cpu
