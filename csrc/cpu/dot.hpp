// The second form of the gather kernel, for output blocks of one to four channels: the vector runs over the reduction,
// and lanes are added up at the end. Where the first form would fill one lane of eight, this one fills all.
// Included only by kernels_*.cpp.
#pragma once

#include "gather.hpp"

namespace ddst::cpu {
namespace {

#if defined(__AVX2__) || defined(DDST_NEON)
#if defined(DDST_NEON)
DDST_INLINE float sum_lanes(Simd<float, 4>::V v) { return vaddvq_f32(reinterpret_cast<float32x4_t>(v)); }
DDST_INLINE double sum_lanes(Simd<double, 2>::V v) { return vaddvq_f64(reinterpret_cast<float64x2_t>(v)); }
#else
DDST_INLINE float sum_lanes(__m128 v) {
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}
DDST_INLINE float sum_lanes(__m256 v) {
  return sum_lanes(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
}
DDST_INLINE double sum_lanes(__m256d v) {
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}
#if defined(__AVX512F__)
DDST_INLINE float sum_lanes(__m512 v) {
  return sum_lanes(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}
DDST_INLINE double sum_lanes(__m512d v) {
  return sum_lanes(_mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1)));
}
#endif
#endif

// P pixels x Q channels; weights are [block][channel][k]. N lanes of the reduction at a time.
template <typename T, int N, int Q, int P>
__attribute__((noinline)) void dot_tile(const char* const* pixels, T* const* outs, const TileWork<T>& work) {
  using S = Simd<T, N>;
  typename S::V acc[P][Q];
  const char* pixel[P];
  T rest[P][Q];  // of cut entries, whose channels end before a vector does
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    pixel[p] = pixels[p];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      acc[p][q] = typename S::V{};
      rest[p][q] = work.init[q];
    }
  }
  const int64_t row_bytes = static_cast<int64_t>(work.block_k) * sizeof(T);
  for (const Entry* entry = work.begin; entry != work.full_end; ++entry) {
    int64_t offset = entry->source;
    const char* w = work.weights + entry->weight;
    int groups = work.k_groups;
    do {
      typename S::V wv[Q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) wv[q] = S::load(reinterpret_cast<const T*>(w + q * row_bytes));
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const typename S::V x = S::load(reinterpret_cast<const T*>(pixel[p] + offset));
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) S::fma(acc[p][q], x, wv[q]);
      }
      offset += S::kBytes;
      w += S::kBytes;
    } while (--groups > 0);
  }
  for (const Entry* entry = work.full_end; entry != work.end; ++entry) {
    const char* w = work.weights + entry->weight;
    for (int p = 0; p < P; ++p) {
      const T* x = reinterpret_cast<const T*>(pixel[p] + entry->source);
      for (int q = 0; q < Q; ++q) {
        const T* row = reinterpret_cast<const T*>(w + q * row_bytes);
        for (int k = 0; k < work.k_cut; ++k) rest[p][q] += x[k] * row[k];
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    T* out = outs[p] + work.out_channel;
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      if (q < work.channels) out[q] = rest[p][q] + sum_lanes(acc[p][q]);
    }
  }
}

template <typename T, int N, int Q, int kMax, int P = 1>
DDST_INLINE void fill_dots(TileFunction<T>* table) {
  table[P] = &dot_tile<T, N, Q, P>;
  if constexpr (P < kMax) fill_dots<T, N, Q, kMax, P + 1>(table);
}

template <typename T, int N, int Q, int kTile>
void dot_channels(const GatherJob<T>& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin,
                  int64_t block_end) {
  TileTable<T> table;
  table.tile_pixels = kTile;
  table.step = N;
  fill_dots<T, N, Q, kTile>(table.tile);
  run_tiles(job, table, tile_begin, tile_end, block_begin, block_end);
}
#endif

}  // namespace
}  // namespace ddst::cpu
