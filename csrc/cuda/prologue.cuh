// What the channels of a fused half block's input go through: norm and activation, in float32. The difference from the
// mean comes first, so that nothing cancels where the mean is large.
#pragma once
#include <cstring>

#include "device/primitives.cuh"

namespace ddst::cuda {

// act((x - mean) * scale + shift); the tables are float32 and aligned to 16 bytes.
struct Prologue {
  dev::global_ptr<const float> mean, scale, shift;  // [channels]; scale and shift also [images, channels]
  int norm;                                         // 0: none, 1: per channel, 2: per image and channel
  float slope;                                      // of the leaky ReLU: 0 is ReLU, 1 no activation
  DDST_DEVICE bool present() const { return norm != 0 || slope != 1.f; }
};

// `by` where z is above zero, slope times that elsewhere; a NaN in `by` stays.
DDST_DEVICE float leaky(float z, float by, float slope) {
  if (slope == 0.f) return z <= 0.f ? 0.f : by;
  return z > 0.f ? by : by * slope;
}

// A prologue's numbers for kCount channels from `channel` on.
template <int kCount>
struct ChannelFactors {
  float mean[kCount] = {}, scale[kCount] = {}, shift[kCount] = {};
  DDST_DEVICE void load_mean(const Prologue& f, int channel) {
    DDST_UNROLL
    for (int i = 0; i < kCount; ++i) mean[i] = f.norm ? dev::load(f.mean + (channel + i)) : 0.f;
  }
  DDST_DEVICE void load_factors(const Prologue& f, int image, int channels, int channel) {
    const std::int64_t first = f.norm == 2 ? std::int64_t(image) * channels + channel : channel;
    DDST_UNROLL
    for (int i = 0; i < kCount; ++i) {
      scale[i] = f.norm ? dev::load(f.scale + (first + i)) : 1.f;
      shift[i] = f.norm ? dev::load(f.shift + (first + i)) : 0.f;
    }
  }
  DDST_DEVICE float apply(int i, float x, float slope) const {
    const float z = (x - mean[i]) * scale[i] + shift[i];
    return leaky(z, z, slope);
  }
};

// The prologue of the channels in a word, which the factors are of from `first` on.
template <class T, int kCount>
DDST_DEVICE std::uint32_t change_word(std::uint32_t word, const ChannelFactors<kCount>& factors, float slope,
                                      int first = 0) {
  if constexpr (sizeof(T) == 2) {
    const float low = factors.apply(first, dev::widen<T>(std::uint16_t(word)), slope);
    return dev::pack2<T>(low, factors.apply(first + 1, dev::widen<T>(std::uint16_t(word >> 16)), slope));
  } else {
    return dev::float_bits(factors.apply(first, dev::float_of(word), slope));
  }
}

// The same of the 16 bytes at a place in shared memory.
template <class T>
DDST_DEVICE void change_words(dev::shared_ptr<T> at, const ChannelFactors<16 / int(sizeof(T))>& factors, float slope) {
  dev::Words4 words = dev::load_words(at);
  DDST_UNROLL
  for (int i = 0; i < 4; ++i) words.w[i] = change_word<T>(words.w[i], factors, slope, i * (4 / int(sizeof(T))));
  dev::store_words(at, words);
}

}  // namespace ddst::cuda
