// The form of the gather kernel for output blocks of one to three channels: the vector runs over pixels.
// A chunk of pixels is transposed, one plane a channel, with zeros where a tap leaves the image, so that every tap is a
// shift of the whole plane. All output channels that read one block of source channels through one tap share its loads,
// whichever blocks they belong to. Included only by kernels_*.cpp.
#pragma once

#include "kernels.hpp"
#include "layout.hpp"
#include "microkernel.hpp"

namespace ddst::cpu {
namespace {

// J output channels x V vectors of pixels stay in registers over the source channels of one block (at least one).
template <typename T, int N, int J, int V>
__attribute__((noinline)) void plane_tile(const T* source, int64_t plane, int channels, const T* weights,
                                          T* const* outs, const PlaneVector* vectors) {
  using S = Simd<T, N>;
  compiler_barrier();
  typename S::V acc[J][V];
  const char* x[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    x[v] = reinterpret_cast<const char*>(source + vectors[v].source);
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) acc[j][v] = S::load(outs[j] + vectors[v].out);
  }
  const char* w = reinterpret_cast<const char*>(weights);
  const int64_t step = plane * static_cast<int64_t>(sizeof(T));
  int k = channels;
  do {
    typename S::V xv[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      xv[v] = S::template load_at<0>(x[v]);
      x[v] += step;
    }
    plane_step<T, N, J, V>(acc, xv, w);
    w += J * sizeof(T);
  } while (--k > 0);
  compiler_barrier();  // addresses are read again: kept over the loop they would lie in vector registers
  T* out[J];
#pragma GCC unroll 4
  for (int j = 0; j < J; ++j) out[j] = outs[j];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const int64_t at = vectors[v].out;
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) S::store(out[j] + at, acc[j][v]);
  }
}

template <typename T>
using PlaneFunction = void (*)(const T*, int64_t, int, const T*, T* const*, const PlaneVector*);

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
  const auto at = [&](int64_t row) { return planes + (row - first_row) * job.source_pitch + job.left; };
  for (int64_t row = first_row; row < first_row + rows; ++row) {
    if (row >= 0 && row < job.source_h) continue;
    for (int64_t c = 0; c < job.source_channels; ++c)
      std::memset(at(row) + c * job.source_plane, 0, sizeof(T) * job.source_w);
  }
  for_rows(begin, end, job.source_w, job.source_pitch, [&](int64_t row, int64_t pixels) {
    transpose(job.source + (image * job.source_h + row) * job.source_w * job.source_channels, pixels,
              job.source_channels, job.source_channels, at(row), job.source_plane);
  });
}

// For every kernel row the vectors of a chunk that it reaches from inside the image, one list after the other; begin
// has where each list begins, and where the last one ends.
template <typename T, int N>
void list_vectors(const PlaneJob<T>& job, int64_t images, int64_t row_begin, int64_t rows, PlaneVector* vectors,
                  int64_t* begin) {
  int64_t count = 0;
  for (int64_t k = 0; k < job.kernel_h; ++k) {
    begin[k] = count;
    if (job.row_vectors == 0) {
      const int64_t positions = (images - 1) * job.out_image_pitch + rows * job.out_pitch;
      for (int64_t i = 0; i < positions; i += N) vectors[count++] = {i, i};
      continue;
    }
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t reads = row_begin + row + job.row_offset[k];
        if (reads < 0 || reads >= job.source_h) continue;
        for (int64_t i = 0; i < job.row_vectors; ++i) {
          vectors[count++] = {n * job.source_image_pitch + row * job.source_pitch + i * N,
                              n * job.out_image_pitch + row * job.out_pitch + i * N};
        }
      }
    }
  }
  begin[job.kernel_h] = count;
}

template <typename T, int N, int kV>
void run_planes(const PlaneJob<T>& job, int64_t chunk_begin, int64_t chunk_end, T* source_planes, T* out_planes,
                PlaneVector* vectors, int64_t* vectors_begin) {
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
    list_vectors<T, N>(job, images, row_begin, rows, vectors, vectors_begin);

    for (int64_t n = 0; n < images; ++n) {
      T* const planes = source_planes + n * job.source_image_pitch;
      if (job.chunk_images == 1) {
        fill_source_planes(job, image_begin + n, row_begin - job.top, rows + job.halo_rows, planes);
      } else {  // whole images, whose padding is shared and stays zero
        fill_source_planes(job, image_begin + n, 0, job.source_h, planes + job.top * job.source_pitch);
      }
    }
    for (int64_t c = 0; c < job.out_channels; ++c) {
      T* const plane = out_planes + c * job.out_plane;
      for (int64_t i = 0; i < job.out_plane; ++i) plane[i] = job.init[c];
    }
    // Beside the steps, what the next chunk reads and what this one will write is fetched.
    LineStream read, write;
    const int64_t calls = job.n_steps * ((vectors_begin[1] + kV - 1) / kV);
    const int64_t out_row = job.out_w * job.out_channels, source_row = job.source_w * job.source_channels;
    write.start(job.out + (image_begin * job.out_h + row_begin) * out_row, ((images - 1) * job.out_h + rows) * out_row,
                calls);
    if (chunk + 1 < chunk_end) {
      const int64_t next_image = (chunk + 1) / job.row_chunks * job.chunk_images;
      const int64_t next_row = (chunk + 1) % job.row_chunks * job.chunk_rows;
      const int64_t next_rows = job.chunk_images > 1 ? job.chunk_images * job.source_h : job.chunk_rows;
      read.start(job.source + (next_image * job.source_h + next_row) * source_row, next_rows * source_row, calls);
    }
    for (const PlaneStep* step = job.steps; step != job.steps + job.n_steps; ++step) {
      T* outs[kPlaneChannels];
      for (int j = 0; j < step->outputs; ++j) outs[j] = out_planes + step->output[j] * job.out_plane;
      const PlaneVector* const reached = vectors + vectors_begin[step->kernel_row];
      const int64_t count = vectors_begin[step->kernel_row + 1] - vectors_begin[step->kernel_row];
      const int64_t tiles = (count + kV - 1) / kV;
      for (int64_t tile = 0, begin = 0; tile < tiles; ++tile) {
        const int64_t end = count * (tile + 1) / tiles;
        read.fetch();
        write.fetch();
        table[step->outputs][end - begin](source_planes + step->source, job.source_plane, step->channels,
                                          job.weights + step->weight, outs, reached + begin);
        begin = end;
      }
    }
    for (int64_t n = 0; n < images; ++n) {
      const T* const planes = out_planes + n * job.out_image_pitch;
      for_rows(0, rows, job.out_w, job.out_pitch, [&](int64_t row, int64_t pixels) {
        T* const out = job.out + ((image_begin + n) * job.out_h + row_begin + row) * job.out_w * job.out_channels;
        transpose(planes + row * job.out_pitch, job.out_channels, pixels, job.out_plane, out, job.out_channels);
      });
    }
  }
}

}  // namespace
}  // namespace ddst::cpu
