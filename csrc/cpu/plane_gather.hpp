// The gather kernel for output blocks that fill part of a register: the vector runs over pixels, of which each channel
// is a plane. The sums of one output block stay in registers while its entry list streams past. Included only by
// kernels_*.cpp.
#pragma once

#include "kernels.hpp"
#include "layout.hpp"
#include "microkernel.hpp"

namespace ddst::cpu {
namespace {

// What one tile needs beside its pixels: one slice of an output block.
template <typename T>
struct PlaneTileWork {
  const Entry* begin;
  const Entry* full_end;  // entries up to here reduce over block_k channels, the others over k_cut
  const Entry* end;
  const char* weights;
  const T* init;
  int64_t plane_bytes;  // from one source channel to the next
  int block_k, k_cut;
};

// Channels of a pixel that are written together: a cache line.
template <typename T>
constexpr int kPanel = 64 / sizeof(T);

// x[v] = V vectors, offset bytes from each base.
template <typename T, int N, int V>
DDST_INLINE void load_vectors(typename Simd<T, N>::V (&x)[V], const char* const (&base)[V], int64_t offset) {
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) x[v] = Simd<T, N>::load_at(base[v], offset);
}

// panel[position * kPanel + j] = output channel j of J, for V vectors of positions. From read and write on, lines are
// fetched for later: one at each entry.
template <typename T, int N, int J, int V>
__attribute__((noinline)) void plane_gather_tile(const char* const* pixels, T* panel, const PlaneTileWork<T>& work,
                                                 const char* read, const char* write) {
  using S = Simd<T, N>;
  compiler_barrier();
  typename S::V acc[J][V];
  const char* pixel[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) pixel[v] = pixels[v];
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      acc[j][v] = S::template broadcast_at<0>(reinterpret_cast<const char*>(work.init + j), 0);
  }
  const int64_t plane = work.plane_bytes;
  int channels = work.block_k;
#pragma GCC unroll 1
  for (const Entry* entry = work.begin; entry != work.end; ++entry) {
    if (entry == work.full_end) channels = work.k_cut;
    int64_t offset = entry->source;
    const char* w = work.weights + entry->weight;
    int k = channels;
    do {
      typename S::V x[V];
      load_vectors<T, N, V>(x, pixel, offset);
      plane_step<T, N, J, V>(acc, x, w);
      offset += plane;
      w += J * sizeof(T);
    } while (--k > 0);
    __builtin_prefetch(read, 0, 2);
    __builtin_prefetch(write, 1, 2);
    read += 64;
    write += 64;
  }
  alignas(64) T sums[J * V * N];
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) S::store(sums + (j * V + v) * N, acc[j][v]);
  }
  transpose(sums, J, V * N, V * N, panel, kPanel<T>);
}

// The first channels of each position, to outs[position] + out_channel.
template <typename T, int N>
void store_panel(const T* panel, int64_t positions, int channels, T* const* outs, int64_t out_channel, bool stream) {
  if (channels < kPanel<T>) {
    for (int64_t i = 0; i < positions; ++i)
      std::memcpy(outs[i] + out_channel, panel + i * kPanel<T>, sizeof(T) * channels);
    return;
  }
  for (int64_t i = 0; i < positions; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < kPanel<T>; c += N) {
      const typename Simd<T, N>::V x = Simd<T, N>::load(panel + i * kPanel<T> + c);
      T* const out = outs[i] + out_channel + c;
      if (stream) {
        Simd<T, N>::stream(out, x);
      } else {
        Simd<T, N>::store(out, x);
      }
    }
  }
}

template <typename T>
using PlaneGatherFunction = void (*)(const char* const*, T*, const PlaneTileWork<T>&, const char*, const char*);

// The functions for 1 .. kV vectors.
template <typename T, int N, int J, int kV, int V = 1>
DDST_INLINE void fill_plane_tiles(PlaneGatherFunction<T>* table) {
  table[V] = &plane_gather_tile<T, N, J, V>;
  if constexpr (V < kV) fill_plane_tiles<T, N, J, kV, V + 1>(table);
}

