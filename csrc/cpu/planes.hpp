// The third form of the gather kernel, for output blocks too narrow to fill a register: the vector runs over pixels.
// A chunk of pixels is transposed, one plane a channel, with zeros where a tap leaves the image, so that every tap is a
// shift of the whole plane. All output channels that read one block of source channels through one tap share its loads,
// whichever blocks they belong to. Included only by kernels_*.cpp.
#pragma once

#include "kernels.hpp"
#include "layout.hpp"
#include "microkernel.hpp"

namespace ddst::cpu {
namespace {

// J output channels x (V * N) pixels stay in registers over the source channels of one block (at least one). From read
// and write on, lines are fetched for later: one for each source channel.
template <typename T, int N, int J, int V>
__attribute__((noinline)) void plane_tile(const T* source, int64_t plane, int channels, const T* weights,
                                          T* const* outs, const char* read, const char* write) {
  using S = Simd<T, N>;
  compiler_barrier();
  typename S::V acc[J][V];
#pragma GCC unroll 4
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[j][v] = S::load(outs[j] + v * N);
  }
  const char* x = reinterpret_cast<const char*>(source);
  const char* w = reinterpret_cast<const char*>(weights);
  const int64_t step = plane * static_cast<int64_t>(sizeof(T));
  int k = channels;
  do {
    typename S::V xv[V];
    load_row<T, N, V>(xv, x);
    plane_step<T, N, J, V>(acc, xv, w);
    x += step;
    w += J * sizeof(T);
    __builtin_prefetch(read, 0, 2);
    __builtin_prefetch(write, 1, 2);
    read += 64;
    write += 64;
  } while (--k > 0);
#pragma GCC unroll 4
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) S::store(outs[j] + v * N, acc[j][v]);
  }
}

template <typename T>
using PlaneFunction = void (*)(const T*, int64_t, int, const T*, T* const*, const char*, const char*);

// table[J][V] for 1 .. kPlaneChannels channels and 1 .. kV vectors.
template <typename T, int N, int kV, int J = 1, int V = 1>
DDST_INLINE void fill_planes(PlaneFunction<T> (&table)[kPlaneChannels + 1][kV + 1]) {
  table[J][V] = &plane_tile<T, N, J, V>;
  if constexpr (V < kV) {
    fill_planes<T, N, kV, J, V + 1>(table);
  } else if constexpr (J < kPlaneChannels) {
    fill_planes<T, N, kV, J + 1, 1>(table);
  }
}

// The rows [begin, end) of an image between its NHWC memory and the planes. Rows without padding between them are one
// long row.
template <typename F>
DDST_INLINE void for_rows(int64_t begin, int64_t end, int64_t width, int64_t pitch, const F& f) {
  if (width == pitch) {
    if (begin < end) f(begin, (end - begin) * width);
    return;
  }
  for (int64_t row = begin; row < end; ++row) f(row, width);
}

template <typename T>
void fill_source_planes(const PlaneJob<T>& job, int64_t image, int64_t first_row, int64_t rows, T* planes) {
  const int64_t begin = first_row < 0 ? 0 : first_row;
  const int64_t end = first_row + rows < job.source_h ? first_row + rows : job.source_h;
  const auto at = [&](int64_t row) { return planes + (row - first_row) * job.row_pitch + job.left; };
  for (int64_t row = first_row; row < first_row + rows; ++row) {
    if (row >= 0 && row < job.source_h) continue;
    for (int64_t c = 0; c < job.source_channels; ++c)
      std::memset(at(row) + c * job.source_plane, 0, sizeof(T) * job.source_w);
  }
  for_rows(begin, end, job.source_w, job.row_pitch, [&](int64_t row, int64_t pixels) {
    transpose(job.source + (image * job.source_h + row) * job.source_w * job.source_channels, pixels,
              job.source_channels, job.source_channels, at(row), job.source_plane);
  });
}

