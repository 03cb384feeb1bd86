// Products with pixels that know no neighbours: forward and input gradient of linear layers. Pixels are packed once a
// call into panels, tile by tile, and the vector runs over pixels; the weights are read where they lie. Included only
// by kernels_*.cpp.
//
// A panel holds a tile of V vectors of N pixels as [channel][pixel]: what one block of the weight multiplies is one
// stretch of memory, whatever lies between the pixels of the activation (4 KB, say, which would make them compete for
// the same lines of the L1 cache). One step of the reduction loads V vectors and J numbers for J * V multiply-adds,
// where a tile of neighbouring channels loads one number a multiply-add.
#pragma once

#include "kernels.hpp"
#include "layout.hpp"
#include "microkernel.hpp"

namespace ddst::cpu {
namespace {

// Pixels [0, pixels) of source as a panel of kPixels; lanes without one are zero.
template <typename T, int N, int kPixels>
void fill_panel(const T* source, int64_t pixels, int64_t channels, T* panel) {
  constexpr int kLine = 64 / sizeof(T);
  for (int64_t first = 0; first < kPixels; first += N) {
    const int64_t count = pixels - first < N ? pixels - first : N;
    for (int64_t c = 0; c < channels; c += kLine) {
      const int64_t width = channels - c < kLine ? channels - c : kLine;
      T* const to = panel + c * kPixels + first;
      const T* const from = source + first * channels + c;
      if (count == N && width == kLine) {
        // Through a buffer, so that lines which compete for a set of the cache are each read once.
        alignas(64) T lines[N * kLine];
        for (int p = 0; p < N; ++p) std::memcpy(lines + p * kLine, from + p * channels, sizeof(T) * kLine);
        transpose(lines, N, kLine, kLine, to, kPixels);
        continue;
      }
      for (int64_t k = 0; k < width; ++k) {
        for (int64_t p = 0; p < N; ++p) to[k * kPixels + p] = p < count ? from[p * channels + k] : T(0);
      }
    }
  }
}

// sums[j][pixel] for J output channels, which begin with `channel` of block `block`.
template <typename T, int N, int J, int V>
__attribute__((noinline)) void panel_tile(const PanelJob<T>& job, const T* panel, int64_t block, int64_t channel,
                                          T* sums) {
  using S = Simd<T, N>;
  constexpr int64_t kStep = static_cast<int64_t>(V) * S::kBytes;
  compiler_barrier();
  typename S::V acc[J][V];
  const T* const init = job.init + (block * job.block_out + channel) * job.init_step;
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      acc[j][v] = S::template broadcast_at<0>(reinterpret_cast<const char*>(init + j * job.init_step), 0);
    }
  }
  const T* const weights = job.weights + channel * job.out_step;
  const int64_t block_size = static_cast<int64_t>(job.block_out) * job.block_k;
  const int64_t out_step = job.out_step, k_step = job.k_step;
  const int32_t* const end = job.ids + job.ptr[block + 1];
#pragma GCC unroll 1
  for (const int32_t* id = job.ids + job.ptr[block]; id != end; ++id) {
    const int64_t k_begin = static_cast<int64_t>(job.k_block[*id]) * job.block_k;
    int64_t k = job.source_channels - k_begin;
    if (k > job.block_k) k = job.block_k;
    const T* w = weights + *id * block_size;
    const char* x = reinterpret_cast<const char*>(panel) + k_begin * kStep;
    do {
      typename S::V xv[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) xv[v] = S::load_at(x, v * S::kBytes);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) {
        const typename S::V wv = S::factor_from(w + j * out_step);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) S::fma_factor(acc[j][v], xv[v], wv);
      }
      x += kStep;
      w += k_step;
    } while (--k > 0);
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) S::store(sums + (j * V + v) * N, acc[j][v]);
  }
}

template <typename T>
using PanelFunction = void (*)(const PanelJob<T>&, const T*, int64_t, int64_t, T*);

// table[J][V] for 1 .. kJ channels and 1 .. kV vectors.
template <typename T, int N, int kJ, int kV, int J = 1, int V = 1>
DDST_INLINE void fill_panel_tiles(PanelFunction<T> (&table)[kJ + 1][kV + 1]) {
  table[J][V] = &panel_tile<T, N, J, V>;
  if constexpr (V < kV) {
    fill_panel_tiles<T, N, kJ, kV, J, V + 1>(table);
  } else if constexpr (J < kJ) {
    fill_panel_tiles<T, N, kJ, kV, J + 1, 1>(table);
  }
}

template <typename T, int N, int V, int kV>
DDST_INLINE void fill_panel_of(int vectors, const T* source, int64_t pixels, int64_t channels, T* panel) {
  if (vectors == V) return fill_panel<T, N, V * N>(source, pixels, channels, panel);
  if constexpr (V < kV) fill_panel_of<T, N, V + 1, kV>(vectors, source, pixels, channels, panel);
}

// Tiles of 1 to kV vectors of N pixels and 1 to kJ output channels.
template <typename T, int N, int kJ, int kV>
void run_panels(const PanelJob<T>& job, int64_t vector_begin, int64_t vector_end, int64_t block_begin,
                int64_t block_end, T* panels) {
  PanelFunction<T> table[kJ + 1][kV + 1];
  fill_panel_tiles<T, N, kJ, kV>(table);
  // Output channels that are written together, a cache line: some narrow blocks, or part of a wide one.
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t line_blocks = kLine % job.block_out == 0 ? kLine / job.block_out : 1;
  alignas(64) T sums[kLine * kV * N];
  const int64_t vectors = vector_end - vector_begin, groups = (vectors + job.group_vectors - 1) / job.group_vectors;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = vector_begin + vectors * group / groups;
    const int64_t count = vector_begin + vectors * (group + 1) / groups - first, tiles = (count + kV - 1) / kV;
    const auto tile_begin = [&](int64_t tile) { return first + count * tile / tiles; };
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = tile_begin(tile), pixel = begin * N;
      const int wide = static_cast<int>(tile_begin(tile + 1) - begin);
      fill_panel_of<T, N, 1, kV>(wide, job.source + pixel * job.source_channels, job.pixels - pixel,
                                 job.source_channels, panels + (begin - first) * N * job.source_channels);
    }
    for (int64_t block = block_begin; block < block_end; block += line_blocks) {
      const int64_t last = block + line_blocks < block_end ? block + line_blocks : block_end;
      for (int64_t slice = 0; slice < job.block_out; slice += kLine) {
        const int64_t out_channel = block * job.block_out + slice;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t begin = tile_begin(tile), wide = tile_begin(tile + 1) - begin, pixel = begin * N;
          const T* const panel = panels + (begin - first) * N * job.source_channels;
          int64_t channels = 0;
          for (int64_t b = block; b < last; ++b) {
            int64_t end = job.out_channels - b * job.block_out;
            if (end > job.block_out) end = job.block_out;
            if (end > slice + kLine) end = slice + kLine;
            const int64_t parts = (end - slice + kJ - 1) / kJ;
            for (int64_t part = 0, channel = slice; part < parts; ++part) {
              const int64_t next = slice + (end - slice) * (part + 1) / parts;
              table[next - channel][wide](job, panel, b, channel, sums + channels * wide * N);
              channels += next - channel;
              channel = next;
            }
          }
          const int64_t pixels = job.pixels - pixel < wide * N ? job.pixels - pixel : wide * N;
          transpose(sums, channels, pixels, wide * N, job.out + pixel * job.out_channels + out_channel,
                    job.out_channels);
        }
      }
    }
  }
}

}  // namespace
}  // namespace ddst::cpu
