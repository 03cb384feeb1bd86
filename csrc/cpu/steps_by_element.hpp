// The steps of the kernels with NEON: multiply-adds take one number from any lane of a register, so that a load brings
// some numbers and costs none of the units that multiply (one that broadcasts does). Included only by microkernel.hpp.
#pragma once

namespace ddst::cpu {
namespace {

// acc[v] += w[v] * x[kLane].
template <typename T, int N, int NV, int kLane>
DDST_INLINE void multiply_lane(typename Simd<T, N>::V (&acc)[NV], const typename Simd<T, N>::V (&w)[NV],
                               typename Simd<T, N>::V x) {
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) Simd<T, N>::template fma_lane<kLane>(acc[v], w[v], x);
}

// acc[v] += w[k][v] * x[k] over kSteps lanes.
template <typename T, int N, int NV, int kSteps, int kLane = 0>
DDST_INLINE void multiply_lanes(typename Simd<T, N>::V (&acc)[NV], const typename Simd<T, N>::V (&w)[kSteps][NV],
                                typename Simd<T, N>::V x) {
  multiply_lane<T, N, NV, kLane>(acc, w[kLane], x);
  if constexpr (kLane + 1 < kSteps) multiply_lanes<T, N, NV, kSteps, kLane + 1>(acc, w, x);
}

// The largest of 1, 2, 4 lanes that is at most `most`.
constexpr int lanes_of(int lanes, int most) {
  int found = 1;
  while (found * 2 <= lanes && found * 2 <= most) found *= 2;
  return found;
}

// rows[k] = load_row of kRows rows that follow each other.
template <typename T, int N, int NV, int kRows, int kDisp, int kFirst = 0>
DDST_INLINE void load_rows(typename Simd<T, N>::V (&rows)[kRows][NV], const char* p) {
  load_row<T, N, NV, kDisp + kFirst * NV * Simd<T, N>::kBytes>(rows[kFirst], p);
  if constexpr (kFirst + 1 < kRows) load_rows<T, N, NV, kRows, kDisp, kFirst + 1>(rows, p);
}

// acc[p][v] += w[v] * source of pixel p, for the steps [kStep, kSteps) of the reduction: as many at a time as have
// their weights in four registers beside the sums.
template <typename T, int N, int NV, int P, int kStep, int kSteps>
DDST_INLINE void multiply_steps(typename Simd<T, N>::V (&acc)[P][NV], const char* const (&pixel)[P], int64_t offset,
                                const char* w) {
  using S = Simd<T, N>;
  static_assert(NV <= 4, "one to four vectors");
  constexpr int kTogether = lanes_of(N, kSteps - kStep < 4 / NV ? kSteps - kStep : 4 / NV);
  typename S::V weights[kTogether][NV];
  load_rows<T, N, NV, kTogether, kStep * NV * S::kBytes>(weights, w);
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    multiply_lanes<T, N, NV, kTogether>(acc[p], weights, S::template load_lanes<kTogether>(pixel[p], offset));
  }
  if constexpr (kStep + kTogether < kSteps) {
    offset += kTogether * static_cast<int64_t>(sizeof(T));
    multiply_steps<T, N, NV, P, kStep + kTogether, kSteps>(acc, pixel, offset, w);
  }
}

template <typename T, int N, int NV, int P, int kStep>
DDST_INLINE void multiply_step(typename Simd<T, N>::V (&acc)[P][NV], const char* const (&pixel)[P], int64_t offset,
                               const char* w) {
  multiply_steps<T, N, NV, P, kStep, kStep + 1>(acc, pixel, offset, w);
}

// acc[kFirst + i][v] += scalars[i] * x[v] for the lanes i of a register.
template <typename T, int N, int NV, int J, int kFirst, int kLanes, int kLane = 0>
DDST_INLINE void outer_lanes(typename Simd<T, N>::V (&acc)[J][NV], const typename Simd<T, N>::V (&x)[NV],
                             typename Simd<T, N>::V scalars) {
  multiply_lane<T, N, NV, kLane>(acc[kFirst + kLane], x, scalars);
  if constexpr (kLane + 1 < kLanes) outer_lanes<T, N, NV, J, kFirst, kLanes, kLane + 1>(acc, x, scalars);
}

// acc[j][v] += scalars[j] * x[v], the scalars being neighbours in memory.
template <typename T, int N, int NV, int J, int kFirst = 0>
DDST_INLINE void outer_step(typename Simd<T, N>::V (&acc)[J][NV], const typename Simd<T, N>::V (&x)[NV],
                            const char* scalars) {
  using S = Simd<T, N>;
  constexpr int kLanes = lanes_of(N, J - kFirst), kDisp = kFirst * static_cast<int>(sizeof(T));
  outer_lanes<T, N, NV, J, kFirst, kLanes>(acc, x, S::template load_lanes_at<kLanes, kDisp>(scalars));
  if constexpr (kFirst + kLanes < J) outer_step<T, N, NV, J, kFirst + kLanes>(acc, x, scalars);
}

// acc[j][v] += w[j] * x[v].
template <typename T, int N, int J, int V>
DDST_INLINE void plane_step(typename Simd<T, N>::V (&acc)[J][V], const typename Simd<T, N>::V (&x)[V], const char* w) {
  outer_step<T, N, V, J>(acc, x, w);
}

// Neighbouring pixels that gather_outer_steps takes at a time.
template <int N>
constexpr int kPixelsTogether = N;

// acc[j] += vector of a pixel * scalars[j] of it, for kPixels neighbouring pixels.
template <typename T, int N, int J, int kPixels>
DDST_INLINE void gather_outer_steps(typename Simd<T, N>::V (&acc)[J][1], const char* vector, int64_t vector_step,
                                    const char* const (&scalars)[J], int64_t offset) {
  using S = Simd<T, N>;
  typename S::V vectors[kPixels][1];
#pragma GCC unroll 4
  for (int i = 0; i < kPixels; ++i) vectors[i][0] = S::load_at(vector, i * vector_step);
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j) {
    multiply_lanes<T, N, 1, kPixels>(acc[j], vectors, S::template load_lanes<kPixels>(scalars[j], offset));
  }
}

}  // namespace
}  // namespace ddst::cpu
