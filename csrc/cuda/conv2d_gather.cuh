// Block-sparse conv2d, forward and input gradient: NHWC, one kernel and two orders of the same blocks.
//
// A block of threads owns a tile of pixels (rows of one image, or several small images) and up to 128 output channels.
// Per slice of 16 input channels the tile's patch with its halo comes into shared memory once and serves all taps; so
// do the slice's share of the active weight blocks, cut into granules of 16 x 16. Pixels are on M, output channels on
// N. A warp owns 32 pixels and all output channels; per tap it loads its pixels once, for all granules of that tap.
//
// Pipeline: while slice i is multiplied, slices i + 1 ... i + kStages - 1 are under way. What to copy for a slice
// stands in its record, which has to be there before; records travel 2 kStages - 2 slices ahead.
#pragma once
#include "gather_fused.cuh"

namespace ddst::cuda {

// Grid: phases * tiles * groups. Dynamic shared memory: p.layout.bytes.
template <class Traits>
DDST_KERNEL(Traits::kThreads, Traits::kMinBlocks)
conv2d_gather(const typename Traits::Params p) {
  using T = typename Traits::T;
  constexpr int kStages = Traits::kStages, kAhead = 2 * kStages - 2, kRecords = Traits::kRecords;
  const GatherPlace place = gather_place(p.g, dev::block_index_x());
  const auto shared = dev::dynamic_shared<int>();
  const auto all_records = shared + p.layout.records / 4, sources = shared + p.layout.sources / 4;
  const auto shifts = shared + p.layout.shifts / 4;
  const auto patch = [&](int slice) {
    return (shared + slice % kStages * (p.layout.stage_bytes / 4)).template as<T>();
  };
  const auto weights = [&](int slice) { return patch(slice) + p.layout.patch_bytes / int(sizeof(T)); };
  const auto record = [&](int slice) { return all_records + slice % kRecords * p.g.record_ints; };
  const auto copy_slice = [&](int slice) {
    if (slice >= p.g.slices) return;
    stage_patch<Traits>(p, patch(slice), sources, slice);
    stage_weights<Traits>(p, weights(slice), record(slice), slice);
  };

  for (int i = 0; i < kAhead && i < p.g.slices; ++i) stage_record<Traits>(p, place, record(i), i);
  dev::cp_async_commit();
  build_tables<Traits>(p, place, sources, shifts);
  dev::cp_async_wait<0>();
  dev::sync_threads();  // tables and first records are there
  for (int i = 0; i < kStages - 1; ++i) {
    copy_slice(i);
    dev::cp_async_commit();
  }
  const WarpPixels pixels = warp_pixels<Traits>(p, place, sources, shifts);

  Accumulators<Traits> acc = {};
  for (int i = 0; i < p.g.slices; ++i) {
    dev::cp_async_wait<kStages - 2>();
    if constexpr (Traits::Source::kFused) change_patch<Traits>(p, place, patch(i), sources, i);
    dev::sync_threads();  // slice i has landed for all; all have left slice i - 1, whose place the next copies take
    copy_slice(i + kStages - 1);
    if (i + kAhead < p.g.slices) stage_record<Traits>(p, place, record(i + kAhead), i + kAhead);
    dev::cp_async_commit();  // also if there was nothing to copy: the wait counts groups
    multiply_stage<Traits>(p.g, acc, patch(i), weights(i), record(i), shifts, pixels);
  }
  if constexpr (Traits::Source::kFused)
    store_fused_tile<Traits>(p, place, acc);
  else
    store_tile<Traits>(p, place, acc);
}

}  // namespace ddst::cuda
