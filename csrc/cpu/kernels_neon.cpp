// Kernels for NEON, which every AArch64 processor has: 32 registers of 128 bits, and multiply-adds by element.
#include "kernels.hpp"

#if defined(__aarch64__)
#define DDST_NEON
#include "block_vector.hpp"
#include "dot.hpp"
#include "gather.hpp"
#include "layout.hpp"
#include "panel.hpp"
#include "plane_gather.hpp"
#include "planes.hpp"
#include "rows.hpp"
#include "weight_grad.hpp"

namespace ddst::cpu {
namespace {

// 24 sums, four registers of weights and four for the numbers that they are multiplied with.
constexpr SliceShape kSlicesFloat[] = {{16, 6, 2.0f, 6}, {8, 12, 1.0f, 12}, {4, 16, 0.52f, 16}, {0, 0, 0.0f, 0}};
constexpr SliceShape kSlicesDouble[] = {{8, 6, 2.0f, 6}, {4, 12, 1.0f, 12}, {2, 16, 0.52f, 16}, {0, 0, 0.0f, 0}};
constexpr DotShape kDotsFloat[] = {{1, 4, 12}, {2, 4, 10}, {0, 0, 0}};
constexpr DotShape kDotsDouble[] = {{1, 2, 12}, {0, 0, 0}};
constexpr SliceShape kPlaneSlices[] = {{4, 0, 1.0f, 0}, {0, 0, 0.0f, 0}};
constexpr int kWeightGradFloat[] = {4, 0};
constexpr int kWeightGradDouble[] = {2, 0};

// N: lanes of a register.
template <typename T, int N>
void gather(const GatherJob<T>& job, int64_t t0, int64_t t1, int64_t b0, int64_t b1) {
  if (job.dot_lanes != 0 && job.block_out == 1) return dot_channels<T, N, 1, 12>(job, t0, t1, b0, b1);
  if (job.dot_lanes != 0) return dot_channels<T, N, 2, 10>(job, t0, t1, b0, b1);
  if (job.slice == 4 * N) return gather_slices<T, N, 4, 6, 6>(job, t0, t1, b0, b1);
  if (job.slice == 2 * N) return gather_slices<T, N, 2, 12, 12>(job, t0, t1, b0, b1);
  gather_slices<T, N, 1, 16, 16>(job, t0, t1, b0, b1);
}

template <typename T, int N>
void weight_grad(const WeightGradJob<T>& job, int64_t c0, int64_t c1, int64_t b0, int64_t b1, T* partial, T* in,
                 T* grad, Run* runs, int64_t* run_begin) {
  if (!job.vector_over_in)
    return weight_grad_over_out<T, N, 16>(job, c0, c1, b0, b1, partial, in, grad, runs, run_begin);
  weight_grad_over_in<T, N, 28>(job, c0, c1, b0, b1, partial, in, grad, runs, run_begin);
}

}  // namespace

const KernelSet& kernels_neon() {
  static constexpr KernelSet set{
      3,
      {kSlicesFloat, kDotsFloat, kPlaneSlices, 4, kWeightGradFloat, 4, &gather<float, 4>, &run_planes<float, 4, 6>,
       &run_plane_gather<float, 4, 4, 6>, 3, &run_panels<float, 4, 8, 3>, &block_vector<float, 4>, &pack_weights<float>,
       &transpose<float>, &weight_grad<float, 4>, row_kernels<float>()},
      {kSlicesDouble, kDotsDouble, kPlaneSlices, 4, kWeightGradDouble, 2, &gather<double, 2>, &run_planes<double, 2, 6>,
       &run_plane_gather<double, 2, 4, 6>, 3, &run_panels<double, 2, 8, 3>, &block_vector<double, 2>,
       &pack_weights<double>, &transpose<double>, &weight_grad<double, 2>, row_kernels<double>()}};
  return set;
}

}  // namespace ddst::cpu
#endif
