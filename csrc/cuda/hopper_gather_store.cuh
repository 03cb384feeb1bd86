// Results of the gather kernel for sm_90a: what finishes them, stores.
#pragma once
#include "hopper_gather_fused.cuh"

namespace ddst::cuda {

// Pixel of the tile of row `r` (0 or 8 rows below lane / 4) of m64 tile `m`.
DDST_DEVICE int hopper_row(int m, int r) {
  const int warp = dev::thread_index() / 32, lane = dev::thread_index() % 32;
  return warp / 4 * 128 + m * 64 + warp % 4 * 16 + r * 8 + lane / 4;
}

template <class Traits>
DDST_DEVICE void store_hopper_tile(const typename Traits::Params& p, const GatherPlace& place,
                                   HopperSums<Traits>& sums) {
  const int lane = dev::thread_index() % 32;
  DDST_UNROLL
  for (int m = 0; m < Traits::kPixelTiles; ++m) {
    [[maybe_unused]] ResultPixel result[2];
    int pixel[2];
    DDST_UNROLL
    for (int r = 0; r < 2; ++r) {
      const GridPixel at = hopper_grid_pixel(p.g, hopper_row(m, r));
      if constexpr (Traits::Source::kFused)
        result[r] = result_pixel(p, place, at), pixel[r] = result[r].index;
      else
        pixel[r] = output_pixel(p.g, place, at);
    }
    DDST_UNROLL
    for (int o = 0; o < Traits::kGranules; ++o) {
      const int first = place.group * kHopperChannels + o * kSlice;
      if (first >= p.g.out_channels) break;
      float c[2][4];
      DDST_UNROLL
      for (int i = 0; i < 8; ++i) c[i / 4][i % 4] = sums[m][o / Traits::kWidth][o % Traits::kWidth * 8 + i];
      if constexpr (Traits::Source::kFused)
        finish_fused_granule<Traits::kTransposed>(p, result, first, lane, c);
      else
        finish_granule(p, pixel, first, lane, c);
      store_granule(p.output, pixel, p.g.out_channels, first, lane, c);
    }
  }
}

}  // namespace ddst::cuda
