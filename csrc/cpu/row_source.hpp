// The map that a convolution's pass reads, made of a tensor's rows as they are needed: normalised, activated, enlarged.
#pragma once

#include <algorithm>
#include <cstring>

#include "activation.hpp"

namespace ddst::cpu {

// Per channel, and per sample where gamma and beta are: what (x - mean) is multiplied by, and what is added.
template <typename T>
struct NormTerms {
  bool present = false;
  int64_t channels = 0;
  int64_t samples = 1;  // rows of scale, shift and gamma: 1, or one a sample
  Array<T> mean, scale, shift;
  Array<double> rstd, gamma;

  RowForm<T> form(int64_t image, double slope) const {
    if (!present) return {nullptr, nullptr, nullptr, static_cast<T>(slope)};
    const int64_t first = samples == 1 ? 0 : image * channels;
    return {mean.data(), scale.data() + first, shift.data() + first, static_cast<T>(slope)};
  }
};

template <typename T>
struct RowSource {
  const Kernels<T>& kernels;
  const NormTerms<T>& norm;
  double slope;
  const T* x;  // NHWC
  int64_t h, w, channels;
  int64_t repeat;        // 1 or 2: rows and columns of the map for each of x
  int64_t map_h, map_w;  // zeros beyond repeat * h and repeat * w

  bool identity() const { return !norm.present && slope == 1 && repeat == 1 && map_h == h && map_w == w; }
  int64_t row_size() const { return map_w * channels; }
  int64_t image_size() const { return map_h * row_size(); }
  const T* row(int64_t image, int64_t r) const { return x + (image * h + r) * w * channels; }

  void write(int64_t image, int64_t row_begin, int64_t rows, T* out) const {
    const RowForm<T> form = norm.form(image, slope);
    if (repeat == 1 && map_w == w) {
      const int64_t there = std::clamp<int64_t>(h - row_begin, 0, rows);
      kernels.rows.activate(row(image, row_begin), there * w, channels, form, 1, out);
      std::fill(out + there * row_size(), out + rows * row_size(), T(0));
      return;
    }
    for (int64_t r = 0; r < rows; ++r, out += row_size()) {
      const int64_t from = (row_begin + r) / repeat;
      if (from >= h) {
        std::fill(out, out + row_size(), T(0));
      } else if (r > 0 && (row_begin + r) % repeat != 0) {
        std::memcpy(out, out - row_size(), sizeof(T) * row_size());
      } else {
        kernels.rows.activate(row(image, from), w, channels, form, repeat, out);
        std::fill(out + repeat * w * channels, out + row_size(), T(0));
      }
    }
  }
};

// Mean and sum of squared differences from it, per channel; pieces are merged by the formula of Chan, Golub, LeVeque.
struct Moments {
  double count = 0;
  Array<double> mean, squares;

  explicit Moments(int64_t channels) : mean(channels, 0.0), squares(channels, 0.0) {}

  void merge(double n, int64_t c, double piece_mean, double piece_squares) {
    const double delta = piece_mean - mean[c], total = count + n;
    mean[c] += delta * n / total;
    squares[c] += piece_squares + delta * delta * count * n / total;
  }

  // Pixels one after the other. Within a piece differences are taken from its own mean, so that nothing cancels.
  template <typename T>
  void add(const Kernels<T>& kernels, const T* x, int64_t pixels) {
    constexpr int64_t kPiece = 512;
    const int64_t channels = static_cast<int64_t>(mean.size());
    Array<T> shift(channels), sums(channels), products(channels);
    for (int64_t begin = 0; begin < pixels; begin += kPiece) {
      const T* const piece = x + begin * channels;
      const int64_t n = std::min(kPiece, pixels - begin);
      std::copy(piece, piece + channels, shift.begin());
      for (int pass = 0; pass < 2; ++pass) {
        std::fill(sums.begin(), sums.end(), T(0));
        std::fill(products.begin(), products.end(), T(0));
        kernels.rows.sum(piece, n, channels, shift.data(), sums.data(), products.data());
        for (int64_t c = 0; pass == 0 && c < channels; ++c) shift[c] += sums[c] / static_cast<T>(n);
      }
      const double count_of_piece = static_cast<double>(n);
      for (int64_t c = 0; c < channels; ++c) {
        const double rest = static_cast<double>(sums[c]);
        merge(count_of_piece, c, static_cast<double>(shift[c]) + rest / count_of_piece,
              static_cast<double>(products[c]) - rest * rest / count_of_piece);
      }
      count += count_of_piece;
    }
  }

  void add(const Moments& other) {
    if (other.count == 0) return;
    for (size_t c = 0; c < mean.size(); ++c)
      merge(other.count, static_cast<int64_t>(c), other.mean[c], other.squares[c]);
    count += other.count;
  }

  // [mean, biased variance]
  template <typename T>
  void write(T* out) const {
    const int64_t channels = static_cast<int64_t>(mean.size());
    for (int64_t c = 0; c < channels; ++c) {
      out[c] = static_cast<T>(mean[c]);
      out[channels + c] = static_cast<T>(squares[c] / count);
    }
  }
};

}  // namespace ddst::cpu
