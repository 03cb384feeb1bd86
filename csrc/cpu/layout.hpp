// Changes of layout: weight blocks into the order the gather kernel streams them, and NCHW to NHWC and back.
// Included only by kernels_*.cpp.
#pragma once

#include "microkernel.hpp"

namespace ddst::cpu {
namespace {

// Side of the square transposed in registers.
template <typename T>
struct TransposeSide {
#if defined(__AVX2__)
  static constexpr int value = 32 / sizeof(T);
#else
  static constexpr int value = 4;
#endif
};

// dst[c * dst_stride + r] = src[r * src_stride + c] for a square of TransposeSide.
template <typename T>
DDST_INLINE void transpose_square(const T* src, int64_t src_stride, T* dst, int64_t dst_stride) {
  constexpr int kSide = TransposeSide<T>::value;
  for (int r = 0; r < kSide; ++r)
    for (int c = 0; c < kSide; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
}

#if defined(__AVX2__)
template <>
DDST_INLINE void transpose_square<float>(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  // Pairs of rows are interleaved by one, then by two numbers; halves are joined by the loads.
  __m256 rows[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const float* p = src + (i & 3) * src_stride + (i >> 2) * 4;
    rows[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * src_stride), 1);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256 a = rows[4 * half], b = rows[4 * half + 1], c = rows[4 * half + 2], d = rows[4 * half + 3];
    const __m256 ab_low = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b);
    const __m256 cd_low = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
    float* out = dst + 4 * half * dst_stride;
    _mm256_storeu_ps(out, _mm256_shuffle_ps(ab_low, cd_low, 0x44));
    _mm256_storeu_ps(out + dst_stride, _mm256_shuffle_ps(ab_low, cd_low, 0xEE));
    _mm256_storeu_ps(out + 2 * dst_stride, _mm256_shuffle_ps(ab_high, cd_high, 0x44));
    _mm256_storeu_ps(out + 3 * dst_stride, _mm256_shuffle_ps(ab_high, cd_high, 0xEE));
  }
}

template <>
DDST_INLINE void transpose_square<double>(const double* src, int64_t src_stride, double* dst, int64_t dst_stride) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const double* p = src + 2 * half;
    const __m256d a =
        _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(p)), _mm_loadu_pd(p + 2 * src_stride), 1);
    const __m256d b =
        _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(p + src_stride)), _mm_loadu_pd(p + 3 * src_stride), 1);
    const __m256d even = _mm256_unpacklo_pd(a, b), odd = _mm256_unpackhi_pd(a, b);
    _mm256_storeu_pd(dst + 2 * half * dst_stride, even);
    _mm256_storeu_pd(dst + (2 * half + 1) * dst_stride, odd);
  }
}
#endif

template <typename T>
void transpose(const T* src, int64_t rows, int64_t cols, int64_t src_stride, T* dst, int64_t dst_stride) {
  constexpr int kSide = TransposeSide<T>::value;
  // Strips of 16 rows fill whole cache lines of the destination before the next column is taken.
  constexpr int64_t kStrip = 64 / sizeof(T);
  for (int64_t r0 = 0; r0 < rows; r0 += kStrip) {
    const int64_t r1 = r0 + kStrip < rows ? r0 + kStrip : rows;
    int64_t c = 0;
    for (; c + kSide <= cols; c += kSide) {
      int64_t r = r0;
      for (; r + kSide <= r1; r += kSide)
        transpose_square<T>(src + r * src_stride + c, src_stride, dst + c * dst_stride + r, dst_stride);
      for (; r < r1; ++r)
        for (int64_t k = 0; k < kSide; ++k) dst[(c + k) * dst_stride + r] = src[r * src_stride + c + k];
    }
    for (; c < cols; ++c)
      for (int64_t r = r0; r < r1; ++r) dst[c * dst_stride + r] = src[r * src_stride + c];
  }
}

// packed[id][slice][k][width]; lanes past the block are zero, so that they can be multiplied without harm.
template <typename T>
void pack_weights(const T* values, int block_out, int block_in, int width, bool transposed, int64_t begin, int64_t end,
                  T* packed) {
  const int vector_size = transposed ? block_out : block_in;
  const int k_size = transposed ? block_in : block_out;
  const int slices = (vector_size + width - 1) / width;
  for (int64_t id = begin; id < end; ++id) {
    const T* block = values + id * block_out * block_in;
    for (int slice = 0; slice < slices; ++slice) {
      T* out = packed + (id * slices + slice) * k_size * width;
      const int first = slice * width;
      const int lanes = vector_size - first < width ? vector_size - first : width;
      if (lanes < width) std::memset(out, 0, sizeof(T) * k_size * width);
      if (transposed) {
        transpose(block + static_cast<int64_t>(first) * block_in, lanes, k_size, block_in, out, width);
      } else {
        for (int k = 0; k < k_size; ++k) std::memcpy(out + k * width, block + k * block_in + first, sizeof(T) * lanes);
      }
    }
  }
}

}  // namespace
}  // namespace ddst::cpu
