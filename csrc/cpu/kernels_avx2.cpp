// Kernels for AVX2 + FMA: 16 registers of 256 bits.
#include "kernels.hpp"

#if defined(__x86_64__)
#if !defined(__AVX2__) || !defined(__FMA__)
#error "compile this file with -mavx2 -mfma"
#endif
#include "dot.hpp"
#include "gather.hpp"
#include "layout.hpp"
#include "plane_gather.hpp"
#include "planes.hpp"
#include "rows.hpp"
#include "weight_grad.hpp"

namespace ddst::cpu {
namespace {

constexpr SliceShape kSlicesFloat[] = {{16, 6, 2.0f, 6}, {8, 12, 1.0f, 12}, {4, 12, 0.99f, 12}, {0, 0, 0.0f, 0}};
constexpr SliceShape kSlicesDouble[] = {{8, 6, 2.0f, 6}, {4, 12, 1.0f, 12}, {0, 0, 0.0f, 0}};
constexpr DotShape kDotsFloat[] = {{1, 8, 12}, {2, 8, 6}, {4, 8, 3}, {0, 0, 0}};
constexpr DotShape kDotsDouble[] = {{1, 4, 12}, {2, 4, 6}, {4, 4, 3}, {0, 0, 0}};
constexpr SliceShape kPlaneSlices[] = {{4, 0, 1.0f, 0}, {0, 0, 0.0f, 0}};
constexpr int kWeightGradFloat[] = {8, 0};
constexpr int kWeightGradDouble[] = {4, 0};

// N: lanes of a register.
template <typename T, int N>
void dot(const GatherJob<T>& job, int64_t t0, int64_t t1, int64_t b0, int64_t b1) {
  if (job.block_out == 1) return dot_channels<T, N, 1, 12>(job, t0, t1, b0, b1);
  if (job.block_out == 2) return dot_channels<T, N, 2, 6>(job, t0, t1, b0, b1);
  dot_channels<T, N, 4, 3>(job, t0, t1, b0, b1);
}

void gather_float(const GatherJob<float>& job, int64_t t0, int64_t t1, int64_t b0, int64_t b1) {
  if (job.dot_lanes == 8) return dot<float, 8>(job, t0, t1, b0, b1);
  if (job.slice == 16) return gather_slices<float, 8, 2, 6, 6>(job, t0, t1, b0, b1);
  if (job.slice == 8) return gather_slices<float, 8, 1, 12, 12>(job, t0, t1, b0, b1);
  gather_slices<float, 4, 1, 12, 12>(job, t0, t1, b0, b1);
}

void gather_double(const GatherJob<double>& job, int64_t t0, int64_t t1, int64_t b0, int64_t b1) {
  if (job.dot_lanes == 4) return dot<double, 4>(job, t0, t1, b0, b1);
  if (job.slice == 8) return gather_slices<double, 4, 2, 6, 6>(job, t0, t1, b0, b1);
  gather_slices<double, 4, 1, 12, 12>(job, t0, t1, b0, b1);
}

template <typename T, int N>
void weight_grad(const WeightGradJob<T>& job, int64_t c0, int64_t c1, int64_t b0, int64_t b1, T* partial, T* in,
                 T* grad, Run* runs, int64_t* run_begin) {
  if (!job.vector_over_in)
    return weight_grad_over_out<T, N, 8>(job, c0, c1, b0, b1, partial, in, grad, runs, run_begin);
  weight_grad_over_in<T, N, 16>(job, c0, c1, b0, b1, partial, in, grad, runs, run_begin);
}

}  // namespace

const KernelSet& kernels_avx2() {
  static constexpr KernelSet set{1,
                                 {kSlicesFloat, kDotsFloat, kPlaneSlices, 4, kWeightGradFloat, 8, &gather_float,
                                  &run_planes<float, 8, 3>, &run_plane_gather<float, 8, 4, 3>, &pack_weights<float>,
                                  &transpose<float>, &weight_grad<float, 8>, row_kernels<float>()},
                                 {kSlicesDouble, kDotsDouble, kPlaneSlices, 4, kWeightGradDouble, 4, &gather_double,
                                  &run_planes<double, 4, 3>, &run_plane_gather<double, 4, 4, 3>, &pack_weights<double>,
                                  &transpose<double>, &weight_grad<double, 4>, row_kernels<double>()}};
  return set;
}

}  // namespace ddst::cpu
#endif
