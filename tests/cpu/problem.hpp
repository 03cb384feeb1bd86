// Problems for the CPU kernels without torch: a random block-sparse convolution, and what it must give, in float64.
#pragma once

#include <cstdint>
#include <cstdio>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/gather_pass.hpp"
#include "cpu/weight_grad_pass.hpp"

namespace problem {

using ddst::cpu::ConvGeometry;

// Uninitialised memory as close to its end as operator new gives it (guard_heap.cpp: NaN, and a page that faults).
template <typename T>
class Memory {
 public:
  explicit Memory(int64_t count) : count_(count), data_(static_cast<T*>(::operator new(count * sizeof(T)))) {}
  Memory(const Memory&) = delete;
  Memory(Memory&& other) noexcept : count_(other.count_), data_(std::exchange(other.data_, nullptr)) {}
  ~Memory() { ::operator delete(data_); }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  int64_t count_;
  T* data_;
};

struct Shape {
  ConvGeometry g;
  int64_t block_out, block_in;
  double density;
  bool bias = true;
  int64_t threads = 1;

  std::string text() const {
    char line[256];
    std::snprintf(
        line, sizeof line,
        "images %ld, %ldx%ld, channels %ld -> %ld, kernel %ldx%ld, stride %ld %ld, padding %ld %ld, dilation %ld "
        "%ld, block %ldx%ld, density %g, threads %ld",
        long(g.images), long(g.in_h), long(g.in_w), long(g.in_channels), long(g.out_channels), long(g.kernel_h),
        long(g.kernel_w), long(g.stride_h), long(g.stride_w), long(g.pad_h), long(g.pad_w), long(g.dilation_h),
        long(g.dilation_w), long(block_out), long(block_in), density, long(threads));
    return line;
  }
};

inline int64_t out_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t room = in + 2 * pad - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

// Blocks in random slots, of which a fifth stay free, in both orders of ddst/topology.py.
struct Blocks {
  int64_t rows, cols, taps, slots;
  std::vector<int32_t> block_row, block_col, block_tap;  // [slots]
  std::vector<int32_t> row_ptr, col_ptr, row_order, col_order;
  std::vector<bool> used;  // [slots]

  Blocks(const Shape& s, std::mt19937_64& random) {
    rows = ddst::ceil_div(s.g.out_channels, s.block_out);
    cols = ddst::ceil_div(s.g.in_channels, s.block_in);
    taps = s.g.kernel_h * s.g.kernel_w;
    std::vector<int64_t> chosen;
    std::bernoulli_distribution active(s.density);
    for (int64_t i = 0; i < rows * cols * taps; ++i)
      if (active(random)) chosen.push_back(i);
    const int64_t nnz = static_cast<int64_t>(chosen.size());
    slots = nnz + nnz / 4 + 1;
    std::vector<int32_t> slot_of(slots);
    for (int64_t i = 0; i < slots; ++i) slot_of[i] = static_cast<int32_t>(i);
    std::shuffle(slot_of.begin(), slot_of.end(), random);
    block_row.assign(slots, static_cast<int32_t>(rows));
    block_col.assign(slots, 0);
    block_tap.assign(slots, 0);
    used.assign(slots, false);
    row_ptr.assign(rows + 1, 0);
    col_ptr.assign(cols + 1, 0);
    for (int64_t i = 0; i < nnz; ++i) {
      const int32_t slot = slot_of[i];
      used[slot] = true;
      block_row[slot] = static_cast<int32_t>(chosen[i] / (cols * taps));
      block_col[slot] = static_cast<int32_t>(chosen[i] / taps % cols);
      block_tap[slot] = static_cast<int32_t>(chosen[i] % taps);
      row_order.push_back(slot);  // chosen rises by row, column, tap
      ++row_ptr[block_row[slot] + 1];
      ++col_ptr[block_col[slot] + 1];
    }
    col_order = row_order;
    std::stable_sort(col_order.begin(), col_order.end(),
                     [&](int32_t a, int32_t b) { return block_col[a] < block_col[b]; });
    for (int64_t r = 0; r < rows; ++r) row_ptr[r + 1] += row_ptr[r];
    for (int64_t c = 0; c < cols; ++c) col_ptr[c + 1] += col_ptr[c];
  }
  int64_t nnz() const { return static_cast<int64_t>(row_order.size()); }
};

// A result in float64: sums, what their terms amount to without signs, and how many there are.
struct Sums {
  std::vector<double> value, magnitude;
  std::vector<int32_t> terms;
  explicit Sums(int64_t n) : value(n, 0), magnitude(n, 0), terms(n, 0) {}
  void add(int64_t i, double term) {
    value[i] += term;
    magnitude[i] += std::abs(term);
    ++terms[i];
  }
};

// Calls f(input pixel, output pixel) for the pixels that a tap brings together.
template <typename F>
void for_pixels(const ConvGeometry& g, int64_t tap, const F& f) {
  const int64_t kh = tap / g.kernel_w, kw = tap % g.kernel_w;
  for (int64_t n = 0; n < g.images; ++n)
    for (int64_t row = 0; row < g.out_h; ++row)
      for (int64_t col = 0; col < g.out_w; ++col) {
        const int64_t y = row * g.stride_h - g.pad_h + kh * g.dilation_h;
        const int64_t x = col * g.stride_w - g.pad_w + kw * g.dilation_w;
        if (y < 0 || y >= g.in_h || x < 0 || x >= g.in_w) continue;
        f((n * g.in_h + y) * g.in_w + x, (n * g.out_h + row) * g.out_w + col);
      }
}

}  // namespace problem