template <typename T, int N, int kV>
void run_planes(const PlaneJob<T>& job, int64_t chunk_begin, int64_t chunk_end, T* source_planes, T* out_planes) {
  PlaneFunction<T> table[kPlaneChannels + 1][kV + 1];
  fill_planes<T, N, kV>(table);
  // What no row is written to stays zero: the columns and rows around the images.
  std::memset(source_planes, 0, sizeof(T) * job.source_plane * job.source_channels);
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    const int64_t image_begin = chunk / job.row_chunks * job.chunk_images;
    const int64_t row_begin = chunk % job.row_chunks * job.chunk_rows;
    int64_t images = job.images - image_begin, rows = job.out_h - row_begin;
    if (images > job.chunk_images) images = job.chunk_images;
    if (rows > job.chunk_rows) rows = job.chunk_rows;
    const int64_t positions = (images - 1) * job.image_pitch + rows * job.row_pitch;
    const int64_t vectors = (positions + N - 1) / N;
    const int64_t tiles = (vectors + kV - 1) / kV;

    for (int64_t n = 0; n < images; ++n) {
      T* const planes = source_planes + n * job.image_pitch;
      if (job.chunk_images == 1) {
        fill_source_planes(job, image_begin + n, row_begin - job.top, rows + job.halo_rows, planes);
      } else {  // whole images, whose padding is shared and stays zero
        fill_source_planes(job, image_begin + n, 0, job.source_h, planes + job.top * job.row_pitch);
      }
    }
    for (int64_t c = 0; c < job.out_channels; ++c) {
      T* const plane = out_planes + c * job.out_plane;
      for (int64_t i = 0; i < vectors * N; ++i) plane[i] = job.init[c];
    }
    // Beside the steps, what the next chunk reads and what this one will write is fetched.
    LineStream read, write;
    const int64_t calls = job.n_steps * tiles;
    const int64_t out_row = job.out_w * job.out_channels, source_row = job.source_w * job.source_channels;
    write.start(job.out + (image_begin * job.out_h + row_begin) * out_row, ((images - 1) * job.out_h + rows) * out_row,
                calls);
    if (chunk + 1 < chunk_end) {
      const int64_t next_image = (chunk + 1) / job.row_chunks * job.chunk_images;
      const int64_t next_row = (chunk + 1) % job.row_chunks * job.chunk_rows;
      const int64_t next_rows = job.chunk_images > 1 ? job.chunk_images * job.source_h : job.chunk_rows;
      read.start(job.source + (next_image * job.source_h + next_row) * source_row, next_rows * source_row, calls);
    }
    const auto tile_begin = [&](int64_t tile) { return vectors * tile / tiles * N; };
    for (const PlaneStep* step = job.steps; step != job.steps + job.n_steps; ++step) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t begin = tile_begin(tile), end = tile_begin(tile + 1);
        T* outs[kPlaneChannels];
        for (int j = 0; j < step->outputs; ++j) outs[j] = out_planes + step->output[j] * job.out_plane + begin;
        const bool last = tile + 1 == tiles;
        const PlaneStep* const next = step + last;
        if (next != job.steps + job.n_steps) {  // its accumulators into L1
          const int64_t at = last ? 0 : end;
          for (int j = 0; j < next->outputs; ++j) {
            const T* const line = out_planes + next->output[j] * job.out_plane + at;
            for (int v = 0; v < kV; ++v) __builtin_prefetch(line + v * N, 1, 3);
          }
        }
        table[step->outputs][(end - begin) / N](source_planes + step->source + begin, job.source_plane, step->channels,
                                                job.weights + step->weight, outs, read.take(step->channels),
                                                write.take(step->channels));
      }
    }
    for (int64_t n = 0; n < images; ++n) {
      const T* const planes = out_planes + n * job.image_pitch;
      for_rows(0, rows, job.out_w, job.row_pitch, [&](int64_t row, int64_t pixels) {
        T* const out = job.out + ((image_begin + n) * job.out_h + row_begin + row) * job.out_w * job.out_channels;
        transpose(planes + row * job.row_pitch, job.out_channels, pixels, job.out_plane, out, job.out_channels);
      });
    }
  }
}

}  // namespace
}  // namespace ddst::cpu
