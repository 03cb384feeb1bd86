// A half of a residual block as the operators of norm_act_conv2d.cpp get it: its sizes, read and checked, its norm, and
// the two maps that convolutions read.
#pragma once

#include <cmath>
#include <optional>
#include <string>

#include "conv_geometry.hpp"
#include "row_source.hpp"

namespace ddst::cpu {

using MaybeTensor = std::optional<Tensor>;

// What the three operators have in common.
struct Half {
  WeightGrid grid;
  Topology topology;
  ConvGeometry geometry;  // of the convolution, over the enlarged map
  int64_t images, h, w;   // of the input
  int64_t upsample, pool;
  double eps, slope;

  int64_t out_h() const { return geometry.out_h / pool; }
  int64_t out_w() const { return geometry.out_w / pool; }
  int64_t multiply_adds() const {
    return images * geometry.out_h * geometry.out_w * topology.nnz * grid.block_out * grid.block_in;
  }
};

inline void check_factor(const char* op, const char* name, int64_t factor) {
  if (factor != 1 && factor != 2) fail(op, name, " is ", factor, ", expected 1 or 2");
}

inline Half read_half(const char* op, const Tensor& input, const WeightGrid& grid, const Tensor& topology,
                      const Ints& stride, const Ints& padding, const Ints& dilation, double eps, double slope,
                      int64_t upsample, int64_t pool) {
  check_factor(op, "upsample", upsample);
  check_factor(op, "pool", pool);
  const Window window = read_window(op, stride, padding, dilation);
  check_activation(op, "input", input, "C_in", grid.in_channels);
  check_floating(op, "input", input);
  const ConvGeometry g =
      make_geometry(op, grid, window, input.size(0), input.size(2) * upsample, input.size(3) * upsample);
  if (g.out_h < pool || g.out_w < pool)
    fail(op, "pool is ", pool, ", expected at most the output of ", g.out_h, " x ", g.out_w, " pixels");
  return {grid, read_topology(op, topology, grid), g, input.size(0), input.size(2), input.size(3), upsample, pool, eps,
          slope};
}

inline void check_norm(const char* op, const Tensor& input, const MaybeTensor& mean, const MaybeTensor& var,
                       const MaybeTensor& gamma, const MaybeTensor& beta) {
  const int64_t n = input.size(0), channels = input.size(1);
  const auto check = [&](const char* name, const MaybeTensor& t, bool per_sample) {
    if (!t) return;
    check_cpu(op, name, *t);
    check_dtype(op, name, *t, input.scalar_type(), "input");
    const bool one = t->dim() == 1 && t->size(0) == channels;
    if (one || (per_sample && t->dim() == 2 && t->size(0) == n && t->size(1) == channels)) return;
    fail(op, name, " has shape ", shape_text(*t), ", expected [", channels, "]",
         per_sample ? " or [" + std::to_string(n) + ", " + std::to_string(channels) + "]" : "");
  };
  check("mean", mean, false);
  check("var", var, false);
  check("gamma", gamma, true);
  check("beta", beta, true);
  if (mean.has_value() != var.has_value()) fail(op, "mean and var must both be there or neither");
  if (gamma.has_value() != beta.has_value() || (gamma && gamma->dim() != beta->dim()))
    fail(op, "gamma and beta must be of one shape or both be missing");
  if (gamma && !mean) fail(op, "gamma is there without mean");
}

template <typename T>
NormTerms<T> norm_terms(const Half& half, const MaybeTensor& mean, const MaybeTensor& var, const MaybeTensor& gamma,
                        const MaybeTensor& beta) {
  NormTerms<T> terms;
  terms.channels = half.grid.in_channels;
  if (!mean) return terms;
  terms.present = true;
  const int64_t channels = terms.channels;
  terms.samples = gamma && gamma->dim() == 2 ? half.images : 1;
  const Tensor dense_mean = as_contiguous(*mean), dense_var = as_contiguous(*var);
  const MaybeTensor dense_gamma = gamma ? MaybeTensor(as_contiguous(*gamma)) : std::nullopt;
  const MaybeTensor dense_beta = beta ? MaybeTensor(as_contiguous(*beta)) : std::nullopt;
  terms.mean.assign(dense_mean.const_data_ptr<T>(), dense_mean.const_data_ptr<T>() + channels);
  for (int64_t c = 0; c < channels; ++c)
    terms.rstd.push_back(1 / std::sqrt(static_cast<double>(dense_var.const_data_ptr<T>()[c]) + half.eps));
  const int64_t count = terms.samples * channels;
  terms.gamma.assign(count, 1.0);
  terms.scale.resize(count);
  terms.shift.assign(count, T(0));
  for (int64_t i = 0; i < count; ++i) {
    if (dense_gamma) terms.gamma[i] = static_cast<double>(dense_gamma->const_data_ptr<T>()[i]);
    if (dense_beta) terms.shift[i] = dense_beta->const_data_ptr<T>()[i];
    terms.scale[i] = static_cast<T>(terms.gamma[i] * terms.rstd[i % channels]);
  }
  return terms;
}

// The map that the convolution reads.
template <typename T>
RowSource<T> activated_map(const Kernels<T>& kernels, const Half& half, const NormTerms<T>& norm, const T* x) {
  const ConvGeometry& g = half.geometry;
  return {kernels, norm, half.slope, x, half.h, half.w, g.in_channels, half.upsample, g.in_h, g.in_w};
}

// A quarter of the pooled gradient at each of the four pixels; without pooling the gradient itself.
template <typename T>
struct Unpooled {
  NormTerms<T> quarter;
  RowSource<T> source;

  Unpooled(const Kernels<T>& kernels, const Half& half, const T* grad)
      : quarter(terms(half)),
        source{kernels,
               quarter,
               1,
               grad,
               half.out_h(),
               half.out_w(),
               half.geometry.out_channels,
               half.pool,
               half.geometry.out_h,
               half.geometry.out_w} {}
  Unpooled(const Unpooled&) = delete;

  static NormTerms<T> terms(const Half& half) {
    NormTerms<T> terms;
    terms.channels = half.geometry.out_channels;
    if (half.pool == 1) return terms;
    terms.present = true;
    terms.mean.assign(terms.channels, T(0));
    terms.scale.assign(terms.channels, T(0.25));
    terms.shift.assign(terms.channels, T(0));
    return terms;
  }
};

}  // namespace ddst::cpu
