// The gather kernel for sm_90a in a fused half block (gather_fused.cuh, of which the results are finished as there).
// What is read has the sides of what is stored: upsampling while reading stays on the other kernel.
//
// The consumers change a patch in shared memory before they multiply it. A thread keeps to one 16-byte chunk of every
// 128th (or 64th) slot, which is one place in the swizzle, and knows for an item which of its slots are pixels: padding
// stays zero.
#pragma once
#include "gather_fused.cuh"
#include "hopper_gather_multiply.cuh"

namespace ddst::cuda {

template <class T>
struct FusedHopperGatherParams : HopperGatherParams<T> {
  Prologue prologue;                   // as in FusedGatherParams
  dev::global_ptr<const T> activated;  // likewise
  int residual_halved, squares;
  float factor;
};

template <class Traits>
class FusedPatch;
struct HopperFused {
  template <class T>
  using Params = FusedHopperGatherParams<T>;
  static constexpr bool kFused = true;
  template <class Traits>
  using Patch = FusedPatch<Traits>;
};

// The prologue of one thread's share of an item's patches.
template <class Traits>
class FusedPatch {
 public:
  DDST_DEVICE FusedPatch(const typename Traits::Params& p, const GatherPlace& place) : first_image_(place.first_image) {
    if (Traits::kTransposed || !p.prologue.present()) return;
    const HopperGatherGeometry& g = p.g;
    const int top = first_source_row<Traits>(g, place), left = first_source_column<Traits>(g, place);
    const int part_slots = g.part_bytes / Traits::kSlotBytes;
    std::uint32_t bit = 1;
    for (int slot = dev::thread_index() / kChunks; slot < g.parts * part_slots; slot += kRows, bit <<= 1) {
      const int part = slot / part_slots, within = slot % part_slots;
      const int image = first_image_ + within / g.image_pitch, at = within % g.image_pitch;
      const int y = top + at / g.patch_cols * g.step_y + part / g.parts_x;
      const int x = left + at % g.patch_cols * g.step_x + part % g.parts_x;
      const bool inside = within / g.image_pitch >> g.log_tile_images == 0 && image < g.images && y >= 0 &&
                          y < g.in_height && x >= 0 && x < g.in_width;
      if (inside) pixels_ |= bit;
    }
  }

  // All consumers: the patch of a stage, which has landed, if its records list blocks.
  DDST_DEVICE void change(const typename Traits::Params& p, dev::shared_ptr<typename Traits::T> patch,
                          dev::shared_ptr<int> record, int slice) const {
    if constexpr (!Traits::kTransposed) {
      const Prologue& f = p.prologue;
      if (!f.present()) return;
      bool any = dev::load(record) != 0;
      if constexpr (Traits::kDepth > 1) any = any || dev::load(record + p.g.record_ints) != 0;
      if (!any) return;
      const unsigned thread = dev::thread_index();
      const int channel = slice * kSlice + int(thread % kChunks) * 8;
      if (channel < p.g.in_channels) {
        ChannelFactors<8> factors;
        factors.load_mean(f, channel);
        if (f.norm < 2) factors.load_factors(f, 0, p.g.in_channels, channel);
        auto at = patch + swizzled<kChunks>(thread / kChunks, thread % kChunks) * 8;
        int slot = int(thread) / kChunks;
        for (std::uint32_t left = pixels_; left; left >>= 1, slot += kRows, at = at + kRows * kChunks * 8) {
          if (!(left & 1)) continue;
          if (f.norm == 2) {
            const int image = slot % (p.g.part_bytes / Traits::kSlotBytes) / p.g.image_pitch;
            factors.load_factors(f, first_image_ + image, p.g.in_channels, channel);
          }
          change_words(at, factors, f.slope);
        }
      }
      dev::fence_async_shared();  // before the copies that will take the stage next
      dev::sync_some<1>(kHopperConsumers);
    }
  }

 private:
  static constexpr int kChunks = Traits::kSlotBytes / 16, kRows = kHopperConsumers / kChunks;
  int first_image_;
  std::uint32_t pixels_ = 0;  // bit i: slot thread / kChunks + kRows i is a pixel; two stages of 32 kRows do not fit
};

}  // namespace ddst::cuda
