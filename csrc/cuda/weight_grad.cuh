// Gradient of packed convolution weights, NHWC, any kernel size, stride, padding and dilation. No torch.
//
//   partials[share] = sum over the share's output pixels q of gy[q, rows of the block] x x[q at the block's tap,
//   columns]
//
// A CTA owns a group of units (blocks, or parts of at most 32 x 32 of larger ones) that lie in one band of output block
// rows and input blocks, and one share of the pixels. Per tile of pixels it stages gy of the band's rows and the patch
// of x that all taps of the band's columns read; each warp multiplies its units, which stay in its accumulators until
// the share is done. Both operands have pixels on K and come through ldmatrix.trans. weight_grad_reduce sums the shares
// in order, so that the same call gives the same bits. Free slots are units of groups of their own: they lie in the row
// after the last, nothing is summed for them, and weight_grad_reduce writes zeros.
#pragma once

#include <type_traits>

#include "device/primitives.cuh"
#include "prologue.cuh"
#include "tf32x3.cuh"
#include "weight_grad_shape.hpp"

namespace ddst::cuda {

template <class T>
struct WeightGradParams {
  dev::global_ptr<const T> gy, x;  // [images, out_h, out_w, out_channels], [images, in_h, in_w, in_channels]
  dev::global_ptr<const int> block_row, block_col, block_tap;  // [slots]
  // [groups, warps, Unit::kCount]: slot * parts of a block + part, -1 where there is none; a warp's come first, and a
  // group that has any has one in its first place.
  dev::global_ptr<const int> units;
  dev::global_ptr<float> partials;  // [shares, groups, warps, kAccumulators, 32]
  dev::global_ptr<T> values_grad;   // [slots, block_out, block_in]
  WeightGradShape shape;
  WeightGradSizes sizes;
};

// In a fused half block x is act(norm(x)), stored with half of the sides where x_halved, and gy a quarter of the pooled
// gradient, which has half of the sides, where gy_halved.
template <class T>
struct FusedWeightGradParams : WeightGradParams<T> {
  Prologue prologue;
  int x_halved, gy_halved;
};

// What a warp accumulates for one entry of its list: kRows output channels by kCols input channels.
template <int kRows_, int kCols_>
struct Unit {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kM = kRows / 16, kN = kCols / 8;  // of mma
  static constexpr int kCount = kAccumulators / (kM * kN * 4);
};

// Fragments of both operands for one step of kStep pixels: `a` is gy transposed, `b` is x.
template <class Number>
struct Fragments {  // bf16, fp16
  using T = Number;
  using A = std::uint32_t[4];
  using B = std::uint32_t[2];
  static constexpr int kStep = 16;

  // Matrices: (channel, pixel), (channel + 8, pixel), (channel, pixel + 8), (channel + 8, pixel + 8).
  template <int kM>
  static DDST_DEVICE void load_a(std::uint32_t (&a)[kM][4], dev::shared_ptr<T> gy, int pitch, int lane) {
    DDST_UNROLL
    for (int m = 0; m < kM; ++m) {
      dev::ldmatrix_x4_trans(a[m], gy + ((lane / 16 * 8 + lane % 8) * pitch + m * 16 + lane / 8 % 2 * 8));
    }
  }
  // pixel_offset(p): where pixel p of the step lies. Matrices: (pixel, channel), (pixel + 8, channel), then channel
  // + 8.
  struct Place {
    int offset;
    template <class Offset>
    DDST_DEVICE Place(const Offset& pixel_offset, int lane) : offset(pixel_offset(lane % 16) + lane / 16 * 8) {}
  };
  template <int kN>
  static DDST_DEVICE void load_b(std::uint32_t (&b)[kN][2], dev::shared_ptr<T> x, const Place& place, int) {
    DDST_UNROLL
    for (int n = 0; n < kN; n += 2) {
      std::uint32_t r[4];
      dev::ldmatrix_x4_trans(r, x + (place.offset + n * 8));
      b[n][0] = r[0], b[n][1] = r[1], b[n + 1][0] = r[2], b[n + 1][1] = r[3];
    }
  }
  static DDST_DEVICE void multiply(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    dev::mma_m16n8k16<T>(c, a, b);
  }
};

template <class Number>
struct FloatFragments {  // float32; ldmatrix transposes 16-bit elements only
  static constexpr bool kThree = std::is_same_v<Number, tf32x3>;
  using A = std::conditional_t<kThree, Split<4>, std::uint32_t[4]>;
  using B = std::conditional_t<kThree, Split<2>, std::uint32_t[2]>;
  static constexpr int kStep = 8;

