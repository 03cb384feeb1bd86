// Vector registers under one name for every instruction set, and the two instruction forms the kernels are made of:
// a load of weights, and a multiply-add with one broadcast number. Included only by kernels_*.cpp; all of it has
// internal linkage, because the same names mean other instructions in each of those files.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(DDST_NEON)
#include <arm_neon.h>
#endif

#define DDST_INLINE inline __attribute__((always_inline))

// The multiply-add of T and N, by DDST_FMA_BROADCAST(instruction, lanes).
#define DDST_FMA_BROADCAST_OF_ALL                                   \
  if constexpr (sizeof(T) == 4) {                                   \
    if constexpr (N == 16) DDST_FMA_BROADCAST("vfmadd231ps", "16"); \
    if constexpr (N == 8) DDST_FMA_BROADCAST("vfmadd231ps", "8");   \
    if constexpr (N == 4) DDST_FMA_BROADCAST("vfmadd231ps", "4");   \
  } else {                                                          \
    if constexpr (N == 8) DDST_FMA_BROADCAST("vfmadd231pd", "8");   \
    if constexpr (N == 4) DDST_FMA_BROADCAST("vfmadd231pd", "4");   \
  }

namespace ddst::cpu {
namespace {

template <typename T, int N>
struct Simd {
  typedef T V __attribute__((vector_size(N * sizeof(T))));
  static constexpr int kBytes = N * sizeof(T);

  static DDST_INLINE V load(const T* p) {
    V v;
    std::memcpy(&v, p, kBytes);
    return v;
  }
  static DDST_INLINE void store(T* p, V v) { std::memcpy(p, &v, kBytes); }

  // A store past the caches, p aligned to the vector; stream_fence() orders such stores before what follows.
  static DDST_INLINE void stream(T* p, V v) {
#if defined(__AVX512F__)
    if constexpr (kBytes == 64) return _mm512_stream_ps(reinterpret_cast<float*>(p), reinterpret_cast<__m512>(v));
#endif
#if defined(__AVX2__)
    if constexpr (kBytes == 32) return _mm256_stream_ps(reinterpret_cast<float*>(p), reinterpret_cast<__m256>(v));
#endif
    store(p, v);
  }

  // The loads are written in assembly: on x86 GCC otherwise folds each weight load into the multiply-adds that use it,
  // which doubles the loads and halves the speed, and with NEON it moves loads ahead until sums lie on the stack. The
  // kernels start with a compiler barrier, so that these loads (whose memory the compiler does not see) cannot move
  // above earlier stores.
  template <int kDisp>
  static DDST_INLINE V load_at(const char* p) {
#if defined(__AVX2__)
    V v;
    asm volatile("vmovups %c2(%1), %0" : "=v"(v) : "r"(p), "i"(kDisp));
    return v;
#elif defined(DDST_NEON)
    V v;
    asm volatile("ldr %q0, [%1, %2]" : "=w"(v) : "r"(p), "i"(kDisp));
    return v;
#else
    V v;
    std::memcpy(&v, p + kDisp, kBytes);
    return v;
#endif
  }

  static DDST_INLINE V load_at(const char* base, int64_t offset) {
#if defined(__AVX2__)
    V v;
    asm volatile("vmovups (%1,%2), %0" : "=v"(v) : "r"(base), "r"(offset));
    return v;
#elif defined(DDST_NEON)
    V v;
    asm volatile("ldr %q0, [%1, %2]" : "=w"(v) : "r"(base), "r"(offset));
    return v;
#else
    V v;
    std::memcpy(&v, base + offset, kBytes);
    return v;
#endif
  }

  template <int kDisp>
  static DDST_INLINE V broadcast_at(const char* base, int64_t offset) {
#if defined(__AVX2__)
    V v;
    if constexpr (sizeof(T) == 4) {
      asm volatile("vbroadcastss %c3(%1,%2), %0" : "=v"(v) : "r"(base), "r"(offset), "i"(kDisp));
    } else {
      static_assert(sizeof(T) == 4 || N >= 4, "vbroadcastsd has no 128-bit form");
      asm volatile("vbroadcastsd %c3(%1,%2), %0" : "=v"(v) : "r"(base), "r"(offset), "i"(kDisp));
    }
    return v;
#else
    T value;
    std::memcpy(&value, base + offset + kDisp, sizeof(T));
    V v;
    for (int i = 0; i < N; ++i) v[i] = value;
    return v;
#endif
  }

