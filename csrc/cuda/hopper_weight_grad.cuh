// Gradient of packed convolution weights on sm_90a, 16-bit numbers: what weight_grad.cuh says, with bulk tensor copies.
//
// A CTA owns a group of units of one band and a share of the pixels. One of its last four warps copies: per tile of 64
// output pixels, boxes of gy (the band's rows) and of the patch of x that all taps of the band's columns read, zero
// outside of the images and channels, into a ring of stages. In a fused half block the other three of them put x
// through norm and activation, in place. Sixteen warps multiply their units, which stay in accumulators until the share
// is done.
//
// Both operands have pixels on K and lie pixel-major, so ldmatrix.trans feeds mma.sync; 8 pixels in a row are 8
// different banks in any of the swizzles, wherever a tap's shift lets them begin. Pixels are the inner loop: gy of a
// row is loaded once for kAhead steps of 16 pixels and all units of that row. What a step adds to an address is the
// same for all units and lanes (HopperWeightGradSizes::steps), so a unit needs one register for its place.
//
// What is summed, the lists and what becomes of free slots: as in weight_grad.cuh. weight_grad_reduce, told that there
// are twice the groups, reads the partial sums.
#pragma once

#include <type_traits>

#include "hopper_weight_grad_stage.cuh"

namespace ddst::cuda {

static_assert(dev::registers_fit(kHopperGradThreads, kHopperWarps * 32, kMultiplyingRegisters, kChangingRegisters));

template <class T, class U, bool kFused>
struct HopperWeightGrad {
  using Params = std::conditional_t<kFused, HopperFusedWeightGradParams<T>, HopperWeightGradParams<T>>;
  static constexpr int kAhead = U::kM == 1 ? 4 : 2;  // steps of gy in registers

  // What a warp accumulates.
  struct Units {
    std::uint32_t flags;  // bit u: its rows of gy are not those of the one before; 16 + u: it is there
    int x[U::kCount];     // where this lane's row of ldmatrix lies in a stage, in step 0
    DDST_DEVICE bool fresh(int u) const { return flags >> u & 1; }
    DDST_DEVICE bool present(int u) const { return flags >> (16 + u) & 1; }
  };