  template <int kCount>
  static DDST_DEVICE void set(Split<kCount>& r, int i, float value) {
    r.set(i, value);
  }
  template <int kCount>
  static DDST_DEVICE void set(std::uint32_t (&r)[kCount], int i, float value) {
    r[i] = dev::to_tf32(value);
  }
  template <int kM>
  static DDST_DEVICE void load_a(A (&a)[kM], dev::shared_ptr<float> gy, int pitch, int lane) {
    DDST_UNROLL
    for (int m = 0; m < kM; ++m) {
      DDST_UNROLL
      for (int i = 0; i < 4; ++i) {
        set(a[m], i, dev::load(gy + ((lane % 4 + i / 2 * 4) * pitch + m * 16 + lane / 4 + i % 2 * 8)));
      }
    }
  }
  struct Place {
    int offset[2];
    template <class Offset>
    DDST_DEVICE Place(const Offset& pixel_offset, int lane)
        : offset{pixel_offset(lane % 4), pixel_offset(lane % 4 + 4)} {}
  };
  template <int kN>
  static DDST_DEVICE void load_b(B (&b)[kN], dev::shared_ptr<float> x, const Place& place, int lane) {
    DDST_UNROLL
    for (int n = 0; n < kN; ++n) {
      DDST_UNROLL
      for (int i = 0; i < 2; ++i) set(b[n], i, dev::load(x + (place.offset[i] + n * 8 + lane / 4)));
    }
  }
  static DDST_DEVICE void multiply(float (&c)[4], const A& a, const B& b) {
    if constexpr (kThree) {
      float sum[4] = {};
      multiply_low(sum, a, b);
      dev::mma_m16n8k8_tf32(sum, a.high, b.high);
      add(c, sum);
    } else {
      dev::mma_m16n8k8_tf32(c, a, b);
    }
  }
};
template <>
struct Fragments<float> : FloatFragments<float> {};
template <>
struct Fragments<tf32x3> : FloatFragments<tf32x3> {};

// A place in a tile or patch as one int: image, row and column within it, ten bits each; negative: none.
DDST_DEVICE int pack_place(int image, int y, int x) { return image << 20 | y << 10 | x; }

// 16 bytes of an activation whose channels are not aligned; zero from `count` elements on.
template <class T>
DDST_DEVICE dev::Words4 load_channels(dev::global_ptr<const T> from, int count) {
  T elements[16 / sizeof(T)] = {};
  DDST_UNROLL
  for (int e = 0; e < int(16 / sizeof(T)); ++e) {
    if (e < count) elements[e] = dev::load(from + e);
  }
  dev::Words4 words;
  memcpy(&words, elements, 16);
  return words;
}

// An activation in global memory, and where a tile's part of it begins.
template <class T>
struct Source {
  dev::global_ptr<const T> data;
  int images, height, width, channels;
  int image0, y0, x0, first_channel;
  int halved;  // 1: what is stored has half the sides
};

// Copies `pixels` pixels of `staged` channels into shared memory; what lies outside of the images or channels becomes
// zero. 2^lane_bits threads copy one pixel.
template <class T, bool kFused>
DDST_DEVICE void stage_pixels(dev::shared_ptr<T> target, int pitch, dev::shared_ptr<int> places, int pixels,
                              int lane_bits, int staged, const Source<T>& s) {
  constexpr int kVector = 16 / int(sizeof(T));
  const int thread = dev::thread_index(), chunk = thread & ((1 << lane_bits) - 1),
            step = kWeightGradThreads >> lane_bits;
  if (chunk * kVector >= staged) return;
  const int channel = s.first_channel + chunk * kVector;
  const auto from = s.data + channel;  // beyond the last channel nothing is read
  const bool vector = s.channels % kVector == 0, present = channel < s.channels;
  auto to = target + ((thread >> lane_bits) * pitch + chunk * kVector);
  for (int pixel = thread >> lane_bits; pixel < pixels; pixel += step, to = to + step * pitch) {
    const int place = dev::load(places + pixel);
    const int image = s.image0 + (place >> 20), y = s.y0 + (place >> 10 & 1023), x = s.x0 + (place & 1023);
    const bool inside = present && place >= 0 && image < s.images && unsigned(y) < unsigned(s.height) &&
                        unsigned(x) < unsigned(s.width);
    const int half = kFused ? s.halved : 0;
    const int index = int((unsigned(image) * (s.height >> half) + (y >> half)) * (s.width >> half) + (x >> half));
    const auto first = from + std::int64_t(index) * s.channels;
    if (vector) {
      dev::cp_async16(to, first, inside ? 16 : 0);
    } else {
      dev::store_words(to, load_channels(first, inside ? s.channels - channel : 0));
    }
  }
}

// The prologue of what this thread has copied (stage_pixels); zero outside of the images and channels stays.
template <class T>
DDST_DEVICE void change_pixels(dev::shared_ptr<T> target, int pitch, dev::shared_ptr<int> places, int pixels,
                               int lane_bits, int staged, const Source<T>& s, const Prologue& f) {
  constexpr int kVector = 16 / int(sizeof(T));
  const int thread = dev::thread_index(), chunk = thread & ((1 << lane_bits) - 1),
            step = kWeightGradThreads >> lane_bits;
  const int channel = s.first_channel + chunk * kVector;
  if (chunk * kVector >= staged || channel >= s.channels) return;
  // One word's channels after the other, so that few factors are in registers at a time, beside all accumulators.
  constexpr int kInWord = kVector / 4;
  for (int word = 0; word < 4; ++word) {
    const int own = channel + word * kInWord;
    ChannelFactors<kInWord> factors;
    factors.load_mean(f, own);
    if (f.norm < 2) factors.load_factors(f, 0, s.channels, own);
    auto at = (target + ((thread >> lane_bits) * pitch + chunk * kVector)).template as<std::uint32_t>() + word;
    for (int pixel = thread >> lane_bits; pixel < pixels; pixel += step, at = at + step * pitch / kInWord) {
      const int place = dev::load(places + pixel);
      const int image = s.image0 + (place >> 20), y = s.y0 + (place >> 10 & 1023), x = s.x0 + (place & 1023);
      if (place < 0 || image >= s.images || unsigned(y) >= unsigned(s.height) || unsigned(x) >= unsigned(s.width))
        continue;
      if (f.norm == 2) factors.load_factors(f, image, s.channels, own);
      dev::store(at, change_word<T>(dev::load(at), factors, f.slope));
    }
  }
}

// Where a unit's operands begin in a stage, in one register: negative where there is no unit.
struct UnitPlace {
  int packed;
  static DDST_DEVICE UnitPlace of(int gy, int x) { return {x << 4 | gy / 16}; }  // a band has at most 256 channels
  DDST_DEVICE bool present() const { return packed >= 0; }
  DDST_DEVICE int gy() const { return (packed & 15) * 16; }
  DDST_DEVICE int x() const { return packed >> 4; }
  DDST_DEVICE bool same_gy(UnitPlace other) const { return ((packed ^ other.packed) & 15) == 0; }
};

template <class Number, class U, bool kFused>
struct WeightGrad {
  using T = stored_t<Number>;
  using Params = std::conditional_t<kFused, FusedWeightGradParams<T>, WeightGradParams<T>>;

