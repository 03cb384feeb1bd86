// The copying warps of the gather kernel for sm_90a, and what all warps agree on: work items, stages, barriers.
#pragma once
#include "device/hopper.cuh"
#include "gather_epilogue.cuh"
#include "hopper_gather_geometry.hpp"

namespace ddst::cuda {

template <class T>
struct HopperGatherParams {
  dev::TensorMap input, values;               // hopper_input_map, hopper_weights_map
  dev::global_ptr<const int> records, order;  // hopper_gather_geometry.hpp
  dev::global_ptr<const T> bias, residual;    // or null
  dev::global_ptr<T> output;
  int relu;
  int clusters;  // in the grid
  HopperGatherGeometry g;
};

// What pixels and results go through on their way: nothing. hopper_gather_fused.cuh has the other policy.
struct HopperPlain {
  template <class T>
  using Params = HopperGatherParams<T>;
  static constexpr bool kFused = false;
  template <class Traits>
  struct Patch {
    DDST_DEVICE Patch(const typename Traits::Params&, const GatherPlace&) {}
  };
};

// kTransposed: the input gradient. kWidth: granules in a product. Others: as in GatherForm.
template <class T_, bool kTransposed_, int kWidth_, int kCluster_, class Source_ = HopperPlain, int kDepth_ = 1,
          bool kIm2col_ = false>
struct HopperGatherTraits {
  using T = T_;
  using Source = Source_;
  using Params = typename Source::template Params<T>;
  static constexpr bool kTransposed = kTransposed_;
  static constexpr int kWidth = kWidth_, kCluster = kCluster_, kDepth = kDepth_;
  static constexpr bool kIm2col = kIm2col_;
  static constexpr GatherForm kForm{kWidth, kCluster, kDepth, kIm2col};
  static constexpr int kSlotBytes = kDepth * kSlice * 2;      // of a pixel
  static constexpr int kGranules = kHopperChannels / kSlice;  // of 16 output channels
  static constexpr int kPixelTiles = 2;                       // m64 tiles of a warpgroup
  static constexpr int kProducts = kGranules / kWidth;
};

struct HopperItem {
  GatherPlace place;
  int line;  // of the records of its phase and group
};

// Items are sorted by weight, and the CTAs of a cluster take neighbouring tiles of one. A tile behind the last one lies
// outside of the images: it reads zeros and stores nothing.
template <class Traits>
DDST_DEVICE HopperItem hopper_item(const typename Traits::Params& p, int index) {
  const HopperGatherGeometry& g = p.g;
  const int which = dev::load(p.order + index / g.tile_sets);
  int tile = index % g.tile_sets * Traits::kCluster + (Traits::kCluster > 1 ? dev::cluster_rank() : 0);
  HopperItem item;
  item.line = which * g.in_blocks;
  item.place.group = which % g.groups, item.place.tap_phase = which / g.groups;
  const int tap_y = item.place.tap_phase / g.phases_x, tap_x = item.place.tap_phase % g.phases_x;
  item.place.phase_y = (tap_y + g.phases_y - g.padding_y % g.phases_y) % g.phases_y;
  item.place.phase_x = (tap_x + g.phases_x - g.padding_x % g.phases_x) % g.phases_x;
  if constexpr (Traits::kIm2col) {
    std::int64_t pixel = std::int64_t(tile) * kHopperPixels;
    item.place.first_col = int(pixel % g.out_width), pixel /= g.out_width;
    item.place.first_row = int(pixel % g.out_height), item.place.first_image = int(pixel / g.out_height);
    return item;
  }
  item.place.first_col = tile % g.tiles_x << g.log_tile_cols, tile /= g.tiles_x;
  item.place.first_row = tile % g.tiles_y << g.log_tile_rows;
  item.place.first_image = tile / g.tiles_y << g.log_tile_images;
  return item;
}

// A place in a ring and the parity of its round.
struct RingPlace {
  int index = 0, parity = 0;
  DDST_DEVICE void next(int count) {
    if (++index == count) index = 0, parity ^= 1;
  }
};

// full: both copying warps' copies to a stage have landed; empty: all consumers of the cluster have left it; listed: a
// record has landed.
struct HopperShared {
  dev::shared_ptr<unsigned char> base;
  dev::shared_ptr<int> records;
  dev::shared_ptr<dev::Barrier> full, empty, listed;
  DDST_DEVICE explicit HopperShared(const HopperGatherGeometry& g) : base(dev::dynamic_shared<unsigned char>()) {
    records = (base + g.records).template as<int>();
    full = (base + g.barriers).template as<dev::Barrier>(), empty = full + g.stages, listed = empty + g.stages;
  }
};

// The record of a stage's slice `i`.
template <class Traits>
DDST_DEVICE dev::shared_ptr<int> record_at(const HopperGatherGeometry& g, const HopperShared& s, const RingPlace& place,
                                           int i) {
  return s.records + (place.index * Traits::kDepth + i) * g.record_ints;
}

// Walks over the stages of this cluster's items, `kRecordsAhead` in front of the copies, and brings in their records. A
// record's place is free then: it was of a stage that is a ring of stages behind the one whose place was waited for.
template <class Traits>
struct RecordReader {
  int item, slice = 0, line = 0;
  RingPlace at;
  DDST_DEVICE RecordReader(const typename Traits::Params& p, int first) : item(first) { begin_item(p); }
  DDST_DEVICE void begin_item(const typename Traits::Params& p) {
    if (item < p.g.items) line = hopper_item<Traits>(p, item).line;
  }
  DDST_DEVICE void copy_next(const typename Traits::Params& p, const HopperShared& s) {
    if (item >= p.g.items) return;
    const int ints = p.g.record_ints, bytes = ints * 4;
    const auto listed = s.listed + at.index;
    if (dev::elect_one()) {
      dev::barrier_arrive_expect(listed, Traits::kDepth * bytes);
      DDST_UNROLL
      for (int i = 0; i < Traits::kDepth; ++i) {
        const std::int64_t from = std::int64_t(line + ((slice + i) >> p.g.log_slices_per_block)) * ints;
        dev::copy_bytes(record_at<Traits>(p.g, s, at, i), p.records + from, bytes, listed);
      }
    }
    at.next(p.g.stages + kRecordsAhead);
    slice += Traits::kDepth;
    if (slice == p.g.slices) slice = 0, item += p.clusters, begin_item(p);
  }
};

// Where the patch begins in the source image.
template <class Traits>
DDST_DEVICE int first_source_row(const HopperGatherGeometry& g, const GatherPlace& place) {
  return place.first_row * g.step_y +
         source_origin<Traits::kTransposed>(g.padding_y, place.phase_y, g.phases_y, g.reach_y);
}
template <class Traits>
DDST_DEVICE int first_source_column(const HopperGatherGeometry& g, const GatherPlace& place) {
  return place.first_col * g.step_x +
         source_origin<Traits::kTransposed>(g.padding_x, place.phase_x, g.phases_x, g.reach_x);
}

// The parts of the patch of a stage.
template <class Traits>
DDST_DEVICE void copy_patch(const typename Traits::Params& p, const GatherPlace& place, int slice,
                            dev::shared_ptr<typename Traits::T> stage, dev::shared_ptr<dev::Barrier> full) {
  const HopperGatherGeometry& g = p.g;
  const int top = first_source_row<Traits>(g, place), left = first_source_column<Traits>(g, place);
  DDST_ROLLED
  for (int part = 0, x = 0, y = 0; part < g.parts; ++part) {
    const int at[4] = {slice * kSlice, left + x, top + y, place.first_image};
    if (dev::elect_one()) dev::copy_box(stage + part * (g.part_bytes / 2), &p.input, at, full);
    if (++x == g.parts_x) x = 0, ++y;
  }
}

// What im2col adds to where a tap reads: of lane t, of tap t, width in the low half.
template <class Traits>
DDST_DEVICE int im2col_offset(const HopperGatherGeometry& g) {
  const int lane = dev::thread_index() % 32, tap = lane < g.taps ? lane : 0;
  return tap_offset<Traits::kTransposed>(tap % g.kernel_width, 1, g.reach_x) |
         tap_offset<Traits::kTransposed>(tap / g.kernel_width, 1, g.reach_y) << 16;
}

// The tile's pixels as each listed tap reads them, one tap after another. Returns how many.
template <class Traits>
DDST_DEVICE int copy_columns(const typename Traits::Params& p, const GatherPlace& place, int slice, int offset,
                             dev::shared_ptr<int> record, dev::shared_ptr<typename Traits::T> stage,
                             dev::shared_ptr<dev::Barrier> full) {
  const HopperGatherGeometry& g = p.g;
  const int at[4] = {slice * kSlice, place.first_col * g.step_x + g.origin_x, place.first_row * g.step_y + g.origin_y,
                     place.first_image};
  int taps = 0;
  DDST_ROLLED
  for (int entry; (entry = dev::load(record + (kRecordHeader + taps))) != 0; ++taps) {
    const int both = int(dev::shfl(std::uint32_t(offset), entry));
    const int from[2] = {both & 0xffff, both >> 16};
    if (dev::elect_one()) dev::copy_im2col(stage, &p.input, at, from, full);
    stage = stage + kHopperPixels * kSlice;
  }
  return taps;
}

// The listed blocks' share of one slice; the CTAs of a cluster take turns by four and copy to all.
template <class Traits>
DDST_DEVICE void copy_blocks(const typename Traits::Params& p, int slice, int count, dev::shared_ptr<int> rows,
                             dev::shared_ptr<typename Traits::T> weights, dev::shared_ptr<dev::Barrier> full) {
  const HopperGatherGeometry& g = p.g;
  const int within = slice & ((1 << g.log_slices_per_block) - 1);
  const int first_row = Traits::kTransposed ? within * kSlice : 0, chunk = Traits::kTransposed ? 0 : within;
  const int share = kSlice << g.log_channels_per_block;  // elements
  const int rank = Traits::kCluster > 1 ? dev::cluster_rank() : 0;
  DDST_ROLLED
  for (int first = rank * 4; first < count; first += 4 * Traits::kCluster) {
    const dev::Words4 four = dev::load_words(rows + first);
    auto target = weights + first * share;
    DDST_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (first + i >= count) break;
      const int at[3] = {0, int(four.w[i]) + first_row, chunk};
      if (dev::elect_one()) {
        if constexpr (Traits::kCluster > 1)
          dev::copy_box_to_all(target, &p.values, at, full, (1u << Traits::kCluster) - 1);
        else
          dev::copy_box(target, &p.values, at, full);
      }
      target = target + share;
    }
  }
}

