// Results of the gather kernel for sm_90a: what finishes them, stores.
#pragma once
#include "hopper_gather_fused.cuh"

namespace ddst::cuda {

// Pixel of the tile of row `r` (0 or 8 rows below lane / 4) of m64 tile `m`.
DDST_DEVICE int hopper_row(int m, int r) {
  const int warp = dev::thread_index() / 32, lane = dev::thread_index() % 32;
  return warp / 4 * 128 + m * 64 + warp % 4 * 16 + r * 8 + lane / 4;
}

// Index of the output pixel that is the tile's pixel `m`, -1 outside of the images.
template <class Traits>
DDST_DEVICE int hopper_output_pixel(const HopperGatherGeometry& g, const GatherPlace& place, int m) {
  if constexpr (!Traits::kIm2col) return output_pixel(g, place, hopper_grid_pixel(g, m));
  const std::int64_t row = std::int64_t(place.first_image) * g.out_height + place.first_row;
  const std::int64_t pixel = row * g.out_width + place.first_col + m;
  return pixel < std::int64_t(g.images) * g.out_height * g.out_width ? int(pixel) : -1;
}

// Sums of granule `o` of m64 tile `m`, as store_granule (gather_epilogue.cuh) has them.
template <class Traits>
DDST_DEVICE void take_granule(float (&c)[2][4], const HopperSums<Traits>& sums, int m, int o) {
  DDST_UNROLL
  for (int i = 0; i < 8; ++i) c[i / 4][i % 4] = sums[m][o / Traits::kWidth][o % Traits::kWidth * 8 + i];
}

// A quad of lanes has 8 channels of 4 places (half of the granule, pixel) in each word; transposed, a lane has all of
// one place, 16 bytes, whose addresses differ between granules by a constant. A residual comes the same way.
template <class Traits>
DDST_DEVICE void store_plain_tile(const typename Traits::Params& p, const GatherPlace& place,
                                  HopperSums<Traits>& sums) {
  using T = typename Traits::T;
  const int lane = dev::thread_index() % 32, t = lane % 4, channels = p.g.out_channels;
  const int begin = place.group * kHopperChannels, mine = t % 2 * 8;
  int room[2];  // channels from the lane's first one on, none if its pixel is not there
  std::int64_t at[2];
  DDST_UNROLL
  for (int m = 0; m < 2; ++m) {
    const int pixel = hopper_output_pixel<Traits>(p.g, place, hopper_row(m, t / 2));
    room[m] = pixel < 0 ? 0 : channels - begin - mine;
    at[m] = std::int64_t(pixel < 0 ? 0 : pixel) * channels + (begin + mine);
  }
  DDST_UNROLL
  for (int o = 0; o < Traits::kGranules; ++o) {
    const int first = begin + o * kSlice;
    if (first >= channels) break;
    float bias[2][2] = {};
    if (p.bias) {
      DDST_UNROLL
      for (int n = 0; n < 2; ++n)
        if (first + n * 8 < channels) load_pair(bias[n], p.bias + (first + n * 8 + t * 2));
    }
    DDST_UNROLL
    for (int m = 0; m < 2; ++m) {
      float c[2][4];
      take_granule<Traits>(c, sums, m, o);
      if (p.bias) {
        DDST_UNROLL
        for (int i = 0; i < 8; ++i) c[i / 4][i % 4] += bias[i / 4][i % 2];
      }
      if (p.residual) {
        dev::Words4 words{};
        if (o * kSlice < room[m]) words = dev::load_words(p.residual + (at[m] + o * kSlice));
        transpose_quad(words.w, t);
        DDST_UNROLL
        for (int i = 0; i < 8; ++i)  // word: pixel * 2 + half of the granule
          c[i / 4][i % 4] += dev::widen<T>(std::uint16_t(words.w[i / 2 % 2 * 2 + i / 4] >> i % 2 * 16));
      }
      if (p.relu) {
        DDST_UNROLL
        for (int i = 0; i < 8; ++i) c[i / 4][i % 4] = c[i / 4][i % 4] < 0 ? 0 : c[i / 4][i % 4];  // NaN stays
      }
      std::uint32_t w[4] = {dev::pack2<T>(c[0][0], c[0][1]), dev::pack2<T>(c[1][0], c[1][1]),
                            dev::pack2<T>(c[0][2], c[0][3]), dev::pack2<T>(c[1][2], c[1][3])};
      transpose_quad(w, t);
      if (o * kSlice < room[m])
        dev::store_words(p.output + (at[m] + o * kSlice), dev::Words4{{w[0], w[1], w[2], w[3]}});
    }
  }
}

template <class Traits>
DDST_DEVICE void store_fused_hopper_tile(const typename Traits::Params& p, const GatherPlace& place,
                                         HopperSums<Traits>& sums) {
  const int lane = dev::thread_index() % 32;
  DDST_UNROLL
  for (int m = 0; m < 2; ++m) {
    ResultPixel at[2];
    DDST_UNROLL
    for (int r = 0; r < 2; ++r) at[r] = result_pixel(p, place, hopper_grid_pixel(p.g, hopper_row(m, r)));
    const int pixel[2] = {at[0].index, at[1].index};
    DDST_UNROLL
    for (int o = 0; o < Traits::kGranules; ++o) {
      const int first = place.group * kHopperChannels + o * kSlice;
      if (first >= p.g.out_channels) break;
      float c[2][4];
      take_granule<Traits>(c, sums, m, o);
      finish_fused_granule<Traits::kTransposed>(p, at, first, lane, c);
      store_granule(p.output, pixel, p.g.out_channels, first, lane, c);
    }
  }
}

}  // namespace ddst::cuda