  // A factor of all lanes for fma_factor, from an address that the compiler forms as it likes.
  static DDST_INLINE V factor_from(const T* p) {
#if defined(DDST_NEON)
    V v;
    if constexpr (sizeof(T) == 4) asm volatile("ldr %s0, %1" : "=w"(v) : "m"(*p));
    if constexpr (sizeof(T) == 8) asm volatile("ldr %d0, %1" : "=w"(v) : "m"(*p));
    return v;
#elif defined(__AVX2__)
    V v;
    if constexpr (sizeof(T) == 4) {
      asm volatile("vbroadcastss %1, %0" : "=v"(v) : "m"(*p));
    } else {
      asm volatile("vbroadcastsd %1, %0" : "=v"(v) : "m"(*p));
    }
    return v;
#else
    V v;
    for (int i = 0; i < N; ++i) v[i] = *p;
    return v;
#endif
  }

  static DDST_INLINE void fma(V& acc, V a, V b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      if constexpr (N == 16) acc = _mm512_fmadd_ps(a, b, acc);
      if constexpr (N == 8) acc = _mm256_fmadd_ps(a, b, acc);
      if constexpr (N == 4) acc = _mm_fmadd_ps(a, b, acc);
    } else {
      if constexpr (N == 8) acc = _mm512_fmadd_pd(a, b, acc);
      if constexpr (N == 4) acc = _mm256_fmadd_pd(a, b, acc);
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
      if constexpr (N == 8) acc = _mm256_fmadd_ps(a, b, acc);
      if constexpr (N == 4) acc = _mm_fmadd_ps(a, b, acc);
    } else {
      if constexpr (N == 4) acc = _mm256_fmadd_pd(a, b, acc);
    }
#else
    acc += a * b;
#endif
  }

  // acc += w * broadcast(*(base + offset + kDisp)); one instruction with AVX-512.
  template <int kDisp>
  static DDST_INLINE void fma_broadcast(V& acc, V w, const char* base, int64_t offset) {
#if defined(__AVX512F__)
#define DDST_FMA_BROADCAST(op, lanes) \
  asm volatile(op " %c4(%2,%3)%{1to" lanes "%}, %1, %0" : "+v"(acc) : "v"(w), "r"(base), "r"(offset), "i"(kDisp))
    DDST_FMA_BROADCAST_OF_ALL
#undef DDST_FMA_BROADCAST
#else
    fma(acc, broadcast_at<kDisp>(base, offset), w);
#endif
  }

  // The same at base + kDisp. Intel's processors split the instruction in two where its address has an index register,
  // which costs a third of the speed while another thread computes on the same core (docs/notes/cpu-kernels.md).
  template <int kDisp>
  static DDST_INLINE void fma_broadcast(V& acc, V w, const char* base) {
#if defined(__AVX512F__)
#define DDST_FMA_BROADCAST(op, lanes) \
  asm volatile(op " %c3(%2)%{1to" lanes "%}, %1, %0" : "+v"(acc) : "v"(w), "r"(base), "i"(kDisp))
    DDST_FMA_BROADCAST_OF_ALL
#undef DDST_FMA_BROADCAST
#else
    fma(acc, broadcast_at<kDisp>(base, 0), w);
#endif
  }

#if defined(DDST_NEON)
  // kLanes numbers (1, 2 or 4; as many as fit a register at most) in the lowest lanes.
  template <int kLanes>
  static DDST_INLINE V load_lanes(const char* base, int64_t offset) {
    V v;
    if constexpr (kLanes * sizeof(T) == 4) asm volatile("ldr %s0, [%1, %2]" : "=w"(v) : "r"(base), "r"(offset));
    if constexpr (kLanes * sizeof(T) == 8) asm volatile("ldr %d0, [%1, %2]" : "=w"(v) : "r"(base), "r"(offset));
    if constexpr (kLanes * sizeof(T) == 16) asm volatile("ldr %q0, [%1, %2]" : "=w"(v) : "r"(base), "r"(offset));
    return v;
  }
  template <int kLanes, int kDisp>
  static DDST_INLINE V load_lanes_at(const char* p) {
    V v;
    if constexpr (kLanes * sizeof(T) == 4) asm volatile("ldr %s0, [%1, %2]" : "=w"(v) : "r"(p), "i"(kDisp));
    if constexpr (kLanes * sizeof(T) == 8) asm volatile("ldr %d0, [%1, %2]" : "=w"(v) : "r"(p), "i"(kDisp));
    if constexpr (kLanes * sizeof(T) == 16) asm volatile("ldr %q0, [%1, %2]" : "=w"(v) : "r"(p), "i"(kDisp));
    return v;
  }

