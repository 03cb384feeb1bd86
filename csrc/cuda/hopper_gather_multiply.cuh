// The consumers of the gather kernel for sm_90a: products by wgmma with pixels in registers.
//
// A warpgroup owns 128 pixels as two m64 tiles, and all 128 output channels of the tile. Per tap it loads its pixels
// once (two ldmatrix a warp) and multiplies them with each active granule of 16 output channels, or with four together.
// While a tap's products run, the next tap's pixels are loaded into the other set of registers.
#pragma once
#include "hopper_gather_copy.cuh"

namespace ddst::cuda {

template <class Traits>
using HopperSums = float[Traits::kPixelTiles][Traits::kProducts][Traits::kWidth * 8];
using HopperPixels = std::uint32_t[2][4];

// `lane_place`: bytes from the patch's begin to this lane's row of ldmatrix at shift 0. Matrices: (pixel 0, k 0),
// (8, 0), (0, 8), (8, 8). The patch begins at a multiple of the swizzle's 8 slots.
template <class Traits>
DDST_DEVICE void load_pixels(HopperPixels& pixels, dev::shared_ptr<unsigned char> patch,
                             dev::shared_ptr<unsigned char> second, int place) {
  const int row = place ^ (place >> 3 & (Traits::kSlotBytes - 16));
  dev::ldmatrix_x4(pixels[0], (patch + row).template as<typename Traits::T>());
  dev::ldmatrix_x4(pixels[1], (second + row).template as<typename Traits::T>());
}

// One tap's products with the granules in `mask`, which lie one after another. Half of the mask is tested at once, as
// most bits are zero. Each product has a fence of its own, or the compiler would put in one.
template <class Traits>
DDST_DEVICE void multiply_tap(HopperSums<Traits>& sums, const HopperPixels& pixels, dev::MatrixDescriptor& granule,
                              std::uint32_t mask) {
  constexpr int kHalf = Traits::kProducts / 2;
  DDST_UNROLL
  for (int half = 0; half < 2; ++half) {
    if (!(mask >> half * 4 & 15)) continue;
    DDST_UNROLL
    for (int o = half * kHalf; o < (half + 1) * kHalf; ++o) {
      if (kHalf > 1 && !(mask >> o * Traits::kWidth & 1)) continue;
      dev::wgmma_fence();
      DDST_UNROLL
      for (int m = 0; m < 2; ++m)
        dev::wgmma_k16<typename Traits::T, Traits::kWidth * 16, Traits::kTransposed>(sums[m][o], pixels[m], granule);
      dev::wgmma_commit();
      granule = granule + Traits::kWidth * kGranuleBytes;
    }
  }
}

// Products of one slice, whose blocks' share begins at `granule`, which is left where they end. `shift`: of lane t, the
// bytes between a pixel and where tap t reads it; with im2col pixels lie there in the order of the entries.
template <class Traits>
DDST_DEVICE void multiply_slice(HopperSums<Traits>& sums, dev::shared_ptr<unsigned char> patch,
                                dev::shared_ptr<unsigned char> second, dev::shared_ptr<int> record,
                                dev::MatrixDescriptor& granule, int lane_place, int shift) {
  auto entries = record + kRecordHeader;
  int entry = dev::load(entries);
  if (entry == 0) return;
  const auto load = [&](HopperPixels& pixels) {
    if constexpr (Traits::kIm2col) {
      load_pixels<Traits>(pixels, patch, second, lane_place);
      lane_place += kHopperPixels * Traits::kSlotBytes;
    } else {
      load_pixels<Traits>(pixels, patch, second, lane_place + int(dev::shfl(std::uint32_t(shift), entry)));
    }
  };
  const auto step = [&](const HopperPixels& now, HopperPixels& after) {
    const auto mask = std::uint32_t(entry) >> 16;
    entries = entries + 1;
    entry = dev::load(entries);
    multiply_tap<Traits>(sums, now, granule, mask);
    if (entry == 0) {
      dev::wgmma_wait<0>();
      return false;
    }
    load(after);
    dev::wgmma_wait<0>();
    return true;
  };
  HopperPixels even, odd;
  load(even);
  while (step(even, odd) && step(odd, even)) {
  }
}

// `record`: of the stage's first slice, the others' follow.
template <class Traits>
DDST_DEVICE void multiply_stage(HopperSums<Traits>& sums, const HopperGatherGeometry& g,
                                dev::shared_ptr<unsigned char> stage, dev::shared_ptr<int> record, int lane_place,
                                int shift) {
  // A granule, whatever its rows are: 8 of them 256 bytes apart, 16 columns 512 bytes.
  auto granule = dev::matrix_descriptor<32>(stage + g.weights, kGranuleBytes, kGranuleBytes / 2);
  DDST_ROLLED
  for (int i = 0; i < Traits::kDepth; ++i) {
    multiply_slice<Traits>(sums, stage, stage + g.second, record, granule, lane_place + i * kSlice * 2, shift);
    record = record + g.record_ints;
  }
}

}  // namespace ddst::cuda
