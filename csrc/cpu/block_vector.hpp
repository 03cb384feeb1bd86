// Products of a packed matrix with one vector, each weight read once where it lies. Included only by kernels_*.cpp.
#pragma once

#include "kernels.hpp"
#include "microkernel.hpp"

namespace ddst::cpu {
namespace {

// The vector runs over the reduction: J neighbouring output channels.
template <typename T, int N, int J>
DDST_INLINE void block_rows(const BlockVectorJob<T>& job, int64_t block, int64_t channel) {
  using S = Simd<T, N>;
  typename S::V acc[J];
  T rest[J];
  for (int j = 0; j < J; ++j) acc[j] = typename S::V{}, rest[j] = 0;
  for (int64_t at = job.ptr[block]; at < job.ptr[block + 1]; ++at) {
    const int64_t id = job.ids[at], k_begin = static_cast<int64_t>(job.k_block[id]) * job.block_k;
    const int64_t count = job.source_size - k_begin < job.block_k ? job.source_size - k_begin : job.block_k;
    const T* const w = job.values + (id * job.block_out + channel) * job.block_k;
    const T* const x = job.source + k_begin;
    int64_t k = 0;
    for (; k + N <= count; k += N) {
      const typename S::V xv = S::load(x + k);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) S::fma(acc[j], xv, S::load(w + j * job.block_k + k));
    }
    for (; k < count; ++k) {
      for (int j = 0; j < J; ++j) rest[j] += w[j * job.block_k + k] * x[k];
    }
  }
  for (int j = 0; j < J; ++j) {
    T sum = rest[j];
    for (int i = 0; i < N; ++i) sum += acc[j][i];
    job.out[block * job.block_out + channel + j] = sum;
  }
}

// Output blocks [block_begin, block_end).
template <typename T, int N>
void block_vector(const BlockVectorJob<T>& job, int64_t block_begin, int64_t block_end) {
  constexpr int kRows = 8;
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t first = block * job.block_out;
    const int64_t channels = job.out_size - first < job.block_out ? job.out_size - first : job.block_out;
    if (job.row_major) {
      int64_t c = 0;
      for (; c + kRows <= channels; c += kRows) block_rows<T, N, kRows>(job, block, c);
      for (; c < channels; ++c) block_rows<T, N, 1>(job, block, c);
      continue;
    }
    T* const out = job.out + first;
    for (int64_t c = 0; c < channels; ++c) out[c] = 0;
    for (int64_t at = job.ptr[block]; at < job.ptr[block + 1]; ++at) {
      const int64_t id = job.ids[at], k_begin = static_cast<int64_t>(job.k_block[id]) * job.block_k;
      const int64_t count = job.source_size - k_begin < job.block_k ? job.source_size - k_begin : job.block_k;
      for (int64_t k = 0; k < count; ++k) {
        const T* const w = job.values + (id * job.block_k + k) * job.block_out;
        const T x = job.source[k_begin + k];
        int64_t c = 0;
        for (; c + N <= channels; c += N) {
          typename Simd<T, N>::V sum = Simd<T, N>::load(out + c), xv;
          for (int i = 0; i < N; ++i) xv[i] = x;
          Simd<T, N>::fma(sum, xv, Simd<T, N>::load(w + c));
          Simd<T, N>::store(out + c, sum);
        }
        for (; c < channels; ++c) out[c] += w[c] * x;
      }
    }
  }
}

}  // namespace
}  // namespace ddst::cpu