  // acc += w * x[kLane]: multiply by element.
  template <int kLane>
  static DDST_INLINE void fma_lane(V& acc, V w, V x) {
    if constexpr (sizeof(T) == 4) {
      acc = reinterpret_cast<V>(vfmaq_laneq_f32(reinterpret_cast<float32x4_t>(acc), reinterpret_cast<float32x4_t>(w),
                                                reinterpret_cast<float32x4_t>(x), kLane));
    } else {
      acc = reinterpret_cast<V>(vfmaq_laneq_f64(reinterpret_cast<float64x2_t>(acc), reinterpret_cast<float64x2_t>(w),
                                                reinterpret_cast<float64x2_t>(x), kLane));
    }
  }
#endif

  // acc += a * factor, one that factor_from gave.
  static DDST_INLINE void fma_factor(V& acc, V a, V factor) {
#if defined(DDST_NEON)
    fma_lane<0>(acc, a, factor);
#else
    fma(acc, a, factor);
#endif
  }
};

DDST_INLINE void compiler_barrier() { asm volatile("" ::: "memory"); }

DDST_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Memory to be fetched a few lines at a time beside other work.
struct LineStream {
  const char* address = nullptr;
  const char* end = nullptr;
  int64_t lines = 0;  // at each call

  template <typename T>
  DDST_INLINE void start(const T* first, int64_t count, int64_t calls) {
    address = reinterpret_cast<const char*>(first);
    end = reinterpret_cast<const char*>(first + count);
    lines = calls > 0 ? ((end - address) / 64 + calls - 1) / calls : 0;
  }
  // Fetches the lines of one call.
  DDST_INLINE void fetch() {
    for (int64_t i = 0; i < lines && address < end; ++i, address += 64) __builtin_prefetch(address, 0, 2);
  }
  // Where a call that fetches one line at each of so many steps begins; fetches here what is too much for them.
  DDST_INLINE const char* take(int64_t steps) {
    if (address >= end) return address;
    int64_t n = lines;
    for (; n > steps; --n, address += 64) __builtin_prefetch(address, 0, 2);
    const char* const from = address;
    address += 64 * n;
    return from;
  }
};

// row[v] = NV vectors that follow each other in memory, kDisp bytes from p.
template <typename T, int N, int NV, int kDisp = 0, int kFirst = 0>
DDST_INLINE void load_row(typename Simd<T, N>::V (&row)[NV], const char* p) {
  row[kFirst] = Simd<T, N>::template load_at<kDisp + kFirst * Simd<T, N>::kBytes>(p);
  if constexpr (kFirst + 1 < NV) load_row<T, N, NV, kDisp, kFirst + 1>(row, p);
}

// acc[p] += w * source of pixel p, for the steps [kStep, kSteps) of the reduction.
template <typename T, int N, int P, int kStep, int kSteps>
DDST_INLINE void multiply_near_steps(typename Simd<T, N>::V (&acc)[P][1], const char* const (&pixel)[P],
                                     const char* w) {
  using S = Simd<T, N>;
  const typename S::V w0 = S::template load_at<kStep * S::kBytes>(w);
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) S::template fma_broadcast<kStep* static_cast<int>(sizeof(T))>(acc[p][0], w0, pixel[p]);
  if constexpr (kStep + 1 < kSteps) multiply_near_steps<T, N, P, kStep + 1, kSteps>(acc, pixel, w);
}

}  // namespace
}  // namespace ddst::cpu

