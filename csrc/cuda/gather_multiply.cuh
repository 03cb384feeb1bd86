// The products of the gather kernel: fragments of pixels and of weight granules, and the walk over a stage's blocks.
#pragma once
#include <cstring>

#include "gather_stage.cuh"

namespace ddst::cuda {

// One m16 x k16 x n16 product. A pixel fragment holds 16 pixels x 16 channels, a weight fragment a granule: as loaded
// while another one is multiplied, then as multiplied.
template <class Number>
struct Fragments {  // 16-bit floats: one m16n8k16 step for each half of the granule
  using Pixels = std::uint32_t[4];
  using LoadedWeights = std::uint32_t[4];
  using Weights = std::uint32_t[4];
  using T = Number;
  // `pixel`: the patch slot of pixel lane % 16. Matrices: (pixel 0, k 0), (8, 0), (0, 8), (8, 8).
  static DDST_DEVICE void load_pixels(Pixels& a, dev::shared_ptr<T> patch, int pixel, int lane) {
    dev::ldmatrix_x4(a, patch + swizzled<2>(pixel, lane / 16) * 8);
  }
  // Matrices: (k 0, n 0), (8, 0), (0, 8), (8, 8), from rows that are output channels or, transposed, input channels.
  template <bool kTransposed>
  static DDST_DEVICE void load_weights(Weights& b, dev::shared_ptr<T> granule, int lane) {
    if constexpr (kTransposed)
      dev::ldmatrix_x4_trans(b, granule + swizzled<2>(lane % 16, lane / 16) * 8);
    else
      dev::ldmatrix_x4(b, granule + swizzled<2>(lane / 16 * 8 + lane % 8, lane / 8 % 2) * 8);
  }
  static DDST_DEVICE void prepare(Weights& b, const LoadedWeights& loaded) { std::memcpy(b, loaded, sizeof b); }
  static DDST_DEVICE void multiply(float (&c)[2][4], const Pixels& a, const Weights& b) {
    DDST_UNROLL
    for (int n = 0; n < 2; ++n) {
      const std::uint32_t half[2] = {b[2 * n], b[2 * n + 1]};
      dev::mma_m16n8k16<T>(c[n], a, half);
    }
  }
};

// float32, two k8 steps for each half: [step][register], as it is stored.
struct LoadedFloats {
  using Registers = std::uint32_t[2][4];
  static DDST_DEVICE void load_pixels(Registers& a, dev::shared_ptr<float> patch, int pixel, int lane) {
    DDST_UNROLL
    for (int k = 0; k < 2; ++k) dev::ldmatrix_x4(a[k], patch + swizzled<4>(pixel, k * 2 + lane / 16) * 4);
  }
  template <bool kTransposed>
  static DDST_DEVICE void load_weights(Registers& b, dev::shared_ptr<float> granule, int lane) {
    DDST_UNROLL
    for (int k = 0; k < 2; ++k) {
      if constexpr (kTransposed) {  // ldmatrix transposes 16-bit elements only
        DDST_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = k * 8 + i % 2 * 4 + lane % 4, column = i / 2 * 8 + lane / 4;
          b[k][i] = dev::load((granule + (swizzled<4>(row, column / 4) * 4 + column % 4)).template as<std::uint32_t>());
        }
      } else {
        dev::ldmatrix_x4(b[k], granule + swizzled<4>(lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2) * 4);
      }
    }
  }
};

template <>
struct Fragments<float> {  // TF32
  using Pixels = LoadedFloats::Registers;
  using LoadedWeights = LoadedFloats::Registers;
  using Weights = LoadedFloats::Registers;
  static DDST_DEVICE void round(LoadedFloats::Registers& r) {
    DDST_UNROLL
    for (int i = 0; i < 8; ++i) r[i / 4][i % 4] = dev::to_tf32(dev::float_of(r[i / 4][i % 4]));
  }
  static DDST_DEVICE void load_pixels(Pixels& a, dev::shared_ptr<float> patch, int pixel, int lane) {
    LoadedFloats::load_pixels(a, patch, pixel, lane);
    round(a);
  }
  template <bool kTransposed>
  static DDST_DEVICE void load_weights(LoadedWeights& b, dev::shared_ptr<float> granule, int lane) {
    LoadedFloats::load_weights<kTransposed>(b, granule, lane);
    round(b);
  }
  static DDST_DEVICE void prepare(Weights& b, const LoadedWeights& loaded) { std::memcpy(b, loaded, sizeof b); }
  static DDST_DEVICE void multiply(float (&c)[2][4], const Pixels& a, const Weights& b) {
    DDST_UNROLL
    for (int k = 0; k < 2; ++k) {
      DDST_UNROLL
      for (int n = 0; n < 2; ++n) {
        const std::uint32_t half[2] = {b[k][2 * n], b[k][2 * n + 1]};
        dev::mma_m16n8k8_tf32(c[n], a[k], half);
      }
    }
  }
};

