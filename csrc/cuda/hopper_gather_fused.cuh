// The gather kernel for sm_90a in a fused half block (gather_fused.cuh, of which the results are finished as there).
// What is read has the sides of what is stored: upsampling while reading stays on the other kernel.
//
// The consumers change a patch in shared memory before they multiply it. A thread keeps to one 16-byte half of every
// 128th slot, which is one place in the swizzle, and knows for an item which of its slots are pixels: padding stays
// zero.
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
    const int part_slots = g.part_bytes / kSlotBytes;
    std::uint32_t bit = 1;
    for (int slot = dev::thread_index() / 2; slot < g.parts * part_slots; slot += kRows, bit <<= 1) {
      const int part = slot / part_slots, within = slot % part_slots;
      const int image = first_image_ + within / g.image_pitch, at = within % g.image_pitch;
      const int y = top + at / g.patch_cols * g.step_y + part / g.parts_x;
      const int x = left + at % g.patch_cols * g.step_x + part % g.parts_x;
      const bool inside = within / g.image_pitch >> g.log_tile_images == 0 && image < g.images && y >= 0 &&
                          y < g.in_height && x >= 0 && x < g.in_width;
      if (inside) pixels_ |= bit;
    }
  }

  // All consumers: the patch of a slice, which has landed, if its record lists blocks.
  DDST_DEVICE void change(const typename Traits::Params& p, dev::shared_ptr<typename Traits::T> patch,
                          dev::shared_ptr<int> record, int slice) const {
    if constexpr (!Traits::kTransposed) {
      const Prologue& f = p.prologue;
      if (!f.present() || dev::load(record) == 0) return;
      const unsigned thread = dev::thread_index();
      const int channel = slice * kSlice + int(thread % 2) * 8;
      if (channel < p.g.in_channels) {
        ChannelFactors<8> factors;
        factors.load_mean(f, channel);
        if (f.norm < 2) factors.load_factors(f, 0, p.g.in_channels, channel);
        auto at = patch + swizzled<2>(thread / 2, thread % 2) * 8;
        int slot = int(thread) / 2;
        for (std::uint32_t left = pixels_; left; left >>= 1, slot += kRows, at = at + kRows * kSlice) {
          if (!(left & 1)) continue;
          if (f.norm == 2) {
            const int image = slot % (p.g.part_bytes / kSlotBytes) / p.g.image_pitch;
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
  static constexpr int kRows = kHopperConsumers / 2, kSlotBytes = kSlice * 2;
  int first_image_;
  std::uint32_t pixels_ = 0;  // bit i: slot thread / 2 + 128 i is a pixel
};

}  // namespace ddst::cuda
