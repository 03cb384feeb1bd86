// What stands before and behind a convolution, pixel by pixel: norm, activation, upsampling, pooling, sums, and their
// derivatives. Rows of pixels [pixel][channel]. Included only by kernels_*.cpp.
#pragma once

#include "kernels.hpp"
#include "microkernel.hpp"

namespace ddst::cpu {
namespace {

// A cache line of channels: the compiler cuts it into the registers it has.
template <typename T>
struct Line {
  static constexpr int kLanes = 64 / sizeof(T);
  typedef T V __attribute__((vector_size(64)));
  static DDST_INLINE V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
  }
  static DDST_INLINE void store(T* p, V v) { std::memcpy(p, &v, sizeof(V)); }
};

// f(Lanes(), channel) for stretches of channels: whole lines, then single channels.
struct Single {};
struct Whole {};
template <typename T, typename F>
DDST_INLINE void for_channels(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + Line<T>::kLanes <= channels; c += Line<T>::kLanes) f(Whole(), c);
  for (; c < channels; ++c) f(Single(), c);
}
template <typename T>
DDST_INLINE typename Line<T>::V load(Whole, const T* p) {
  return Line<T>::load(p);
}
template <typename T>
DDST_INLINE T load(Single, const T* p) {
  return *p;
}
template <typename T>
DDST_INLINE void store(Whole, T* p, typename Line<T>::V v) {
  Line<T>::store(p, v);
}
template <typename T>
DDST_INLINE void store(Single, T* p, T v) {
  *p = v;
}

enum class Act { kNone, kRelu, kLeaky };

template <Act kAct, typename V, typename T>
DDST_INLINE V act(V z, T slope) {
  if constexpr (kAct == Act::kNone) return z;
  const V zero{};
  if constexpr (kAct == Act::kRelu) return z < zero ? zero : z;  // a NaN stays
  return z > zero ? z : z * slope;
}

template <Act kAct, typename V, typename T>
DDST_INLINE V act_grad(V z, V grad, T slope) {
  if constexpr (kAct == Act::kNone) return grad;
  const V zero{};
  if constexpr (kAct == Act::kRelu) return z <= zero ? zero : grad;
  return z > zero ? grad : grad * slope;
}

// f(the activation as a constant, whether there is a norm as a constant).
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};
template <Act kValue>
struct ActFlag {
  static constexpr Act value = kValue;
};
template <typename T, typename F>
DDST_INLINE void with_form(const RowForm<T>& form, const F& f) {
  const bool norm = form.scale != nullptr;
  if (form.slope == T(1))
    return norm ? f(ActFlag<Act::kNone>(), Flag<true>()) : f(ActFlag<Act::kNone>(), Flag<false>());
  if (form.slope == T(0))
    return norm ? f(ActFlag<Act::kRelu>(), Flag<true>()) : f(ActFlag<Act::kRelu>(), Flag<false>());
  norm ? f(ActFlag<Act::kLeaky>(), Flag<true>()) : f(ActFlag<Act::kLeaky>(), Flag<false>());
}

// out = act((x - mean) * scale + shift), every pixel `repeat` times.
template <typename T>
void activate_row(const T* x, int64_t pixels, int64_t channels, const RowForm<T>& form, int64_t repeat, T* out) {
  with_form(form, [&](auto act_flag, auto norm_flag) {
    for (int64_t p = 0; p < pixels; ++p, x += channels, out += repeat * channels) {
      for_channels<T>(channels, [&](auto lanes, int64_t c) {
        auto z = load(lanes, x + c);
        if constexpr (norm_flag.value)
          z = (z - load(lanes, form.mean + c)) * load(lanes, form.scale + c) + load(lanes, form.shift + c);
        z = act<act_flag.value>(z, form.slope);
        store(lanes, out + c, z);
        if (repeat == 2) store(lanes, out + channels + c, z);
      });
    }
  });
}

