// What the rows of pixels before and behind a convolution must become (csrc/cpu/rows.hpp), in float64.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "cpu/kernels.hpp"
#include "problem.hpp"

namespace problem {

using ddst::cpu::RowForm;
using ddst::cpu::RowKernels;

// The rows of one problem: some pixels of some channels, with or without a norm, a slope, a second row.
template <typename T>
class RowsCase {
 public:
  RowsCase(const RowKernels<T>& kernels, int64_t pixels, int64_t channels, bool norm, T slope, bool pairs,
           std::mt19937_64& random)
      : kernels_(kernels),
        pixels_(pixels),
        channels_(channels),
        norm_(norm),
        pairs_(pairs),
        x_(pixels * channels),
        row_((pairs ? 2 : 1) * pixels * channels),
        next_(row_.size()),
        mean_(channels),
        scale_(channels),
        shift_(channels) {
    std::normal_distribution<double> normal;
    for (const Memory<T>* m : {&x_, &row_, &next_, &mean_, &scale_, &shift_})
      for (int64_t i = 0; i < m->size(); ++i) (*m)[i] = static_cast<T>(normal(random));
    form_ = {norm ? mean_.get() : nullptr, norm ? scale_.get() : nullptr, norm ? shift_.get() : nullptr, slope};
  }

  // check(name, got, expected sums) for each kernel.
  template <typename F>
  void run(const F& check) const {
    const int64_t repeat = pairs_ ? 2 : 1, size = pixels_ * channels_;
    Memory<T> activated(repeat * size), finished(size), grad(size);
    Sums expected(activated.size());
    kernels_.activate(x_.get(), pixels_, channels_, form_, repeat, activated.get());
    for (int64_t i = 0; i < activated.size(); ++i) {
      const int64_t from = i / channels_ / repeat * channels_ + i % channels_;
      const double z = normed(from);
      expected.add(i, z > 0 ? z : z * form_.slope);
      expected.magnitude[i] = size_of_normed(from);
    }
    check("activate", activated.get(), expected);

    expected = Sums(size);
    kernels_.finish(row_.get(), pairs_ ? next_.get() : nullptr, pixels_, channels_, x_.get(), 1, finished.get());
    for (int64_t i = 0; i < size; ++i) {
      expected.add(i, x_[i]);
      for_parts(i, [&](T part) { expected.add(i, pairs_ ? part * 0.25 : part); });
    }
    check("finish", finished.get(), expected);

    Sums sums(channels_), squares(channels_), products(channels_);
    const Memory<T> sum = zeros(), square = zeros(), product = zeros();
    kernels_.sum(x_.get(), pixels_, channels_, mean_.get(), sum.get(), square.get());
    for (int64_t i = 0; i < size; ++i) {
      const double d = x_[i] - static_cast<double>(mean_[i % channels_]);
      const double most = std::abs(x_[i]) + std::abs(mean_[i % channels_]);
      add(sums, i % channels_, d, most);
      add(squares, i % channels_, d * d, most * most);
    }
    check("sum", sum.get(), sums);
    check("sum of squares", square.get(), squares);

    sums = Sums(channels_);
    expected = Sums(size);
    const Memory<T> grads = zeros();
    kernels_.activate_grad(row_.get(), pairs_ ? next_.get() : nullptr, x_.get(), pixels_, channels_, form_, grad.get(),
                           grads.get(), product.get());
    for (int64_t i = 0; i < size; ++i) {
      const double factor = normed(i) > 0 ? 1 : form_.slope;
      for_parts(i, [&](T part) { expected.add(i, part * factor); });
      const double d = norm_ ? x_[i] - static_cast<double>(mean_[i % channels_]) : 0;
      add(sums, i % channels_, norm_ ? expected.value[i] : 0, norm_ ? expected.magnitude[i] : 0);
      add(products, i % channels_, expected.value[i] * d,
          expected.magnitude[i] * (norm_ ? std::abs(x_[i]) + std::abs(mean_[i % channels_]) : 0));
    }
    check("activate_grad", grad.get(), expected);
    check("sums of activate_grad", grads.get(), sums);
    check("products of activate_grad", product.get(), products);

    expected = Sums(size);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t c = i % channels_;
      expected.add(i, static_cast<double>(grad[i]) * scale_[c]);
      if (norm_) {
        expected.add(i, (x_[i] - static_cast<double>(mean_[c])) * shift_[c] + mean_[c]);
        expected.magnitude[i] += (std::abs(x_[i]) + std::abs(mean_[c])) * std::abs(shift_[c]) + std::abs(mean_[c]);
      }
    }
    kernels_.norm_grad(grad.get(), norm_ ? x_.get() : nullptr, pixels_, channels_, mean_.get(), scale_.get(),
                       shift_.get(), mean_.get());
    check("norm_grad", grad.get(), expected);
  }

 private:
  static void add(Sums& sums, int64_t i, double term, double magnitude) {
    sums.value[i] += term;
    sums.magnitude[i] += magnitude;
    sums.terms[i] += 4;  // each term is rounded itself
  }
  Memory<T> zeros() const {
    Memory<T> memory(channels_);
    for (int64_t c = 0; c < channels_; ++c) memory[c] = 0;
    return memory;
  }
  double normed(int64_t i) const {
    const int64_t c = i % channels_;
    return norm_ ? (x_[i] - static_cast<double>(mean_[c])) * scale_[c] + shift_[c] : x_[i];
  }
  double size_of_normed(int64_t i) const {
    const int64_t c = i % channels_;
    return norm_ ? (std::abs(x_[i]) + std::abs(mean_[c])) * std::abs(scale_[c]) + std::abs(shift_[c]) : std::abs(x_[i]);
  }
  // What pixel and channel i takes from one row, or from 2x2 pixels of two.
  template <typename F>
  void for_parts(int64_t i, const F& f) const {
    if (!pairs_) return f(row_[i]);
    const int64_t first = i / channels_ * 2 * channels_ + i % channels_;
    for (const Memory<T>* m : {&row_, &next_})
      for (int64_t step : {int64_t{0}, channels_}) f((*m)[first + step]);
  }

  const RowKernels<T> kernels_;
  const int64_t pixels_, channels_;
  const bool norm_, pairs_;
  const Memory<T> x_, row_, next_, mean_, scale_, shift_;
  RowForm<T> form_;
};

}  // namespace problem
