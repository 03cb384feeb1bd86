// Block-sparse conv2d for sm_90a, forward and input gradient, 16-bit floats: NHWC, one kernel and two orders of the
// same blocks, like conv2d_gather.cuh.
//
// A CTA owns tiles of 256 pixels x 128 output channels, one after another, heavy ones first. Two warps copy, by bulk
// tensor copies alone: per slice of 16 input channels the patch with its halo, whose padding is what lies outside of
// the tensor, and the listed blocks' share of the slice. (Or two slices at once, or by im2col what each tap reads in
// place of a patch: GatherForm.) Two warpgroups multiply. They meet at barriers in shared
// memory only: a stage is full when its bytes have arrived, empty when every warp of the cluster has left it. Two CTAs
// of a cluster have the same output channels, and each copies half of the weights to both.
#pragma once
#include "hopper_gather_store.cuh"

namespace ddst::cuda {

// Bytes in the patch from a pixel's slot to the one that a tap reads.
template <class Traits>
DDST_DEVICE int tap_shift(const HopperGatherGeometry& g, int tap) {
  const int dy = tap_offset<Traits::kTransposed>(tap / g.kernel_width, g.phases_y, g.reach_y);
  const int dx = tap_offset<Traits::kTransposed>(tap % g.kernel_width, g.phases_x, g.reach_x);
  const int part = dy % g.step_y * g.parts_x + dx % g.step_x;
  return part * g.part_bytes + (dy / g.step_y * g.patch_cols + dx / g.step_x) * Traits::kSlotBytes;
}

template <class Traits>
DDST_DEVICE void multiply_all(const typename Traits::Params& p, const HopperShared& s, int first_item) {
  const HopperGatherGeometry& g = p.g;
  const int warp = dev::warp_index(), lane = dev::thread_index() % 32;
  const int pixel = warp / 4 * 128 + warp % 4 * 16 + lane % 16;
  const int lane_place = (Traits::kIm2col ? pixel : hopper_slot(g, pixel)) * Traits::kSlotBytes + lane / 16 * 16;
  const int shift = Traits::kIm2col ? 0 : tap_shift<Traits>(g, lane < g.taps ? lane : 0);
  RingPlace stage, record;
  for (int index = first_item; index < g.items; index += p.clusters) {
    const HopperItem item = hopper_item<Traits>(p, index);
    [[maybe_unused]] const typename Traits::Source::template Patch<Traits> fused(p, item.place);
    HopperSums<Traits> sums = {};
    for (int slice = 0; slice < g.slices; slice += Traits::kDepth) {
      const auto patch = s.base + stage.index * g.stage_bytes;
      const auto list = record_at<Traits>(g, s, record, 0);
      dev::barrier_wait(s.full + stage.index, stage.parity);
      if constexpr (Traits::Source::kFused) fused.change(p, patch.template as<typename Traits::T>(), list, slice);
      multiply_stage<Traits>(sums, g, patch, list, lane_place, shift);
      dev::sync_warp();  // the one that arrives speaks for all lanes' reads
      if (dev::elect_one()) {
        dev::barrier_arrive(s.empty + stage.index);
        if constexpr (Traits::kCluster > 1) dev::barrier_arrive_at(s.empty + stage.index, dev::cluster_rank() ^ 1);
      }
      stage.next(g.stages), record.next(g.stages + kRecordsAhead);
    }
    if constexpr (Traits::Source::kFused)
      store_fused_hopper_tile<Traits>(p, item.place, sums);
    else
      store_plain_tile<Traits>(p, item.place, sums);
  }
}

// Registers are given to whole warpgroups. 2 * 240 + 24 is what 384 threads can have.
constexpr int kConsumerRegisters = 240, kCopierRegisters = 24;
static_assert(dev::registers_fit(kHopperThreads, kHopperConsumers, kConsumerRegisters, kCopierRegisters));

// Grid: p.clusters clusters of Traits::kCluster. Dynamic shared memory: p.g.bytes.
template <class Traits>
DDST_KERNEL(kHopperThreads, 1)
hopper_gather(DDST_GRID_CONSTANT typename Traits::Params p) {
  static_assert(Traits::kCluster <= 2);
  const HopperGatherGeometry& g = p.g;
  const HopperShared s(g);
  const int warp = dev::warp_index();
  if (warp == 0 && dev::elect_one()) {
    for (int i = 0; i < g.stages; ++i) {
      dev::barrier_init(s.full + i, 2);
      dev::barrier_init(s.empty + i, kHopperConsumers / 32 * Traits::kCluster);
    }
    for (int i = 0; i < g.stages + kRecordsAhead; ++i) dev::barrier_init(s.listed + i, 1);
    dev::fence_barrier_init();
  }
  if constexpr (Traits::kCluster > 1)
    dev::cluster_sync();  // the other CTA arrives at this one's barriers, too
  else
    dev::sync_threads();
  const int first_item = dev::block_index_x() / Traits::kCluster;
  if (warp < kHopperConsumers / 32) {
    dev::take_registers<kConsumerRegisters>();
    multiply_all<Traits>(p, s, first_item);
  } else {
    dev::give_registers<kCopierRegisters>();
    if (warp == kHopperConsumers / 32) copy_pixels<Traits>(p, s, first_item);
    if (warp == kHopperConsumers / 32 + 1) copy_weights<Traits>(p, s, first_item);
  }
}

}  // namespace ddst::cuda