#if defined(DDST_NEON)
#include "steps_by_element.hpp"
#else
namespace ddst::cpu {
namespace {

// acc[p][v] += w[v] * source of pixel p, for one step of the reduction.
template <typename T, int N, int NV, int P, int kStep>
DDST_INLINE void multiply_step(typename Simd<T, N>::V (&acc)[P][NV], const char* const (&pixel)[P], int64_t offset,
                               const char* w) {
  using S = Simd<T, N>;
  constexpr int kSource = kStep * static_cast<int>(sizeof(T));
  constexpr int kWeight = kStep * NV * S::kBytes;
  if constexpr (NV == 1) {
    const typename S::V w0 = S::template load_at<kWeight>(w);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) S::template fma_broadcast<kSource>(acc[p][0], w0, pixel[p], offset);
  } else {
    static_assert(NV == 2, "one or two vectors");
    const typename S::V w0 = S::template load_at<kWeight>(w);
    const typename S::V w1 = S::template load_at<kWeight + S::kBytes>(w);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const typename S::V x = S::template broadcast_at<kSource>(pixel[p], offset);
      S::fma(acc[p][0], x, w0);
      S::fma(acc[p][1], x, w1);
    }
  }
}

template <typename T, int N, int NV, int P, int kStep, int kSteps>
DDST_INLINE void multiply_steps(typename Simd<T, N>::V (&acc)[P][NV], const char* const (&pixel)[P], int64_t offset,
                                const char* w) {
  multiply_step<T, N, NV, P, kStep>(acc, pixel, offset, w);
  if constexpr (kStep + 1 < kSteps) multiply_steps<T, N, NV, P, kStep + 1, kSteps>(acc, pixel, offset, w);
}

// acc[j][v] += scalars[j] * x[v], the scalars being neighbours in memory.
template <typename T, int N, int NV, int J, int kFirst = 0>
DDST_INLINE void outer_step(typename Simd<T, N>::V (&acc)[J][NV], const typename Simd<T, N>::V (&x)[NV],
                            const char* scalars) {
  using S = Simd<T, N>;
  constexpr int kDisp = kFirst * static_cast<int>(sizeof(T));
  if constexpr (NV == 1) {
    S::template fma_broadcast<kDisp>(acc[kFirst][0], x[0], scalars);
  } else {
    const typename S::V y = S::template broadcast_at<kDisp>(scalars, 0);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) S::fma(acc[kFirst][v], y, x[v]);
  }
  if constexpr (kFirst + 1 < J) outer_step<T, N, NV, J, kFirst + 1>(acc, x, scalars);
}

// acc[j][v] += w[j] * x[v].
template <typename T, int N, int J, int V, int kFirst = 0>
DDST_INLINE void plane_step(typename Simd<T, N>::V (&acc)[J][V], const typename Simd<T, N>::V (&x)[V], const char* w) {
  const typename Simd<T, N>::V wv = Simd<T, N>::template broadcast_at<kFirst* static_cast<int>(sizeof(T))>(w, 0);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) Simd<T, N>::fma(acc[kFirst][v], x[v], wv);
  if constexpr (kFirst + 1 < J) plane_step<T, N, J, V, kFirst + 1>(acc, x, w);
}

// Neighbouring pixels that gather_outer_steps takes at a time.
template <int N>
constexpr int kPixelsTogether = 1;

// acc[j] += vector of a pixel * scalars[j] of it, for kPixels neighbouring pixels.
template <typename T, int N, int J, int kPixels>
DDST_INLINE void gather_outer_steps(typename Simd<T, N>::V (&acc)[J][1], const char* vector, int64_t /*vector_step*/,
                                    const char* const (&scalars)[J], int64_t offset) {
  using S = Simd<T, N>;
  static_assert(kPixels == 1, "one pixel");
  const typename S::V v = S::template load_at<0>(vector);
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j) S::template fma_broadcast<0>(acc[j][0], v, scalars[j], offset);
}

}  // namespace
}  // namespace ddst::cpu
#endif
