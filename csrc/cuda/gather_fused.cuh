// The gather kernel in a fused half block: pool(conv2d(up(act(norm(x))))) + bias + up(residual), and the gradient of
// act's input. The geometry is that of the convolution itself: what is stored may have half of its sides.
//
// A thread changes the pixels that it has copied itself, in shared memory, between the wait for its copies and the
// barrier that all wait at: once for all taps, and without another barrier. Padding is zero behind the prologue, as it
// is not changed.
#pragma once
#include "gather_epilogue.cuh"
#include "prologue.cuh"

namespace ddst::cuda {

template <class T>
struct FusedGatherParams : GatherParams<T> {
  Prologue prologue;  // of the forward input; in the input gradient its derivative comes behind the product
  dev::global_ptr<const T> activated;  // input gradient: the forward input, like the output; null without a prologue
  int halved;                          // 1: the source has half the sides of what is read
  int residual_halved;                 // 1: the residual has half the sides of the output
  int squares;                         // 1: the 2 x 2 pixels of a square are summed before they are written
  float factor;                        // of the sums
};

struct FusedSource {
  template <class T>
  using Params = FusedGatherParams<T>;
  static constexpr bool kFused = true;
  template <class T>
  static DDST_DEVICE int pixel(const FusedGatherParams<T>& p, int image, int y, int x) {
    const int height = p.g.in_height >> p.halved, width = p.g.in_width >> p.halved;
    y >>= p.halved, x >>= p.halved;
    return y < height && x < width ? (image * height + y) * width + x : -1;  // pooling leaves an odd last row out
  }
  // With squares, four pixels in a row are one, and squares are in the order of pixels.
  template <class T>
  static DDST_DEVICE GridPixel grid_pixel(const FusedGatherParams<T>& p, int m) {
    if (p.squares == 0) return cuda::grid_pixel(p.g, m);
    const int images = p.g.log_tile_images, half = p.g.log_tile_cols - 1, at = m >> 2 >> images;
    return {m >> 2 & ((1 << images) - 1), (at >> half) * 2 + (m >> 1 & 1), (at & ((1 << half) - 1)) * 2 + (m & 1)};
  }
};

// The prologue of what this thread has copied of a slice (stage_patch).
template <class Traits>
DDST_DEVICE void change_patch(const typename Traits::Params& p, const GatherPlace& place,
                              dev::shared_ptr<typename Traits::T> patch, dev::shared_ptr<int> sources, int slice) {
  if constexpr (!Traits::kTransposed) {
    const Prologue& f = p.prologue;
    constexpr int kChunks = Traits::kChunks, kRows = Traits::kThreads / kChunks;
    const unsigned thread = dev::thread_index(), chunk = thread % kChunks;
    const int channel = slice * kSlice + int(chunk) * Traits::kVector;
    if (!f.present() || channel >= p.g.in_channels) return;
    ChannelFactors<Traits::kVector> factors;
    factors.load_mean(f, channel);
    if (f.norm < 2) factors.load_factors(f, 0, p.g.in_channels, channel);
    auto at = patch + swizzled<kChunks>(thread / kChunks, chunk) * Traits::kVector;
    for (int slot = thread / kChunks; slot < p.g.patch_slots; slot += kRows, at = at + kRows * kSlice) {
      if (dev::load(sources + slot) < 0) continue;
      if (f.norm == 2) factors.load_factors(f, place.first_image + slot / p.g.image_pitch, p.g.in_channels, channel);
      change_words(at, factors, f.slope);
    }
  }
}

// Where the result of a pixel of the convolution goes: its index, that in the residual, the image; index -1: nowhere.
struct ResultPixel {
  int index, residual, image;
};
template <class Params>
DDST_DEVICE ResultPixel result_pixel(const Params& p, const GatherPlace& place, const GridPixel& pixel) {
  const GatherGeometry& g = p.g;
  const int image = place.first_image + pixel.image;
  const int y = (place.first_row + pixel.row) * g.phases_y + place.phase_y;
  const int x = (place.first_col + pixel.column) * g.phases_x + place.phase_x;
  const int height = g.out_height >> p.squares, width = g.out_width >> p.squares;
  const int row = y >> p.squares, column = x >> p.squares, half = p.residual_halved;
  const bool first = p.squares == 0 || ((y | x) & 1) == 0;  // of its square
  const bool present = first && image < g.images && row < height && column < width;
  return {present ? (image * height + row) * width + column : -1,
          (image * (height >> half) + (row >> half)) * (width >> half) + (column >> half), image};
}

// What lies between the sums of a granule (as store_granule has it) and the results: squares, bias and residual; in the
// input gradient the prologue's derivative.
template <bool kTransposed, class Params>
DDST_DEVICE void finish_fused_granule(const Params& p, const ResultPixel (&at)[2], int first, int lane,
                                      float (&sums)[2][4]) {
  const int channels = p.g.out_channels;
  DDST_UNROLL
  for (int n = 0; n < 2; ++n) {
    float (&c)[4] = sums[n];
    if (p.squares) {  // the lanes 4 and 8 apart hold the other pixels of the square
      DDST_UNROLL
      for (int i = 0; i < 4; ++i) {
        c[i] += dev::float_of(dev::shfl_xor(dev::float_bits(c[i]), 4));
        c[i] += dev::float_of(dev::shfl_xor(dev::float_bits(c[i]), 8));
      }
    }
    const int channel = first + n * 8 + lane % 4 * 2;
    if (channel >= channels) continue;
    float bias[2] = {};
    if (p.bias) load_pair(bias, p.bias + channel);
    [[maybe_unused]] ChannelFactors<2> factors;
    if constexpr (kTransposed) factors.load_mean(p.prologue, channel);
    DDST_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (at[r].index < 0) continue;
      float other[2] = {};
      if constexpr (kTransposed) {
        factors.load_factors(p.prologue, at[r].image, channels, channel);
        if (p.activated) load_pair(other, p.activated + (std::int64_t(at[r].index) * channels + channel));
      } else if (p.residual) {
        load_pair(other, p.residual + (std::int64_t(at[r].residual) * channels + channel));
      }
      DDST_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float sum = c[2 * r + i] * p.factor;
        if constexpr (kTransposed) {
          const float z = (other[i] - factors.mean[i]) * factors.scale[i] + factors.shift[i];
          c[2 * r + i] = p.activated ? leaky(z, sum, p.prologue.slope) : sum;
        } else {
          c[2 * r + i] = sum + bias[i] + other[i];
        }
      }
    }
  }
}

template <class Traits>
DDST_DEVICE void store_fused_tile(const typename Traits::Params& p, const GatherPlace& place,
                                  Accumulators<Traits>& acc) {
  const int warp = dev::thread_index() / 32, lane = dev::thread_index() % 32;
  DDST_UNROLL
  for (int m = 0; m < Traits::kPixelTiles; ++m) {
    ResultPixel at[2];
    DDST_UNROLL
    for (int r = 0; r < 2; ++r)
      at[r] = result_pixel(p, place, FusedSource::grid_pixel(p, warp * 32 + m * 16 + r * 8 + lane / 4));
    const int pixel[2] = {at[0].index, at[1].index};
    DDST_UNROLL
    for (int o = 0; o < Traits::kGranules; ++o) {
      const int first = place.group * Traits::kTile.channels + o * kSlice;
      if (first >= p.g.out_channels) break;
      finish_fused_granule<Traits::kTransposed>(p, at, first, lane, acc[m][o]);
      store_granule(p.output, pixel, p.g.out_channels, first, lane, acc[m][o]);
    }
  }
}

}  // namespace ddst::cuda