  static DDST_DEVICE void fill_tables(const Params& p, dev::shared_ptr<int> patch_places,
                                      dev::shared_ptr<int> tile_places, dev::shared_ptr<int> tile_offsets) {
    const WeightGradShape& s = p.shape;
    const WeightGradSizes& z = p.sizes;
    for (int i = dev::thread_index(); i < z.patch; i += kWeightGradThreads) {
      const int y = i / z.patch_w;
      dev::store(patch_places + i, pack_place(y / z.patch_h, y % z.patch_h, i % z.patch_w));
    }
    for (int i = dev::thread_index(); i < z.pixels; i += kWeightGradThreads) {
      const bool present = i < s.tile_images * s.tile_h * s.tile_w;  // the others multiply zeros of gy
      const int x = i % s.tile_w, y = i / s.tile_w % s.tile_h, image = i / s.tile_w / s.tile_h;
      const int patch_pixel = (image * z.patch_h + y * s.stride_h) * z.patch_w + x * s.stride_w;
      dev::store(tile_places + i, present ? pack_place(image, y, x) : -1);
      dev::store(tile_offsets + i, present ? patch_pixel * z.input_pitch : 0);
    }
  }

  static DDST_DEVICE UnitPlace place_unit(const Params& p, int unit) {
    if (unit < 0) return {-1};
    const WeightGradShape& s = p.shape;
    const int parts_across = s.block_in / U::kCols, parts = s.block_out / U::kRows * parts_across;
    const int slot = unit / parts, part = unit % parts, tap = dev::load(p.block_tap + slot);
    const int shift = tap / s.kernel_w * s.dilation_h * p.sizes.patch_w + tap % s.kernel_w * s.dilation_w;
    const int gy = dev::load(p.block_row + slot) % s.band_rows * s.block_out + part / parts_across * U::kRows;
    const int x = dev::load(p.block_col + slot) % s.band_cols * s.block_in + part % parts_across * U::kCols;
    return UnitPlace::of(gy, shift * p.sizes.input_pitch + x);
  }

