// Kernels for any processor: plain C++ over 128-bit vectors, which every compiler maps to what it has.
#include "gather.hpp"
#include "kernels.hpp"
#include "layout.hpp"
#include "plane_gather.hpp"
#include "planes.hpp"
#include "rows.hpp"
#include "weight_grad.hpp"

namespace ddst::cpu {
namespace {

constexpr SliceShape kSlicesFloat[] = {{8, 5, 2.0f, 5}, {4, 8, 1.1f, 8}, {0, 0, 0.0f, 0}};
constexpr SliceShape kSlicesDouble[] = {{4, 5, 2.0f, 5}, {2, 8, 1.1f, 8}, {0, 0, 0.0f, 0}};
constexpr DotShape kNoDots[] = {{0, 0, 0}};
constexpr SliceShape kPlaneSlices[] = {{4, 0, 1.0f, 0}, {0, 0, 0.0f, 0}};
constexpr int kWeightGradFloat[] = {4, 0};
constexpr int kWeightGradDouble[] = {2, 0};

template <typename T, int N>
void gather(const GatherJob<T>& job, int64_t t0, int64_t t1, int64_t b0, int64_t b1) {
  if (job.slice == 2 * N) return gather_slices<T, N, 2, 5, 5>(job, t0, t1, b0, b1);
  gather_slices<T, N, 1, 8, 8>(job, t0, t1, b0, b1);
}

template <typename T, int N>
void weight_grad(const WeightGradJob<T>& job, int64_t c0, int64_t c1, int64_t b0, int64_t b1, T* partial, T* in,
                 T* grad, Run* runs, int64_t* run_begin) {
  if (!job.vector_over_in)
    return weight_grad_over_out<T, N, 8>(job, c0, c1, b0, b1, partial, in, grad, runs, run_begin);
  weight_grad_over_in<T, N, 16>(job, c0, c1, b0, b1, partial, in, grad, runs, run_begin);
}

}  // namespace

const KernelSet& kernels_portable() {
  static constexpr KernelSet set{0,
                                 {kSlicesFloat, kNoDots, kPlaneSlices, 4, kWeightGradFloat, 4, &gather<float, 4>,
                                  &run_planes<float, 4, 2>, &run_plane_gather<float, 4, 4, 2>, &pack_weights<float>,
                                  &transpose<float>, &weight_grad<float, 4>, row_kernels<float>()},
                                 {kSlicesDouble, kNoDots, kPlaneSlices, 4, kWeightGradDouble, 2, &gather<double, 2>,
                                  &run_planes<double, 2, 2>, &run_plane_gather<double, 2, 4, 2>, &pack_weights<double>,
                                  &transpose<double>, &weight_grad<double, 2>, row_kernels<double>()}};
  return set;
}

}  // namespace ddst::cpu