// Calls `copy(item, slice, stage, record, full)` for each stage of this cluster's items, of which `slice` is the first,
// when it is empty and its records (`record(i)`) are there: the parts of what two warps do, each of which arrives at
// `full` once. Returns the place after the last one.
template <class Traits, class Copy>
DDST_DEVICE RingPlace for_each_stage(const typename Traits::Params& p, const HopperShared& s, int first_item,
                                     Copy copy) {
  const HopperGatherGeometry& g = p.g;
  RingPlace stage, record;
  for (int index = first_item; index < g.items; index += p.clusters) {
    const HopperItem item = hopper_item<Traits>(p, index);
    for (int slice = 0; slice < g.slices; slice += Traits::kDepth) {
      dev::barrier_wait(s.empty + stage.index, stage.parity ^ 1);
      dev::barrier_wait(s.listed + record.index, record.parity);
      copy(
          item, slice, (s.base + stage.index * g.stage_bytes).template as<typename Traits::T>(),
          [&](int i) { return record_at<Traits>(g, s, record, i); }, s.full + stage.index);
      stage.next(g.stages), record.next(g.stages + kRecordsAhead);
    }
  }
  return stage;
}

// Waits until the consumers of all CTAs have left all stages. Then every arrival from another CTA has landed, and so
// has every copy to another one, whose consumers waited for it: a CTA may end. Its other warps need not wait, as
// shared memory is the CTA's until its last warp has ended. A relaxed cluster barrier would not do: it orders no
// arrivals.
template <class Traits>
DDST_DEVICE void drain_stages(const typename Traits::Params& p, const HopperShared& s, RingPlace stage) {
  DDST_ROLLED
  for (int i = 0; i < p.g.stages; ++i) {
    dev::barrier_wait(s.empty + stage.index, stage.parity ^ 1);
    stage.next(p.g.stages);
  }
}

