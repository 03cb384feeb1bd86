// The gather kernel's results: which output pixel each accumulator belongs to; bias, residual, ReLU, stores.
#pragma once
#include "gather_multiply.cuh"

namespace ddst::cuda {

// Index of the output pixel, -1 outside of the images.
DDST_DEVICE int output_pixel(const GatherGeometry& g, const GatherPlace& place, const GridPixel& pixel) {
  const int image = place.first_image + pixel.image;
  const int y = (place.first_row + pixel.row) * g.phases_y + place.phase_y;
  const int x = (place.first_col + pixel.column) * g.phases_x + place.phase_x;
  return image < g.images && y < g.out_height && x < g.out_width ? (image * g.out_height + y) * g.out_width + x : -1;
}

template <class Traits>
DDST_DEVICE WarpPixels warp_pixels(const typename Traits::Params& p, const GatherPlace& place,
                                   dev::shared_ptr<int> sources, dev::shared_ptr<int> shifts) {
  const GatherGeometry& g = p.g;
  WarpPixels pixels;
  DDST_UNROLL
  for (int m = 0; m < Traits::kPixelTiles; ++m) {
    const GridPixel pixel =
        Traits::Source::grid_pixel(p, dev::thread_index() / 32 * 32 + m * 16 + dev::thread_index() % 16);
    pixels.slot[m] = pixel.image * g.image_pitch + pixel.row * g.step_y * g.patch_cols + pixel.column;
    pixels.taps[m] = 0;
    if (output_pixel(g, place, pixel) >= 0)
      for (int tap = 0; tap < g.taps; ++tap)
        if (dev::load(sources + (pixels.slot[m] + dev::load(shifts + tap))) >= 0) pixels.taps[m] |= 1u << tap;
    DDST_UNROLL
    for (int lanes = 1; lanes < 16; lanes *= 2) pixels.taps[m] |= dev::shfl_xor(pixels.taps[m], lanes);
  }
  return pixels;
}

// Two neighbouring channels of a tensor, as float.
DDST_DEVICE void load_pair(float (&v)[2], dev::global_ptr<const float> p) {
  v[0] = dev::load(p), v[1] = dev::load(p + 1);
}
template <class T>
DDST_DEVICE void load_pair(float (&v)[2], dev::global_ptr<const T> p) {
  const std::uint32_t word = dev::load_word(p);
  v[0] = dev::widen<T>(std::uint16_t(word)), v[1] = dev::widen<T>(std::uint16_t(word >> 16));
}

// Word q of lane t of a quad becomes word t of lane q.
DDST_DEVICE void transpose_quad(std::uint32_t (&w)[4], int t) {
  const bool odd = t & 1, high = t & 2;
  DDST_UNROLL
  for (int i = 0; i < 4; i += 2) {
    const std::uint32_t other = dev::shfl_xor(odd ? w[i] : w[i + 1], 1);
    (odd ? w[i] : w[i + 1]) = other;
  }
  DDST_UNROLL
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t other = dev::shfl_xor(high ? w[i] : w[i + 2], 2);
    (high ? w[i] : w[i + 2]) = other;
  }
}

// Stores the 16 pixels x 16 channels whose values are c[half of the channels][pixel / 8 * 2 + channel % 2].
template <class T>
DDST_DEVICE void store_granule(dev::global_ptr<T> output, const int (&pixel)[2], int channels, int channel, int lane,
                               const float (&c)[2][4]) {
  const int t = lane % 4;
  if constexpr (sizeof(T) == 2) {  // a lane takes 8 channels of one pixel: half t % 2 of pixel group t / 2
    std::uint32_t w[4] = {dev::pack2<T>(c[0][0], c[0][1]), dev::pack2<T>(c[1][0], c[1][1]),
                          dev::pack2<T>(c[0][2], c[0][3]), dev::pack2<T>(c[1][2], c[1][3])};
    transpose_quad(w, t);
    const int mine = t / 2 ? pixel[1] : pixel[0], first = channel + t % 2 * 8;
    if (mine >= 0 && first < channels)
      dev::store_words(output + (std::int64_t(mine) * channels + first), dev::Words4{{w[0], w[1], w[2], w[3]}});
  } else {
    DDST_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2, n = i % 2, first = channel + n * 8 + t * 2;
      if (pixel[r] >= 0 && first < channels)
        dev::store_words(output + (std::int64_t(pixel[r]) * channels + first),
                         dev::Words2{{dev::float_bits(c[n][2 * r]), dev::float_bits(c[n][2 * r + 1])}});
    }
  }
}

template <class Traits>
DDST_DEVICE void store_tile(const GatherParams<typename Traits::T>& p, const GatherPlace& place,
                            Accumulators<Traits>& acc) {
  const int warp = dev::thread_index() / 32, lane = dev::thread_index() % 32;
  DDST_UNROLL
  for (int m = 0; m < Traits::kPixelTiles; ++m) {
    int pixel[2];
    DDST_UNROLL
    for (int r = 0; r < 2; ++r)
      pixel[r] = output_pixel(p.g, place, grid_pixel(p.g, warp * 32 + m * 16 + r * 8 + lane / 4));
    DDST_UNROLL
    for (int o = 0; o < Traits::kGranules; ++o) {
      const int first = place.group * Traits::kTile.channels + o * kSlice;
      if (first >= p.g.out_channels) break;
      DDST_UNROLL
      for (int n = 0; n < 2; ++n) {
        const int channel = first + n * 8 + lane % 4 * 2;
        if (channel >= p.g.out_channels) continue;
        float (&c)[4] = acc[m][o][n];
        float bias[2] = {}, residual[2] = {};
        if (p.bias) load_pair(bias, p.bias + channel);
        DDST_UNROLL
        for (int r = 0; r < 2; ++r) {
          if (p.residual && pixel[r] >= 0)
            load_pair(residual, p.residual + (std::int64_t(pixel[r]) * p.g.out_channels + channel));
          DDST_UNROLL
          for (int i = 0; i < 2; ++i) {
            const float v = c[2 * r + i] + bias[i] + residual[i];
            c[2 * r + i] = p.relu && v < 0 ? 0 : v;  // NaN stays
          }
        }
      }
      store_granule(p.output, pixel, p.g.out_channels, first, lane, acc[m][o]);
    }
  }
}

}  // namespace ddst::cuda
