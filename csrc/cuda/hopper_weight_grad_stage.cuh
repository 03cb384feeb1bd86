// The ring of stages of the weight gradient on sm_90a: what is copied into it, and the prologue of a fused half block.
#pragma once

#include "device/hopper.cuh"
#include "hopper_weight_grad_shape.hpp"
#include "prologue.cuh"
#include "weight_grad.cuh"

namespace ddst::cuda {

template <class T>
struct HopperWeightGradParams {
  dev::TensorMap gy_map, x_map;                                // hopper_grad_map, hopper_input_map
  dev::global_ptr<const int> block_row, block_col, block_tap;  // [slots]
  dev::global_ptr<const int> units;                            // [groups, kHopperWarps, Unit::kCount]
  dev::global_ptr<float> partials;                             // [shares, groups, kHopperWarps, kAccumulators, 32]
  WeightGradShape shape;
  HopperWeightGradSizes sizes;
};

// In a fused half block x is act(norm(x)).
template <class T>
struct HopperFusedWeightGradParams : HopperWeightGradParams<T> {
  Prologue prologue;
};

using Bytes = dev::shared_ptr<unsigned char>;
using Barriers = dev::shared_ptr<dev::Barrier>;

// Bytes of a slice with `pitch` bytes a pixel, as the copy's swizzle of `pitch` bytes exchanges them.
DDST_DEVICE int swizzled_bytes(int bytes, int pitch) { return bytes ^ (bytes >> 3 & (pitch - 16)); }

// Where a tile begins: an image, a row and a column of the output.
struct TilePlace {
  int image, y, x;
  DDST_DEVICE TilePlace(const WeightGradShape& s, const HopperWeightGradSizes& z, int tile)
      : image(tile / z.tiles_w / z.tiles_h * s.tile_images),
        y(tile / z.tiles_w % z.tiles_h * s.tile_h),
        x(tile % z.tiles_w * s.tile_w) {}
  DDST_DEVICE int input_y(const WeightGradShape& s) const { return y * s.stride_h - s.pad_h; }
  DDST_DEVICE int input_x(const WeightGradShape& s) const { return x * s.stride_w - s.pad_w; }
};

// A stage and how often the ring has been gone through, as a parity.
struct RingPlace {
  int stage = 0, parity = 0;
  DDST_DEVICE void next(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// What stands in shared memory.
struct HopperStages {
  Barriers full, changed, empty;      // a stage's copies have landed; its prologue is done; it has been multiplied
  dev::shared_ptr<int> unit_places;   // [kHopperWarps, Unit::kCount]: where the unit's rows of gy begin in a stage
  dev::shared_ptr<int> patch_places;  // pack_place of each pixel of the planes; fused
  Bytes stages;
  DDST_DEVICE HopperStages(const HopperWeightGradSizes& z)
      : full(dev::dynamic_shared<dev::Barrier>()),
        changed(full + kMostStages),
        empty(full + 2 * kMostStages),
        unit_places((full.template as<unsigned char>() + kBarrierBytes).template as<int>()),
        patch_places((full.template as<unsigned char>() + (kBarrierBytes + kUnitPlaceBytes)).template as<int>()),
        stages(full.template as<unsigned char>() + z.header_bytes) {}
};

// The CTA's share of the tiles, and the first channels of its band.
struct HopperWork {
  int begin, end, out_channel, in_channel;
};

// Copies the tiles, one after the other. All lanes of one warp.
template <class T>
DDST_DEVICE void copy_tiles(const HopperWeightGradParams<T>& p, const HopperStages& shared, const HopperWork& work) {
  const WeightGradShape& s = p.shape;
  const HopperWeightGradSizes& z = p.sizes;
  RingPlace ring;
  for (int tile = work.begin; tile < work.end; ++tile, ring.next(z.stages)) {
    const TilePlace at(s, z, tile);
    const auto full = shared.full + ring.stage;
    dev::barrier_wait(shared.empty + ring.stage, ring.parity ^ 1);  // in the first round nothing is waited for
    if (dev::elect_one()) dev::barrier_arrive_expect(full, z.copied_bytes);
    auto to = (shared.stages + ring.stage * z.stage_bytes).template as<T>();
    for (int i = 0; i < z.grad_slices; ++i, to = to + z.grad_slice_bytes / 2) {
      if (dev::elect_one())
        dev::copy_box(to, &p.gy_map, {work.out_channel + i * z.grad_channels, at.x, at.y, at.image}, full);
    }
    for (int i = 0; i < z.input_slices; ++i) {
      for (int row = 0; row < z.planes_h; ++row) {
        for (int column = 0; column < z.planes_w; ++column, to = to + z.input_plane_bytes / 2) {
          if (dev::elect_one())
            dev::copy_box(to, &p.x_map,
                          {work.in_channel + i * z.input_channels, at.input_x(s) + z.plane_columns[column],
                           at.input_y(s) + z.plane_rows[row], at.image},
                          full);
        }
      }
    }
  }
}

template <class T>
DDST_DEVICE void fill_patch_places(const HopperFusedWeightGradParams<T>& p, dev::shared_ptr<int> places) {
  const WeightGradShape& s = p.shape;
  const HopperWeightGradSizes& z = p.sizes;
  const int patch = s.tile_images * z.patch_h * z.patch_w;
  for (int i = dev::thread_index(); i < z.planes_h * z.planes_w * patch; i += kHopperGradThreads) {
    const int plane = i / patch, pixel = i % patch, y = pixel / z.patch_w;
    dev::store(places + i, pack_place(y / z.patch_h, z.plane_rows[plane / z.planes_w] + y % z.patch_h * s.stride_h,
                                      z.plane_columns[plane % z.planes_w] + pixel % z.patch_w * s.stride_w));
  }
}

// The prologue of each tile's patch, in place; zero outside of the images and channels stays. kChangingWarps warps, of
// which this is number `warp`; a thread keeps to 8 channels.
template <class T>
DDST_DEVICE void change_tiles(const HopperFusedWeightGradParams<T>& p, const HopperStages& shared,
                              const HopperWork& work, int warp, int lane) {
  const WeightGradShape& s = p.shape;
  const HopperWeightGradSizes& z = p.sizes;
  const Prologue& f = p.prologue;
  const int chunks = s.band_cols * s.block_in / 8, bits = z.chunk_bits, pitch = z.input_channels * 2;
  const int chunk = lane & ((1 << bits) - 1), channel = work.in_channel + chunk * 8;
  const int patch = s.tile_images * z.patch_h * z.patch_w, planes = z.planes_h * z.planes_w;
  const int first = (warp * 32 + lane) >> bits, step = kChangingWarps * 32 >> bits;
  const int end = chunk < chunks && channel < s.in_channels ? patch : 0;
  const int inside = chunk * 8 % z.input_channels * 2;
  const int slice = z.grad_slices * z.grad_slice_bytes + chunk * 8 / z.input_channels * planes * z.input_plane_bytes;
  ChannelFactors<8> factors;
  if (end != 0) {
    factors.load_mean(f, channel);
    if (f.norm < 2) factors.load_factors(f, 0, s.in_channels, channel);
  }
  RingPlace ring;
  for (int tile = work.begin, known = -1; tile < work.end; ++tile, ring.next(z.stages)) {
    const TilePlace at(s, z, tile);
    auto places = shared.patch_places;
    auto from = shared.stages + (ring.stage * z.stage_bytes + slice);
    dev::barrier_wait(shared.full + ring.stage, ring.parity);
    for (int plane = 0; plane < planes; ++plane, places = places + patch, from = from + z.input_plane_bytes) {
      for (int pixel = first; pixel < end; pixel += step) {
        const int place = dev::load(places + pixel);
        const int image = at.image + (place >> 20), y = at.input_y(s) + (place >> 10 & 1023),
                  x = at.input_x(s) + (place & 1023);
        if (image >= s.images || unsigned(y) >= unsigned(s.in_h) || unsigned(x) >= unsigned(s.in_w)) continue;
        if (f.norm == 2 && image != known) factors.load_factors(f, image, s.in_channels, channel), known = image;
        change_words((from + swizzled_bytes(pixel * pitch + inside, pitch)).template as<T>(), factors, f.slope);
      }
    }
    dev::fence_async_shared();  // these writes come before the copy that overwrites them
    dev::sync_warp();
    if (dev::elect_one()) dev::barrier_arrive(shared.changed + ring.stage);
  }
}

}  // namespace ddst::cuda
