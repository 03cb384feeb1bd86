// Changes of layout: weight blocks into the order the gather kernel streams them, and NCHW to NHWC and back.
// Included only by kernels_*.cpp.
#pragma once

#include "microkernel.hpp"

namespace ddst::cpu {
namespace {

// The largest square transposed in registers.
template <typename T>
struct TransposeSide {
#if defined(__AVX512F__)
  static constexpr int value = 64 / sizeof(T);
#elif defined(__AVX2__)
  static constexpr int value = 32 / sizeof(T);
#else
  static constexpr int value = 4;
#endif
};

// dst[c * dst_stride + r] = src[r * src_stride + c] for a square of kSide.
template <int kSide, typename T>
DDST_INLINE void transpose_square(const T* src, int64_t src_stride, T* dst, int64_t dst_stride) {
  for (int r = 0; r < kSide; ++r)
    for (int c = 0; c < kSide; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
}

// The squares in registers: loads put quarter-lines of several rows beside each other, so that what is left to exchange
// lies within 128-bit lanes.
#if defined(__AVX2__)
template <>
DDST_INLINE void transpose_square<8>(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m256 rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const float* p = src + i * src_stride + half * 4;
      rows[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * src_stride), 1);
    }
    const __m256 ab_low = _mm256_unpacklo_ps(rows[0], rows[1]), ab_high = _mm256_unpackhi_ps(rows[0], rows[1]);
    const __m256 cd_low = _mm256_unpacklo_ps(rows[2], rows[3]), cd_high = _mm256_unpackhi_ps(rows[2], rows[3]);
    float* out = dst + 4 * half * dst_stride;
    _mm256_storeu_ps(out, _mm256_shuffle_ps(ab_low, cd_low, 0x44));
    _mm256_storeu_ps(out + dst_stride, _mm256_shuffle_ps(ab_low, cd_low, 0xEE));
    _mm256_storeu_ps(out + 2 * dst_stride, _mm256_shuffle_ps(ab_high, cd_high, 0x44));
    _mm256_storeu_ps(out + 3 * dst_stride, _mm256_shuffle_ps(ab_high, cd_high, 0xEE));
  }
}

template <>
DDST_INLINE void transpose_square<4>(const double* src, int64_t src_stride, double* dst, int64_t dst_stride) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const double* p = src + 2 * half;
    const __m256d a =
        _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(p)), _mm_loadu_pd(p + 2 * src_stride), 1);
    const __m256d b =
        _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(p + src_stride)), _mm_loadu_pd(p + 3 * src_stride), 1);
    _mm256_storeu_pd(dst + 2 * half * dst_stride, _mm256_unpacklo_pd(a, b));
    _mm256_storeu_pd(dst + (2 * half + 1) * dst_stride, _mm256_unpackhi_pd(a, b));
  }
}
#endif
#if defined(__AVX512F__)
template <>
DDST_INLINE void transpose_square<16>(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
#pragma GCC unroll 4
  for (int quarter = 0; quarter < 4; ++quarter) {
    __m512 rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const float* p = src + i * src_stride + quarter * 4;
      rows[i] = _mm512_castps128_ps512(_mm_loadu_ps(p));
      rows[i] = _mm512_mask_broadcast_f32x4(rows[i], 0x00F0, _mm_loadu_ps(p + 4 * src_stride));
      rows[i] = _mm512_mask_broadcast_f32x4(rows[i], 0x0F00, _mm_loadu_ps(p + 8 * src_stride));
      rows[i] = _mm512_mask_broadcast_f32x4(rows[i], 0xF000, _mm_loadu_ps(p + 12 * src_stride));
    }
    const __m512 ab_low = _mm512_unpacklo_ps(rows[0], rows[1]), ab_high = _mm512_unpackhi_ps(rows[0], rows[1]);
    const __m512 cd_low = _mm512_unpacklo_ps(rows[2], rows[3]), cd_high = _mm512_unpackhi_ps(rows[2], rows[3]);
    float* out = dst + 4 * quarter * dst_stride;
    _mm512_storeu_ps(out, _mm512_shuffle_ps(ab_low, cd_low, 0x44));
    _mm512_storeu_ps(out + dst_stride, _mm512_shuffle_ps(ab_low, cd_low, 0xEE));
    _mm512_storeu_ps(out + 2 * dst_stride, _mm512_shuffle_ps(ab_high, cd_high, 0x44));
    _mm512_storeu_ps(out + 3 * dst_stride, _mm512_shuffle_ps(ab_high, cd_high, 0xEE));
  }
}

