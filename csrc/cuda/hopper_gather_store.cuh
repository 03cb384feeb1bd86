// Results of the gather kernel for sm_90a: bias, residual, ReLU, stores.
#pragma once
#include "hopper_gather_multiply.cuh"

namespace ddst::cuda {

// Pixel of the tile of row `r` (0 or 8 rows below lane / 4) of m64 tile `m`.
DDST_DEVICE int hopper_row(int m, int r) {
  const int warp = dev::thread_index() / 32, lane = dev::thread_index() % 32;
  return warp / 4 * 128 + m * 64 + warp % 4 * 16 + r * 8 + lane / 4;
}

template <class Traits>
DDST_DEVICE void store_hopper_tile(const typename Traits::Params& p, const GatherPlace& place,
                                   HopperSums<Traits>& sums) {
  const int lane = dev::thread_index() % 32, channels = p.g.out_channels;
  DDST_UNROLL
  for (int m = 0; m < Traits::kPixelTiles; ++m) {
    int pixel[2];
    DDST_UNROLL
    for (int r = 0; r < 2; ++r) pixel[r] = output_pixel(p.g, place, hopper_grid_pixel(p.g, hopper_row(m, r)));
    DDST_UNROLL
    for (int o = 0; o < Traits::kGranules; ++o) {
      const int first = place.group * kHopperChannels + o * kSlice;
      if (first >= channels) break;
      float c[2][4];
      DDST_UNROLL
      for (int n = 0; n < 2; ++n) {
        const int channel = first + n * 8 + lane % 4 * 2;
        float bias[2] = {}, residual[2] = {};
        if (p.bias && channel < channels) load_pair(bias, p.bias + channel);
        DDST_UNROLL
        for (int r = 0; r < 2; ++r) {
          if (p.residual && pixel[r] >= 0 && channel < channels)
            load_pair(residual, p.residual + (std::int64_t(pixel[r]) * channels + channel));
          DDST_UNROLL
          for (int i = 0; i < 2; ++i) {
            const float sum = sums[m][o / Traits::kWidth][o % Traits::kWidth * 8 + n * 4 + 2 * r + i];
            const float v = sum + bias[i] + residual[i];
            c[n][2 * r + i] = p.relu && v < 0 ? 0 : v;  // NaN stays
          }
        }
      }
      store_granule(p.output, pixel, channels, first, lane, c);
    }
  }
}

}  // namespace ddst::cuda