  static DDST_DEVICE void multiply_tile(const Params& p, dev::shared_ptr<T> gy, dev::shared_ptr<T> x,
                                        dev::shared_ptr<int> tile_offsets, const UnitPlace (&places)[U::kCount],
                                        float (&acc)[U::kCount][U::kM][U::kN][4]) {
    using F = Fragments<Number>;
    const int lane = dev::thread_index() % 32;
    for (int k = 0; k < p.sizes.pixels; k += F::kStep) {
      const typename F::Place place([&](int pixel) { return dev::load(tile_offsets + (k + pixel)); }, lane);
      typename F::A a[U::kM];
      DDST_UNROLL
      for (int u = 0; u < U::kCount; ++u) {
        if (!places[u].present()) break;  // the same for the whole warp, as is the next condition
        if (u == 0 || !places[u].same_gy(places[u - 1])) {
          F::load_a(a, gy + (k * p.sizes.grad_pitch + places[u].gy()), p.sizes.grad_pitch, lane);
        }
        typename F::B b[U::kN];
        F::load_b(b, x + places[u].x(), place, lane);
        DDST_UNROLL
        for (int m = 0; m < U::kM; ++m) {
          DDST_UNROLL
          for (int n = 0; n < U::kN; ++n) F::multiply(acc[u][m][n], a[m], b[n]);
        }
      }
    }
  }

