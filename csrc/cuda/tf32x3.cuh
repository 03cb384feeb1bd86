// Products of float32 in full precision on TF32 tensor cores, three for one ("3xTF32"):
//
//   a b = low(a) high(b) + high(a) low(b) + high(a) high(b) + less than 2^-20 |a b|
//
// with high(a), a rounded to TF32 (11 bits), and low(a), the rest rounded again. Tensor cores are known to cut sums off
// instead of rounding them, each product a little towards zero; a few steps are therefore summed by themselves,
// beginning from zero and with the small terms, and added to the accumulators by rounding additions. (The scheme and
// this cure: H. Ootomo, R. Yokota, Recovering single precision accuracy from Tensor Cores, IJHPCA 36, 2022.)
//
// Where a is not finite, or above the largest TF32 number, its rest is no number or infinite: low(a) is zero there, and
// low(b) is multiplied by zero instead of high(a), so that infinities and NaN come out as in one product. Only where
// finite numbers overflow, NaN may stand for an infinity.
#pragma once
#include <cmath>

#include "device/primitives.cuh"

namespace ddst::cuda {

// What a kernel multiplies: dev::bf16, dev::fp16, float, which stands for TF32, or this.
struct tf32x3 {};

// The type that its tensors are stored in.
template <class Number>
struct Stored {
  using type = Number;
};
template <>
struct Stored<tf32x3> {
  using type = float;
};
template <class Number>
using stored_t = typename Stored<Number>::type;

// A fragment of kCount registers.
template <int kCount>
struct Split {
  std::uint32_t high[kCount], finite[kCount], low[kCount];  // finite: high, or zero

  DDST_DEVICE void set(int i, float value) {
    high[i] = dev::to_tf32(value);
    const float rest = value - dev::float_of(high[i]);  // exact
    const bool split = std::fabs(rest) < dev::float_of(0x7f800000);
    finite[i] = split ? high[i] : 0;
    low[i] = split ? dev::to_tf32(rest) : 0;
  }
};

// c += a b for one step of k8, without the product of the high parts.
DDST_DEVICE void multiply_low(float (&c)[4], const Split<4>& a, const Split<2>& b) {
  dev::mma_m16n8k8_tf32(c, a.low, b.finite);
  dev::mma_m16n8k8_tf32(c, a.finite, b.low);
}

DDST_DEVICE void add(float (&c)[4], const float (&sum)[4]) {
  DDST_UNROLL
  for (int i = 0; i < 4; ++i) c[i] += sum[i];
}

}  // namespace ddst::cuda