// A strip of rows of a group of images.
struct PlaneChunk {
  int64_t image_begin, images, row_begin, rows;
};

template <typename T>
DDST_INLINE PlaneChunk plane_chunk(const PlaneGatherJob<T>& job, int64_t chunk) {
  PlaneChunk c{chunk / job.strips * job.group, job.group, chunk % job.strips * job.strip_rows, job.strip_rows};
  if (c.images > job.images - c.image_begin) c.images = job.images - c.image_begin;
  if (c.rows > job.out_h - c.row_begin) c.rows = job.out_h - c.row_begin;
  return c;
}

// The source rows that a chunk needs, transposed into its planes a piece at a time: up to 16 pixels of a row, or one
// column of it where images stand side by side.
template <typename T>
struct ChunkFill {
  static constexpr int64_t kPixels = 16;
  const PlaneGatherJob<T>& job;
  PlaneChunk chunk{};
  T* planes = nullptr;
  int64_t first = 0, row = 0, end = 0, column = 0;  // row and column: of the next piece; none is left from end on
  int64_t columns = 0, left = 0;                    // pieces of a row, pieces that are left

  DDST_INLINE explicit ChunkFill(const PlaneGatherJob<T>& job) : job(job) {}
  DDST_INLINE void start(const PlaneChunk& c, T* to) {
    chunk = c;
    planes = to;
    first = c.row_begin - job.top;
    row = first < 0 ? 0 : first;
    end = first + c.rows + job.halo_rows;
    if (end > job.source_h) end = job.source_h;
    column = 0;
    columns = job.group == 1 ? (job.source_w + kPixels - 1) / kPixels : job.source_w;
    left = (end - row) * columns;
  }
  // Leaves `keep` pieces for later, or none.
  DDST_INLINE void advance(int64_t keep) {
    const int64_t channels = job.source_channels;
    for (; left > 0 && left > keep; --left) {
      T* const to = planes + (row - first) * job.row_pitch + job.left * job.group;
      const T* const from = job.source + (chunk.image_begin * job.source_h + row) * job.source_w * channels;
      if (job.group == 1) {
        const int64_t at = column * kPixels, pixels = job.source_w - at < kPixels ? job.source_w - at : kPixels;
        transpose(from + at * channels, pixels, channels, channels, to + at, job.source_plane);
      } else {
        const int64_t image = job.source_h * job.source_w * channels;
        transpose(from + column * channels, chunk.images, channels, image, to + column * job.group, job.source_plane);
      }
      if (++column == columns) column = 0, ++row;
    }
  }
};

// Where each position of row `row` is written; what is no pixel goes to spare.
template <typename T>
void place_row(const PlaneGatherJob<T>& job, const PlaneChunk& c, int64_t row, int64_t positions, T* spare, T** outs) {
  for (int64_t i = 0; i < positions; ++i) {
    const int64_t n = i % job.group, col = i / job.group;
    const int64_t pixel = ((c.image_begin + n) * job.out_h + row) * job.out_w + col;
    outs[i] = n < c.images && col < job.out_w ? job.out + pixel * job.out_channels : spare;
  }
}