template <>
struct Fragments<tf32x3> {
  using Pixels = Split<4>[2];
  using LoadedWeights = LoadedFloats::Registers;
  using Weights = Split<2>[2][2];  // [step][half]
  static DDST_DEVICE void load_pixels(Pixels& a, dev::shared_ptr<float> patch, int pixel, int lane) {
    LoadedFloats::Registers loaded;
    LoadedFloats::load_pixels(loaded, patch, pixel, lane);
    DDST_UNROLL
    for (int i = 0; i < 8; ++i) a[i / 4].set(i % 4, dev::float_of(loaded[i / 4][i % 4]));
  }
  template <bool kTransposed>
  static DDST_DEVICE void load_weights(LoadedWeights& b, dev::shared_ptr<float> granule, int lane) {
    LoadedFloats::load_weights<kTransposed>(b, granule, lane);
  }
  static DDST_DEVICE void prepare(Weights& b, const LoadedWeights& loaded) {
    DDST_UNROLL
    for (int i = 0; i < 8; ++i) b[i / 4][i / 2 % 2].set(i % 2, dev::float_of(loaded[i / 4][i % 4]));
  }
  static DDST_DEVICE void multiply(float (&c)[2][4], const Pixels& a, const Weights& b) {
    DDST_UNROLL
    for (int n = 0; n < 2; ++n) {
      float sum[4] = {};
      DDST_UNROLL
      for (int k = 0; k < 2; ++k) multiply_low(sum, a[k], b[k][n]);
      DDST_UNROLL
      for (int k = 0; k < 2; ++k) dev::mma_m16n8k8_tf32(sum, a[k].high, b[k][n].high);
      add(c[n], sum);
    }
  }
};

// What a lane knows about the two 16-pixel tiles of its warp.
struct WarpPixels {
  int slot[2];            // patch slot of pixel lane % 16 at tap shift 0
  std::uint32_t taps[2];  // bit t: tap t meets the image for at least one pixel of the tile; the same in all lanes
};

template <class Traits>
using Accumulators = float[Traits::kPixelTiles][Traits::kGranules][2][4];

// One tap: the granules in `mask`, which lie one after another, for kCount pixel tiles from kFirst on. While a granule
// is multiplied, the next one is loaded.
template <class Traits, int kFirst, int kCount>
DDST_DEVICE void multiply_tap(Accumulators<Traits>& acc, dev::shared_ptr<typename Traits::T> patch,
                              dev::shared_ptr<typename Traits::T> granule, std::uint32_t mask, const WarpPixels& pixels,
                              int shift) {
  using F = Fragments<typename Traits::Number>;
  const int lane = dev::thread_index() & 31;
  typename F::LoadedWeights next;
  F::template load_weights<Traits::kTransposed>(next, granule, lane);
  typename F::Pixels a[kCount];
  DDST_UNROLL
  for (int m = 0; m < kCount; ++m) F::load_pixels(a[m], patch, pixels.slot[kFirst + m] + shift, lane);
  DDST_UNROLL
  for (int o = 0; o < Traits::kGranules; ++o) {
    if (!(mask >> o & 1)) continue;
    typename F::Weights b;
    F::prepare(b, next);
    granule = granule + (mask >> o > 1 ? Traits::kGranuleElements : 0);  // the last one again, rather than a branch
    F::template load_weights<Traits::kTransposed>(next, granule, lane);
    DDST_UNROLL
    for (int m = 0; m < kCount; ++m) F::multiply(acc[kFirst + m][o], a[m], b);
  }
}

template <class Traits>
DDST_DEVICE void multiply_stage(const GatherGeometry& g, Accumulators<Traits>& acc,
                                dev::shared_ptr<typename Traits::T> patch, dev::shared_ptr<typename Traits::T> granule,
                                dev::shared_ptr<int> record, dev::shared_ptr<int> shifts, const WarpPixels& pixels) {
  const auto masks = record + kRecordHeader;
  int next_mask = dev::load(masks), next_shift = dev::load(shifts);
  for (int tap = 0; tap < g.taps; ++tap) {
    const auto mask = std::uint32_t(next_mask);
    const int shift = next_shift, after = tap + 1 < g.taps ? tap + 1 : tap;
    next_mask = dev::load(masks + after), next_shift = dev::load(shifts + after);
    if (mask == 0) continue;
    const bool first = pixels.taps[0] >> tap & 1, second = pixels.taps[1] >> tap & 1;
    if (first && second)
      multiply_tap<Traits, 0, 2>(acc, patch, granule, mask, pixels, shift);
    else if (first)
      multiply_tap<Traits, 0, 1>(acc, patch, granule, mask, pixels, shift);
    else if (second)
      multiply_tap<Traits, 1, 1>(acc, patch, granule, mask, pixels, shift);
    granule = granule + dev::popcount(mask) * Traits::kGranuleElements;
  }
}

}  // namespace ddst::cuda