  static DDST_DEVICE void run(const Params& p) {
    const WeightGradShape& s = p.shape;
    const WeightGradSizes& z = p.sizes;
    const int group = dev::block_index_x(), share = dev::block_index_y();
    const int warp = dev::thread_index() / 32, lane = dev::thread_index() % 32;
    const auto units = p.units + std::int64_t(group) * kWeightGradWarps * U::kCount;
    const int first = dev::load(units);
    if (first < 0) return;
    const int first_slot = first / (s.block_out / U::kRows * (s.block_in / U::kCols));
    const int first_row = dev::load(p.block_row + first_slot);
    if (first_row * s.block_out >= s.out_channels) return;  // free slots
    const int out_channel = first_row / s.band_rows * s.band_rows * s.block_out;
    const int in_channel = dev::load(p.block_col + first_slot) / s.band_cols * s.band_cols * s.block_in;
    UnitPlace places[U::kCount];
    DDST_UNROLL
    for (int u = 0; u < U::kCount; ++u) places[u] = place_unit(p, dev::load(units + (warp * U::kCount + u)));

    const auto patch_places = dev::dynamic_shared<int>();
    const auto tile_places = patch_places + z.patch, tile_offsets = tile_places + z.pixels;
    const auto stages = (patch_places + (z.patch + 2 * z.pixels + 31) / 32 * 32).template as<T>();
    const int gy_elements = z.pixels * z.grad_pitch, stage_elements = gy_elements + z.patch * z.input_pitch;
    fill_tables(p, patch_places, tile_places, tile_offsets);
    dev::sync_threads();

    const int begin = int(z.tiles * share / s.shares), end = int(z.tiles * (share + 1) / s.shares);
    const auto stage = [&](int tile) {
      if (tile < end) {
        const auto to = stages + (tile - begin) % kWeightGradStages * stage_elements;
        const int across = tile % z.tiles_w, down = tile / z.tiles_w % z.tiles_h;
        const int image = tile / z.tiles_w / z.tiles_h * s.tile_images, y = down * s.tile_h, x = across * s.tile_w;
        int out_h = s.out_h, out_w = s.out_w, gy_halved = 0, x_halved = 0;
        if constexpr (kFused) {
          gy_halved = p.gy_halved, x_halved = p.x_halved;
          out_h = out_h >> gy_halved << gy_halved,
          out_w = out_w >> gy_halved << gy_halved;  // an odd last row is left out
        }
        stage_pixels<T, kFused>(to, z.grad_pitch, tile_places, z.pixels, z.grad_bits, s.band_rows * s.block_out,
                                {p.gy, s.images, out_h, out_w, s.out_channels, image, y, x, out_channel, gy_halved});
        stage_pixels<T, kFused>(to + gy_elements, z.input_pitch, patch_places, z.patch, z.input_bits,
                                s.band_cols * s.block_in,
                                {p.x, s.images, s.in_h, s.in_w, s.in_channels, image, y * s.stride_h - s.pad_h,
                                 x * s.stride_w - s.pad_w, in_channel, x_halved});
      }
      dev::cp_async_commit();  // empty groups at the end keep the count of groups in flight constant
    };

    float acc[U::kCount][U::kM][U::kN][4] = {};
    for (int i = 0; i < kWeightGradStages - 1; ++i) stage(begin + i);
    for (int tile = begin; tile < end; ++tile) {
      dev::cp_async_wait<kWeightGradStages - 2>();
      if constexpr (kFused) {
        if (p.prologue.present()) {
          const int image = tile / z.tiles_w / z.tiles_h * s.tile_images;
          const int y = tile / z.tiles_w % z.tiles_h * s.tile_h, x = tile % z.tiles_w * s.tile_w;
          change_pixels<T>(stages + ((tile - begin) % kWeightGradStages * stage_elements + gy_elements), z.input_pitch,
                           patch_places, z.patch, z.input_bits, s.band_cols * s.block_in,
                           {p.x, s.images, s.in_h, s.in_w, s.in_channels, image, y * s.stride_h - s.pad_h,
                            x * s.stride_w - s.pad_w, in_channel, p.x_halved},
                           p.prologue);
        }
      }
      dev::sync_threads();  // this tile has landed for all; everyone has left the one that the next copy overwrites
      stage(tile + kWeightGradStages - 1);
      const auto from = stages + (tile - begin) % kWeightGradStages * stage_elements;
      multiply_tile(p, from, from + gy_elements, tile_offsets, places, acc);
    }
    dev::cp_async_wait<0>();

    const std::int64_t place = (std::int64_t(share) * s.groups + group) * kWeightGradWarps + warp;
    const auto out = p.partials + (place * kAccumulators * 32 + lane);
    DDST_UNROLL
    for (int u = 0; u < U::kCount; ++u) {
      if (!places[u].present()) break;
      DDST_UNROLL
      for (int i = 0; i < U::kM * U::kN * 4; ++i) {
        float sum = acc[u][i / 4 / U::kN][i / 4 % U::kN][i % 4];
        if constexpr (kFused) sum *= p.gy_halved ? 0.25f : 1.f;
        dev::store(out + std::int64_t(u * U::kM * U::kN * 4 + i) * 32, sum);
      }
    }
  }
};

// Grid: x = groups, y = shares. Blocks of threads per multiprocessor: the split operands of tf32x3 leave room for one.
template <class Number, class U>
DDST_KERNEL(kWeightGradThreads, std::is_same_v<Number, tf32x3> ? 1 : 2)
weight_grad(const WeightGradParams<stored_t<Number>> p) {
  WeightGrad<Number, U, false>::run(p);
}

template <class Number, class U>
DDST_KERNEL(kWeightGradThreads, std::is_same_v<Number, tf32x3> ? 1 : 2)
fused_weight_grad(const FusedWeightGradParams<stored_t<Number>> p) {
  WeightGrad<Number, U, true>::run(p);
}

DDST_DEVICE void store_element(dev::global_ptr<float> to, float value) { dev::store(to, value); }
template <class T>
DDST_DEVICE void store_element(dev::global_ptr<T> to, float value) {
  dev::store(to, T{std::uint16_t(dev::pack2<T>(value, 0.f))});
}

// values_grad = sum over shares of partials, in order; exactly zero outside of the weight and in free slots. Grid: x =
// groups, y = kAccumulators / 4: a thread sums the four numbers of one mma that its twin in weight_grad holds.
template <class T, class U>
DDST_KERNEL(kWeightGradThreads)
weight_grad_reduce(const WeightGradParams<T> p) {
  const WeightGradShape& s = p.shape;
  const int group = dev::block_index_x(), quad = dev::block_index_y();
  const int warp = dev::thread_index() / 32, lane = dev::thread_index() % 32;
  const std::int64_t place = std::int64_t(group) * kWeightGradWarps + warp;
  const int unit = dev::load(p.units + (place * U::kCount + quad / (U::kM * U::kN)));
  if (unit < 0) return;
  const int parts_across = s.block_in / U::kCols, parts = s.block_out / U::kRows * parts_across;
  const int slot = unit / parts, out_channel = dev::load(p.block_row + slot) * s.block_out;
  const int shares = out_channel < s.out_channels ? s.shares : 0;  // nobody summed for a free slot
  float sum[4] = {};
  for (int share = 0; share < shares; ++share) {
    const std::int64_t first = (std::int64_t(share) * s.groups * kWeightGradWarps + place) * kAccumulators + quad * 4;
    DDST_UNROLL
    for (int i = 0; i < 4; ++i)
      sum[i] += dev::load(dev::global_ptr<const float>(p.partials) + ((first + i) * 32 + lane));
  }
  // Only now: fewer registers in the loop.
  const int part = unit - slot * parts, m = quad / U::kN % U::kM, n = quad % U::kN;
  const int in_channel = dev::load(p.block_col + slot) * s.block_in;
  const int row0 = part / parts_across * U::kRows + m * 16 + lane / 4;
  const int col0 = part % parts_across * U::kCols + n * 8 + lane % 4 * 2;
  DDST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + i / 2 * 8, col = col0 + i % 2;
    const bool inside = out_channel + row < s.out_channels && in_channel + col < s.in_channels;
    store_element(p.values_grad + ((std::int64_t(slot) * s.block_out + row) * s.block_in + col), inside ? sum[i] : 0.f);
  }
}

}  // namespace ddst::cuda