// out[p] = source[p], or the mean of the 2x2 pixels of two rows, plus residual[p / repeat] where there is one.
template <typename T>
void finish_row(const T* row, const T* next_row, int64_t pixels, int64_t channels, const T* residual, int64_t repeat,
                T* out) {
  const bool pool = next_row != nullptr;
  for (int64_t p = 0; p < pixels; ++p) {
    const T* const a = row + (pool ? 2 : 1) * p * channels;
    const T* const b = pool ? next_row + 2 * p * channels : nullptr;
    const T* const r = residual != nullptr ? residual + p / repeat * channels : nullptr;
    for_channels<T>(channels, [&](auto lanes, int64_t c) {
      auto y = load(lanes, a + c);
      if (pool) y = (y + load(lanes, a + channels + c) + load(lanes, b + c) + load(lanes, b + channels + c)) * T(0.25);
      if (residual != nullptr) y += load(lanes, r + c);
      store(lanes, out + p * channels + c, y);
    });
  }
}

// sums += sum of (x - shift), squares += sum of (x - shift)^2.
template <typename T>
void sum_rows(const T* x, int64_t pixels, int64_t channels, const T* shift, T* sums, T* squares) {
  for_channels<T>(channels, [&](auto lanes, int64_t c) {
    const auto from = load(lanes, shift + c);
    auto sum = load(lanes, sums + c), square = load(lanes, squares + c);
    for (int64_t p = 0; p < pixels; ++p) {
      const auto d = load(lanes, x + p * channels + c) - from;
      sum += d;
      square += d * d;
    }
    store(lanes, sums + c, sum);
    store(lanes, squares + c, square);
  });
}

// out = act'(z) * grad, where grad[p] is row[p] or the sum of the 2x2 pixels of two rows; with a norm, sums += out and
// products += out * (x - mean).
template <typename T>
void activate_grad_row(const T* row, const T* next_row, const T* x, int64_t pixels, int64_t channels,
                       const RowForm<T>& form, T* out, T* sums, T* products) {
  const bool doubled = next_row != nullptr;
  with_form(form, [&](auto act_flag, auto norm_flag) {
    for_channels<T>(channels, [&](auto lanes, int64_t c) {
      decltype(load(lanes, x)) sum{}, product{}, mean{}, scale{}, shift{};
      if constexpr (norm_flag.value) {
        sum = load(lanes, sums + c), product = load(lanes, products + c);
        mean = load(lanes, form.mean + c), scale = load(lanes, form.scale + c), shift = load(lanes, form.shift + c);
      }
      for (int64_t p = 0; p < pixels; ++p) {
        const T* const a = row + (doubled ? 2 : 1) * p * channels + c;
        auto grad = load(lanes, a);
        if (doubled) {
          const T* const b = next_row + 2 * p * channels + c;
          grad += load(lanes, a + channels) + load(lanes, b) + load(lanes, b + channels);
        }
        auto z = load(lanes, x + p * channels + c);
        if constexpr (norm_flag.value) {
          const auto d = z - mean;
          grad = act_grad<act_flag.value>(d * scale + shift, grad, form.slope);
          sum += grad;
          product += grad * d;
        } else {
          grad = act_grad<act_flag.value>(z, grad, form.slope);
        }
        store(lanes, out + p * channels + c, grad);
      }
      if constexpr (norm_flag.value) {
        store(lanes, sums + c, sum);
        store(lanes, products + c, product);
      }
    });
  });
}

// grad = grad * scale + (x - mean) * slope + constant; x may be null, then grad * scale.
template <typename T>
void norm_grad_rows(T* grad, const T* x, int64_t pixels, int64_t channels, const T* mean, const T* scale,
                    const T* slope, const T* constant) {
  for (int64_t p = 0; p < pixels; ++p, grad += channels) {
    const T* const from = x != nullptr ? x + p * channels : nullptr;
    for_channels<T>(channels, [&](auto lanes, int64_t c) {
      auto g = load(lanes, grad + c) * load(lanes, scale + c);
      if (x != nullptr)
        g += (load(lanes, from + c) - load(lanes, mean + c)) * load(lanes, slope + c) + load(lanes, constant + c);
      store(lanes, grad + c, g);
    });
  }
}

template <typename T>
constexpr RowKernels<T> row_kernels() {
  return {&activate_row<T>, &finish_row<T>, &sum_rows<T>, &activate_grad_row<T>, &norm_grad_rows<T>};
}

}  // namespace
}  // namespace ddst::cpu