template <>
DDST_INLINE void transpose_square<8>(const double* src, int64_t src_stride, double* dst, int64_t dst_stride) {
#pragma GCC unroll 4
  for (int quarter = 0; quarter < 4; ++quarter) {
    __m512d rows[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const double* p = src + i * src_stride + quarter * 2;
      rows[i] = _mm512_castpd128_pd512(_mm_loadu_pd(p));
      rows[i] = _mm512_mask_broadcast_f64x2(rows[i], 0x0C, _mm_loadu_pd(p + 2 * src_stride));
      rows[i] = _mm512_mask_broadcast_f64x2(rows[i], 0x30, _mm_loadu_pd(p + 4 * src_stride));
      rows[i] = _mm512_mask_broadcast_f64x2(rows[i], 0xC0, _mm_loadu_pd(p + 6 * src_stride));
    }
    _mm512_storeu_pd(dst + 2 * quarter * dst_stride, _mm512_unpacklo_pd(rows[0], rows[1]));
    _mm512_storeu_pd(dst + (2 * quarter + 1) * dst_stride, _mm512_unpackhi_pd(rows[0], rows[1]));
  }
}
#endif

#if defined(DDST_NEON)
template <>
DDST_INLINE void transpose_square<4>(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  const float32x4_t a = vld1q_f32(src), b = vld1q_f32(src + src_stride);
  const float32x4_t c = vld1q_f32(src + 2 * src_stride), d = vld1q_f32(src + 3 * src_stride);
  const float64x2_t ab_even = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), ab_odd = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
  const float64x2_t cd_even = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), cd_odd = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
  vst1q_f32(dst, vreinterpretq_f32_f64(vtrn1q_f64(ab_even, cd_even)));
  vst1q_f32(dst + dst_stride, vreinterpretq_f32_f64(vtrn1q_f64(ab_odd, cd_odd)));
  vst1q_f32(dst + 2 * dst_stride, vreinterpretq_f32_f64(vtrn2q_f64(ab_even, cd_even)));
  vst1q_f32(dst + 3 * dst_stride, vreinterpretq_f32_f64(vtrn2q_f64(ab_odd, cd_odd)));
}

template <>
DDST_INLINE void transpose_square<4>(const double* src, int64_t src_stride, double* dst, int64_t dst_stride) {
#pragma GCC unroll 2
  for (int r = 0; r < 4; r += 2) {
#pragma GCC unroll 2
    for (int c = 0; c < 4; c += 2) {
      const double* p = src + r * src_stride + c;
      const float64x2_t a = vld1q_f64(p), b = vld1q_f64(p + src_stride);
      double* const out = dst + c * dst_stride + r;
      vst1q_f64(out, vtrn1q_f64(a, b));
      vst1q_f64(out + dst_stride, vtrn2q_f64(a, b));
    }
  }
}
#endif

// dst[c * dst_stride + r] = src[r * src_stride + c], in squares of kSide, and what is left over in smaller ones.
template <typename T, int kSide = TransposeSide<T>::value>
void transpose(const T* src, int64_t rows, int64_t cols, int64_t src_stride, T* dst, int64_t dst_stride) {
  if constexpr (kSide < 4) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
  } else {
    const int64_t square_rows = rows / kSide * kSide, square_cols = cols / kSide * kSide;
    for (int64_t r = 0; r < square_rows; r += kSide)
      for (int64_t c = 0; c < square_cols; c += kSide)
        transpose_square<kSide>(src + r * src_stride + c, src_stride, dst + c * dst_stride + r, dst_stride);
    if (square_cols < cols) {
      transpose<T, kSide / 2>(src + square_cols, square_rows, cols - square_cols, src_stride,
                              dst + square_cols * dst_stride, dst_stride);
    }
    if (square_rows < rows) {
      transpose<T, kSide / 2>(src + square_rows * src_stride, rows - square_rows, cols, src_stride, dst + square_rows,
                              dst_stride);
    }
  }
}

// One block as packed[slice][k][width]; lanes past the block are zero, so that they can be multiplied without harm.
template <typename T>
void pack_weights(const T* block, int block_out, int block_in, int width, bool transposed, T* packed) {
  const int vector_size = transposed ? block_out : block_in;
  const int k_size = transposed ? block_in : block_out;
  const int slices = (vector_size + width - 1) / width;
  for (int slice = 0; slice < slices; ++slice) {
    T* out = packed + static_cast<int64_t>(slice) * k_size * width;
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

}  // namespace
}  // namespace ddst::cpu