// The first copying warp: records and pixels. A stage without blocks needs none.
template <class Traits>
DDST_DEVICE void copy_pixels(const typename Traits::Params& p, const HopperShared& s, int first_item) {
  RecordReader<Traits> reader(p, first_item);
  for (int i = 0; i < kRecordsAhead; ++i) reader.copy_next(p, s);
  [[maybe_unused]] const int offset = Traits::kIm2col ? im2col_offset<Traits>(p.g) : 0;
  for_each_stage<Traits>(p, s, first_item, [&](const HopperItem& item, int slice, auto stage, auto record, auto full) {
    reader.copy_next(p, s);
    if constexpr (Traits::kIm2col) {
      const int taps = copy_columns<Traits>(p, item.place, slice, offset, record(0), stage, full);
      dev::sync_warp();  // all lanes have read the record before a later one takes its place
      if (dev::elect_one()) dev::barrier_arrive_expect(full, taps * p.g.copied_bytes);
    } else {
      bool any = dev::load(record(0)) != 0;
      if constexpr (Traits::kDepth > 1) any = any || dev::load(record(1)) != 0;
      dev::sync_warp();  // as above
      if (dev::elect_one()) dev::barrier_arrive_expect(full, any ? p.g.copied_bytes : 0);
      if (any) copy_patch<Traits>(p, item.place, slice, stage, full);
    }
  });
}

// The second copying warp: weights, one slice's behind another's. In a cluster it stays until the other CTA has arrived
// here for the last time.
template <class Traits>
DDST_DEVICE void copy_weights(const typename Traits::Params& p, const HopperShared& s, int first_item) {
  const HopperGatherGeometry& g = p.g;
  const auto copy = [&](const HopperItem&, int slice, auto stage, auto record, auto full) {
    auto target = stage + g.weights / 2;
    int copied = 0;
    DDST_UNROLL
    for (int i = 0; i < Traits::kDepth; ++i) {
      const int blocks = dev::load(record(i));
      copy_blocks<Traits>(p, slice + i, blocks, record(i) + (kRecordHeader + g.padded_taps), target, full);
      target = target + (blocks * kSlice << g.log_channels_per_block), copied += blocks;
    }
    dev::sync_warp();  // as above; so this warp arrives last
    if (dev::elect_one()) dev::barrier_arrive_expect(full, copied * kSlice * 2 << g.log_channels_per_block);
  };
  [[maybe_unused]] const RingPlace after = for_each_stage<Traits>(p, s, first_item, copy);
  if constexpr (Traits::kCluster > 1) drain_stages<Traits>(p, s, after);
}

}  // namespace ddst::cuda