  // Lanes give the rows of ldmatrix: (pixel, channel), (pixel + 8, channel), then channel + 8.
  static DDST_DEVICE int input_place(const Params& p, int tap, int channel, int lane) {
    const WeightGradShape& s = p.shape;
    const HopperWeightGradSizes& z = p.sizes;
    const int pixel = lane % 16, pitch = z.input_channels * 2, tap_y = tap / s.kernel_w, tap_x = tap % s.kernel_w;
    const int image = pixel / (s.tile_w * s.tile_h),
              y = pixel / s.tile_w % s.tile_h + tap_y * s.dilation_h / s.stride_h,
              x = pixel % s.tile_w + tap_x * s.dilation_w / s.stride_w;
    const int inside =
        ((image * z.patch_h + y) * z.patch_w + x) * pitch + channel % z.input_channels * 2 + lane / 16 * 16;
    const int plane = (channel / z.input_channels * z.planes_h + tap_y % z.planes_h) * z.planes_w + tap_x % z.planes_w;
    return z.grad_slices * z.grad_slice_bytes + plane * z.input_plane_bytes + swizzled_bytes(inside, pitch);
  }
  // (channel, pixel), (channel + 8, pixel), (channel, pixel + 8), (channel + 8, pixel + 8), of the first slice.
  static DDST_DEVICE int grad_place(const Params& p, int lane) {
    const int pitch = p.sizes.grad_channels * 2;
    return swizzled_bytes((lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16, pitch);
  }

  static DDST_DEVICE Units find_units(const Params& p, dev::global_ptr<const int> list, dev::shared_ptr<int> places,
                                      int lane) {
    const WeightGradShape& s = p.shape;
    const HopperWeightGradSizes& z = p.sizes;
    const int parts_across = s.block_in / U::kCols, parts = s.block_out / U::kRows * parts_across;
    Units units{};
    DDST_UNROLL
    for (int u = 0, last = -1; u < U::kCount; ++u) {
      const int unit = dev::load(list + u);
      if (unit < 0) break;
      const int slot = unit / parts, part = unit % parts, tap = dev::load(p.block_tap + slot);
      const int channel = dev::load(p.block_col + slot) % s.band_cols * s.block_in + part % parts_across * U::kCols;
      const int row = dev::load(p.block_row + slot) % s.band_rows * s.block_out + part / parts_across * U::kRows;
      const int gy = row / z.grad_channels * z.grad_slice_bytes + row % z.grad_channels * 2;
      if (lane == 0) dev::store(places + u, gy);
      units.flags |= (gy != last ? 0x10001u : 0x10000u) << u;
      units.x[u] = input_place(p, tap, channel, lane);
      last = gy;
    }
    dev::sync_warp();
    return units;
  }

  static DDST_DEVICE void multiply_tile(const Params& p, Bytes stage, const Units& units, dev::shared_ptr<int> places,
                                        int gy_place, float (&acc)[U::kCount][U::kM][U::kN][4]) {
    const HopperWeightGradSizes& z = p.sizes;
    Bytes steps[kTileSteps];
    DDST_UNROLL
    for (int k = 0; k < kTileSteps; ++k) steps[k] = dev::kept(stage + z.steps[k]);
    DDST_UNROLL
    for (int first = 0; first < kTileSteps; first += kAhead) {
      std::uint32_t a[kAhead][U::kM][4];
      DDST_UNROLL
      for (int u = 0; u < U::kCount; ++u) {
        if (!units.present(u)) break;  // the same for the whole warp, as is the next condition
        if (units.fresh(u)) {
          const int place = gy_place ^ dev::load(places + u);  // its bits are free in gy_place
          DDST_UNROLL
          for (int k = 0; k < kAhead; ++k) {
            DDST_UNROLL
            for (int m = 0; m < U::kM; ++m)
              dev::ldmatrix_x4_trans(a[k][m],
                                     (stage + (first + k) * 32 * z.grad_channels + (place ^ m * 32)).template as<T>());
          }
        }
        DDST_UNROLL
        for (int k = 0; k < kAhead; ++k) {
          const int place = k % 2 ? units.x[u] ^ z.flip : units.x[u];
          std::uint32_t b[U::kN][2];
          DDST_UNROLL
          for (int n = 0; n < U::kN; n += 2) {
            std::uint32_t r[4];
            dev::ldmatrix_x4_trans(r, (steps[first + k] + (place ^ n * 16)).template as<T>());
            b[n][0] = r[0], b[n][1] = r[1], b[n + 1][0] = r[2], b[n + 1][1] = r[3];
          }
          DDST_UNROLL
          for (int m = 0; m < U::kM; ++m) {
            DDST_UNROLL
            for (int n = 0; n < U::kN; ++n) dev::mma_m16n8k16<T>(acc[u][m][n], a[k][m], b[n]);
          }
        }
      }
    }
  }

  static DDST_DEVICE void multiply_tiles(const Params& p, const HopperStages& shared, const HopperWork& work,
                                         const Units& units, dev::shared_ptr<int> places, int lane,
                                         float (&acc)[U::kCount][U::kM][U::kN][4]) {
    const HopperWeightGradSizes& z = p.sizes;
    const int gy_place = grad_place(p, lane);
    RingPlace ring;
    for (int tile = work.begin; tile < work.end; ++tile, ring.next(z.stages)) {
      dev::barrier_wait(shared.full + ring.stage, ring.parity);
      if constexpr (kFused) {
        if (p.prologue.present()) dev::barrier_wait(shared.changed + ring.stage, ring.parity);
      }
      multiply_tile(p, shared.stages + ring.stage * z.stage_bytes, units, places, gy_place, acc);
      dev::sync_warp();  // all lanes have read
      if (dev::elect_one()) dev::barrier_arrive(shared.empty + ring.stage);
    }
  }

  static DDST_DEVICE void run(const Params& p) {
    const WeightGradShape& s = p.shape;
    const HopperWeightGradSizes& z = p.sizes;
    const int group = dev::block_index_x(), share = dev::block_index_y();
    const int warp = dev::warp_index(), lane = dev::thread_index() % 32;
    const auto list = p.units + std::int64_t(group) * kHopperWarps * U::kCount;
    const int first = dev::load(list);
    if (first < 0) return;
    const int first_slot = first / (s.block_out / U::kRows * (s.block_in / U::kCols));
    const int first_row = dev::load(p.block_row + first_slot);
    if (first_row * s.block_out >= s.out_channels) return;  // free slots
    const int first_col = dev::load(p.block_col + first_slot);
    const HopperWork work{int(z.tiles * share / s.shares), int(z.tiles * (share + 1) / s.shares),
                          first_row / s.band_rows * s.band_rows * s.block_out,
                          first_col / s.band_cols * s.band_cols * s.block_in};

    const HopperStages shared(z);
    if (warp == 0 && dev::elect_one()) {
      for (int i = 0; i < z.stages; ++i) {
        dev::barrier_init(shared.full + i, 1);
        dev::barrier_init(shared.changed + i, kChangingWarps);
        dev::barrier_init(shared.empty + i, kHopperWarps);
      }
      dev::fence_barrier_init();
    }
    if constexpr (kFused) fill_patch_places(p, shared.patch_places);
    dev::sync_threads();

    if (warp >= kHopperWarps) {
      dev::give_registers<kChangingRegisters>();
      if (warp == kHopperWarps) {
        copy_tiles(p, shared, work);
      } else if constexpr (kFused) {
        if (p.prologue.present()) change_tiles(p, shared, work, warp - kHopperWarps - 1, lane);
      }
      return;
    }
    dev::take_registers<kMultiplyingRegisters>();

    const auto places = shared.unit_places + warp * U::kCount;
    const Units units = find_units(p, list + warp * U::kCount, places, lane);
    float acc[U::kCount][U::kM][U::kN][4] = {};
    multiply_tiles(p, shared, work, units, places, lane, acc);
    const std::int64_t place = (std::int64_t(share) * s.groups + group) * kHopperWarps + warp;
    const auto out = p.partials + (place * kAccumulators * 32 + lane);
    DDST_UNROLL
    for (int u = 0; u < U::kCount; ++u) {
      if (!units.present(u)) break;
      DDST_UNROLL
      for (int i = 0; i < U::kM * U::kN * 4; ++i)
        dev::store(out + std::int64_t(u * U::kM * U::kN * 4 + i) * 32, acc[u][i / 4 / U::kN][i / 4 % U::kN][i % 4]);
    }
  }
};

// Grid: x = groups, y = shares.
template <class T, class U>
DDST_KERNEL(kHopperGradThreads, 1)
hopper_weight_grad(DDST_GRID_CONSTANT HopperWeightGradParams<T> p) {
  HopperWeightGrad<T, U, false>::run(p);
}

template <class T, class U>
DDST_KERNEL(kHopperGradThreads, 1)
hopper_fused_weight_grad(DDST_GRID_CONSTANT HopperFusedWeightGradParams<T> p) {
  HopperWeightGrad<T, U, true>::run(p);
}

}  // namespace ddst::cuda
