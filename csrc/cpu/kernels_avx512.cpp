// Kernels for AVX-512 (F, VL, BW, DQ): 32 registers of 512 bits, and multiply-adds that broadcast from memory.
#include "kernels.hpp"

#if defined(__x86_64__)
#if !defined(__AVX512F__) || !defined(__AVX512VL__) || !defined(__FMA__)
#error "compile this file with -mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma"
#endif
// GCC's own AVX-512 headers pass undefined registers to masked forms, and warn of it where they are inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "dot.hpp"
#include "gather.hpp"
#include "layout.hpp"
#include "plane_gather.hpp"
#include "planes.hpp"
#include "rows.hpp"
#include "weight_grad.hpp"

namespace ddst::cpu {
namespace {

// 12 pixels: their base addresses and the three running pointers just fit the general registers.
constexpr SliceShape kSlicesFloat[] = {
    {32, 12, 3.4f, 12}, {16, 12, 1.8f, 16}, {8, 12, 1.0f, 16}, {4, 12, 0.99f, 16}, {0, 0, 0.0f, 0}};
constexpr SliceShape kSlicesDouble[] = {{16, 12, 3.4f, 12}, {8, 12, 1.8f, 16}, {4, 12, 1.0f, 16}, {0, 0, 0.0f, 0}};
constexpr DotShape kDotsFloat[] = {{1, 16, 12}, {2, 16, 12}, {4, 16, 6}, {1, 8, 12}, {2, 8, 12}, {4, 8, 6}, {0, 0, 0}};
constexpr DotShape kDotsDouble[] = {{1, 8, 12}, {2, 8, 12}, {4, 8, 6}, {0, 0, 0}};
constexpr SliceShape kPlaneSlices[] = {{4, 0, 0.54f, 0}, {8, 0, 1.0f, 0}, {0, 0, 0.0f, 0}};
constexpr int kWeightGradFloat[] = {16, 8, 0};
constexpr int kWeightGradDouble[] = {8, 4, 0};

// N: lanes of a register.
template <typename T, int N>
void dot(const GatherJob<T>& job, int64_t t0, int64_t t1, int64_t b0, int64_t b1) {
  if (job.block_out == 1) return dot_channels<T, N, 1, 12>(job, t0, t1, b0, b1);
  if (job.block_out == 2) return dot_channels<T, N, 2, 12>(job, t0, t1, b0, b1);
  dot_channels<T, N, 4, 6>(job, t0, t1, b0, b1);
}

void gather_float(const GatherJob<float>& job, int64_t t0, int64_t t1, int64_t b0, int64_t b1) {
  if (job.dot_lanes == 16) return dot<float, 16>(job, t0, t1, b0, b1);
  if (job.dot_lanes == 8) return dot<float, 8>(job, t0, t1, b0, b1);
  if (job.slice == 32) return gather_slices<float, 16, 2, 12, 12>(job, t0, t1, b0, b1);
  if (job.slice == 16) return gather_slices<float, 16, 1, 12, 16>(job, t0, t1, b0, b1);
  if (job.slice == 8) return gather_slices<float, 8, 1, 12, 16>(job, t0, t1, b0, b1);
  gather_slices<float, 4, 1, 12, 16>(job, t0, t1, b0, b1);
}

void gather_double(const GatherJob<double>& job, int64_t t0, int64_t t1, int64_t b0, int64_t b1) {
  if (job.dot_lanes == 8) return dot<double, 8>(job, t0, t1, b0, b1);
  if (job.slice == 16) return gather_slices<double, 8, 2, 12, 12>(job, t0, t1, b0, b1);
  if (job.slice == 8) return gather_slices<double, 8, 1, 12, 16>(job, t0, t1, b0, b1);
  gather_slices<double, 4, 1, 12, 16>(job, t0, t1, b0, b1);
}

// N: lanes of a register.
template <typename T, int N>
void plane_gather(const PlaneGatherJob<T>& job, int64_t c0, int64_t c1, T* planes, T* spare, const char** pixels,
                  T** outs) {
  if (job.slice == 8) return run_plane_gather<T, N, 8, 3>(job, c0, c1, planes, spare, pixels, outs);
  run_plane_gather<T, N, 4, 6>(job, c0, c1, planes, spare, pixels, outs);
}

// N: lanes of a 512-bit register. Form 2 takes slices of a whole or half a register.
template <typename T, int N>
void weight_grad(const WeightGradJob<T>& job, int64_t c0, int64_t c1, int64_t b0, int64_t b1, T* partial, T* in,
                 T* grad, Run* runs, int64_t* run_begin) {
  if (!job.vector_over_in) {
    if (job.slice == N) return weight_grad_over_out<T, N, 8>(job, c0, c1, b0, b1, partial, in, grad, runs, run_begin);
    return weight_grad_over_out<T, N / 2, 8>(job, c0, c1, b0, b1, partial, in, grad, runs, run_begin);
  }
  if (job.slice == N) return weight_grad_over_in<T, N, 32>(job, c0, c1, b0, b1, partial, in, grad, runs, run_begin);
  weight_grad_over_in<T, N / 2, 32>(job, c0, c1, b0, b1, partial, in, grad, runs, run_begin);
}

}  // namespace

const KernelSet& kernels_avx512() {
  static constexpr KernelSet set{2,
                                 {kSlicesFloat, kDotsFloat, kPlaneSlices, 12, kWeightGradFloat, 16, &gather_float,
                                  &run_planes<float, 16, 4>, &plane_gather<float, 16>, &pack_weights<float>,
                                  &transpose<float>, &weight_grad<float, 16>, row_kernels<float>()},
                                 {kSlicesDouble, kDotsDouble, kPlaneSlices, 7, kWeightGradDouble, 8, &gather_double,
                                  &run_planes<double, 8, 4>, &plane_gather<double, 8>, &pack_weights<double>,
                                  &transpose<double>, &weight_grad<double, 8>, row_kernels<double>()}};
  return set;
}

}  // namespace ddst::cpu
#endif