// Slices of J output channels.
template <typename T, int N, int J, int kV>
void run_plane_gather(const PlaneGatherJob<T>& job, int64_t chunk_begin, int64_t chunk_end, T* planes, T* spare,
                      const char** pixels, T** outs) {
  PlaneGatherFunction<T> table[kV + 1];
  fill_plane_tiles<T, N, J, kV>(table);
  // What no row is written to stays zero: the columns around the images.
  const int64_t chunk_elements = job.source_plane * job.source_channels;
  std::memset(planes, 0, sizeof(T) * chunk_elements * (chunk_end - chunk_begin > 1 ? 2 : 1));
  T* next_planes = planes + chunk_elements;
  ChunkFill<T> fill(job);
  if (chunk_begin < chunk_end) fill.start(plane_chunk(job, chunk_begin), planes);
  const int64_t row_vectors = (job.out_w * job.group + N - 1) / N;
  const int64_t slices = job.out_blocks * job.slices;
  // Slices that together make a panel, where they hold neighbouring channels.
  const int64_t panel_slices = job.block_out % J == 0 ? kPanel<T> / J : 1;
  PlaneTileWork<T> work{};
  work.plane_bytes = job.source_plane * static_cast<int64_t>(sizeof(T));
  work.block_k = job.block_k;
  work.k_cut = job.block_k_cut;
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    const PlaneChunk c = plane_chunk(job, chunk);
    fill.advance(0);
    // Beside the tiles, what the next chunk reads is fetched and then transposed, and what this one will write fetched.
    LineStream read, write;
    const int64_t calls = slices * ((c.rows * row_vectors + kV - 1) / kV);
    const int64_t out_row = job.out_w * job.out_channels, source_row = job.source_w * job.source_channels;
    if (!job.stream)
      write.start(job.out + (c.image_begin * job.out_h + c.row_begin) * out_row,
                  ((c.images - 1) * job.out_h + c.rows) * out_row, calls);
    if (chunk + 1 < chunk_end) {
      const PlaneChunk next = plane_chunk(job, chunk + 1);
      fill.start(next, next_planes);
      read.start(job.source + (next.image_begin * job.source_h + next.row_begin) * source_row,
                 ((next.images - 1) * job.source_h + next.rows) * source_row, calls);
    }
    const int64_t pieces = fill.left;
    int64_t call = 0;
    for (int64_t cls = 0; cls < job.classes; ++cls) {
      int64_t vectors = 0;
      for (int64_t row = c.row_begin; row < c.row_begin + c.rows; ++row) {
        if (job.row_class[row] != cls) continue;
        place_row(job, c, row, row_vectors * N, spare, outs + vectors * N);
        const T* const first = planes + (row - c.row_begin) * job.row_pitch;
        for (int64_t v = 0; v < row_vectors; ++v) pixels[vectors++] = reinterpret_cast<const char*>(first + v * N);
      }
      const int64_t tiles = (vectors + kV - 1) / kV;
      const int64_t* const list_begin = job.list_begin + cls * (job.out_blocks + 1);
      for (int64_t first = 0; first < slices && tiles > 0; first += panel_slices) {
        const int64_t last = first + panel_slices < slices ? first + panel_slices : slices;
        const int64_t out_channel = first / job.slices * job.block_out + first % job.slices * J;
        const int64_t last_block = (last - 1) / job.slices * job.block_out, in_block = (last - 1) % job.slices * J;
        int64_t end_channel = last_block + (in_block + J < job.block_out ? in_block + J : job.block_out);
        if (end_channel > job.out_channels) end_channel = job.out_channels;
        if (end_channel <= out_channel) break;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t begin = vectors * tile / tiles, end = vectors * (tile + 1) / tiles;
          alignas(64) T panel[kV * N * kPanel<T>];
          for (int64_t slice = first; slice < last; ++slice) {
            const int64_t block = slice / job.slices;
            work.begin = job.entries + list_begin[block];
            work.full_end = job.entries + job.list_full[cls * job.out_blocks + block];
            work.end = job.entries + list_begin[block + 1];
            work.weights = reinterpret_cast<const char*>(job.weights + slice % job.slices * job.weights_slice);
            work.init = job.init + slice * J;
            const int64_t entries = work.end - work.begin;
            table[end - begin](pixels + begin, panel + (slice - first) * J, work, read.take(entries),
                               write.take(entries));
            fill.advance(pieces - pieces * ++call / calls);
          }
          store_panel<T, N>(panel, (end - begin) * N, static_cast<int>(end_channel - out_channel), outs + begin * N,
                            out_channel, job.stream);
        }
      }
    }
    T* const done = planes;
    planes = next_planes;
    next_planes = done;
  }
  if (job.stream) stream_fence();
}

}  // namespace
}  // namespace ddst::cpu
