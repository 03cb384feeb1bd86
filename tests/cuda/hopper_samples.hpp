// Two small kernels that use everything that sm_90a adds, with their waits and fences; slips can be planted in them.
#pragma once
#include <random>

#include "check.hpp"
#include "device/hopper.cuh"

namespace ddst::test {

enum class Slip {
  none,
  no_full_wait,    // consumers do not wait for copies
  wrong_parity,    // they wait for the phase before
  one_lane_waits,  // and does not tell the others
  one_warp_waits,
  no_empty_wait,          // the producer does not wait for consumers
  no_empty_arrival,       // consumers do not let go
  early_arrival,          // before their reads are over
  lane_arrives_for_warp,  // without sync_warp
  forgets_other_cta,      // only the own CTA's producer is told
  expects_too_much,
  expects_too_little,
  expects_nothing,
  no_init,
  no_init_fence,
  no_cluster_sync,
  init_of_too_few,
  init_of_too_many,
  leaves_early,   // before the other CTA's last arrivals
  relaxed_leave,  // likewise: a relaxed cluster barrier orders none
  wrong_rank,
  no_such_cta,
  stray_box,
  misaligned_box,
  overlapping_box,
  no_product_wait,
  no_last_product_wait,
  sum_read_early,
  product_wait_of_one_less,
  no_product_fence,
  product_without_commit,
  operand_changed,
  operand_after_fence,
  sum_touched,
  warp_misses_product,
  other_product,
  other_descriptor,
  no_async_fence,
  fence_after_barrier,
  no_barrier_before,
  barrier_of_too_few,
  barrier_as_data,
  write_to_copy,
};

using Bf = dev::bf16;
template <class T>
using Shared = dev::shared_ptr<T>;

// out[p, n] = sum over k of pixels[p, k] weights[k / 16, n, k % 16]: clusters of two CTAs, 64 pixels each, weights half
// by half to both of them; a producer warp, a ring of two stages of 16 channels.
struct Ring {
  dev::TensorMap pixels, weights;
  dev::global_ptr<float> out;
  int slices;
  Slip slip;

  static constexpr int kPixelBytes = 64 * 32, kWeightBytes = 16 * 32, kStage = kPixelBytes + kWeightBytes;
  static constexpr int kStages = 2, kThreads = 160, kSharedBytes = kStages * kStage + 64;

  void operator()() const {
    const int rank = dev::cluster_rank(), warp = dev::warp_index();
    const auto shared = dev::dynamic_shared<unsigned char>();
    const auto full = (shared + kStages * kStage).as<dev::Barrier>(), empty = full + kStages;
    if (warp == 0 && dev::elect_one() && slip != Slip::no_init) {
      for (int i = 0; i < kStages; ++i) {
        dev::barrier_init(full + i, slip == Slip::init_of_too_many ? 2 : 1);
        dev::barrier_init(empty + i, slip == Slip::init_of_too_few ? 4 : 8);
      }
      if (slip != Slip::no_init_fence) dev::fence_barrier_init();
    }
    if (slip != Slip::no_cluster_sync) dev::cluster_sync();
    if (warp == 4)
      produce(rank, shared, full, empty);
    else
      consume(rank, warp, shared, full, empty);
    if (slip == Slip::relaxed_leave) dev::cluster_sync();
  }

  void produce(int rank, Shared<unsigned char> shared, Shared<dev::Barrier> full, Shared<dev::Barrier> empty) const {
    for (int i = 0; i < slices; ++i) {
      const int stage = i % kStages, round = i / kStages;
      if (slip != Slip::no_empty_wait) dev::barrier_wait(empty + stage, (round & 1) ^ 1);
      if (!dev::elect_one()) continue;
      const auto pixels_at = (shared + stage * kStage).as<Bf>();
      auto weights_at = (shared + (stage * kStage + kPixelBytes + rank * kWeightBytes / 2)).as<Bf>();
      if (slip == Slip::overlapping_box && i == 1) weights_at = (shared + kPixelBytes).as<Bf>();
      if (slip == Slip::misaligned_box) weights_at = weights_at + 64;
      if (slip == Slip::stray_box && rank == 1 && i == slices - 1) weights_at = (shared + kStages * kStage).as<Bf>();
      if (slip == Slip::write_to_copy) dev::store_words(pixels_at, dev::Words4{});
      const int expected = kStage + (slip == Slip::expects_too_much) * 16 - (slip == Slip::expects_too_little) * 16;
      if (slip == Slip::expects_nothing)
        dev::barrier_arrive(full + stage);
      else
        dev::barrier_arrive_expect(full + stage, expected);
      dev::copy_box(pixels_at, &pixels, {16 * i, 128 * dev::block_index_y() + 64 * rank}, full + stage);
      const unsigned mask = slip == Slip::no_such_cta ? 7 : slip == Slip::wrong_rank ? 1 : 3;
      dev::copy_box_to_all(weights_at, &weights, {0, 16 * i + 8 * rank}, full + stage, mask);
    }
    if (slip == Slip::leaves_early || slip == Slip::relaxed_leave) return;
    for (int i = slices; i < slices + kStages; ++i) dev::barrier_wait(empty + i % kStages, (i / kStages & 1) ^ 1);
  }

  void consume(int rank, int warp, Shared<unsigned char> shared, Shared<dev::Barrier> full,
               Shared<dev::Barrier> empty) const {
    const int lane = dev::thread_index() % 32;
    float sum[8] = {};
    std::uint32_t a[2][4] = {};
    for (int i = 0; i < slices; ++i) {
      const int stage = i % kStages, round = i / kStages, row = warp * 16 + lane % 16, chunk = lane / 16;
      const auto pixels_at = (shared + stage * kStage).as<Bf>();
      const auto weights_at = (shared + (stage * kStage + kPixelBytes)).as<Bf>();
      if (slip == Slip::one_lane_waits) {
        if (lane == 0) dev::barrier_wait(full + stage, round & 1);
      } else if (slip == Slip::one_warp_waits) {
        if (warp == 0) dev::barrier_wait(full + stage, round & 1);
      } else if (slip != Slip::no_full_wait) {
        dev::barrier_wait(full + stage, (round & 1) ^ int(slip == Slip::wrong_parity));
      }
      if (slip == Slip::barrier_as_data) dev::load((full + stage).as<int>());
      auto& mine = a[i % 2];
      if (slip == Slip::operand_after_fence) dev::wgmma_fence();
      dev::ldmatrix_x4(mine, pixels_at + (row * 16 + (chunk ^ (row / 4 % 2)) * 8));
      if (slip != Slip::no_product_fence && slip != Slip::operand_after_fence) dev::wgmma_fence();
      auto place = dev::matrix_descriptor<32>(weights_at, 16, 256);
      if (slip == Slip::other_descriptor && warp == 2) place = place + 16;
      if (slip == Slip::early_arrival) arrive(rank, lane, empty + stage);
      if (slip == Slip::other_product && warp == 3)
        dev::wgmma_k16<Bf, 16, false>(sum, mine, place);
      else if (slip != Slip::warp_misses_product || warp != 1)
        dev::wgmma_k16<Bf, 16, false>(sum, mine, place);
      if (slip == Slip::operand_changed) mine[1] += 1;
      if (slip == Slip::sum_touched) sum[3] = 0;
      if (slip != Slip::product_without_commit || warp != 2) dev::wgmma_commit();
      const float early = sum[0];
      if (slip == Slip::product_wait_of_one_less)
        dev::wgmma_wait<1>();
      else if (slip != Slip::no_product_wait && (slip != Slip::no_last_product_wait || i + 1 < slices))
        dev::wgmma_wait<0>();
      if (slip == Slip::sum_read_early) sum[0] = early;
      if (slip != Slip::early_arrival) arrive(rank, lane, empty + stage);
    }
    for (int j = 0; j < 8; ++j) {
      const int pixel = 128 * dev::block_index_y() + 64 * rank + warp * 16 + lane / 4 + j / 2 % 2 * 8;
      dev::store(out + (pixel * 16 + j / 4 * 8 + lane % 4 * 2 + j % 2), sum[j]);
    }
  }

  void arrive(int rank, int lane, Shared<dev::Barrier> empty) const {
    if (slip == Slip::no_empty_arrival) return;
    if (slip != Slip::lane_arrives_for_warp) dev::sync_warp();
    if (lane) return;
    dev::barrier_arrive(empty);
    if (slip != Slip::forgets_other_cta) dev::barrier_arrive_at(empty, slip == Slip::wrong_rank ? rank : rank ^ 1);
  }
};

// out[p, q] = sum over i = 1 ... n of 2^(n - i) i^2 pixels[p] . pixels[q]: threads write the operand to shared memory,
// rows along k, and rewrite it once its product is over.
struct Rewrite {
  dev::global_ptr<const Bf> pixels;  // [64, 16]
  dev::global_ptr<float> out;        // [64, 16]
  int rounds;
  Slip slip;

  static constexpr int kThreads = 128, kSharedBytes = 64 * 32;

  void operator()() const {
    const int thread = dev::thread_index(), row = thread / 2, chunk = thread % 2;
    const auto a = dev::dynamic_shared<Bf>();
    float sum[8] = {};
    for (int i = 1; i <= rounds; ++i) {
      dev::Words4 words;
      for (int j = 0; j < 4; ++j) {
        const std::uint32_t pair = dev::load_word(pixels + (row * 16 + chunk * 8 + j * 2));
        words.w[j] = dev::pack2<Bf>(dev::widen<Bf>(std::uint16_t(pair)) * float(i),
                                    dev::widen<Bf>(std::uint16_t(pair >> 16)) * float(i));
      }
      dev::store_words(a + (row * 16 + (chunk ^ (row / 4 % 2)) * 8), words);
      if (slip != Slip::no_async_fence && slip != Slip::fence_after_barrier) dev::fence_async_shared();
      if (slip != Slip::no_barrier_before) dev::sync_some<1>(slip == Slip::barrier_of_too_few ? 96 : 128);
      if (slip == Slip::fence_after_barrier) dev::fence_async_shared();
      for (float& value : sum) value *= 2;
      dev::wgmma_fence();
      const auto place = dev::matrix_descriptor<32>(a, 16, 256);
      dev::wgmma_k16<Bf, 16, false, false>(sum, place, place);
      dev::wgmma_commit();
      dev::wgmma_wait<0>();
    }
    for (int j = 0; j < 8; ++j)
      dev::store(out + ((thread / 32 * 16 + thread % 32 / 4 + j / 2 % 2 * 8) * 16 + j / 4 * 8 + thread % 4 * 2 + j % 2),
                 sum[j]);
  }
};

// ---- their problems ----
struct SampleProblem {
  static constexpr int kPixels = 256, kSlices = 5;
  emu::Buffer pixels{"pixels", kPixels * kSlices * 16 * 2, emu::Buffer::Role::input},
      weights{"weights", kSlices * 16 * 16 * 2, emu::Buffer::Role::input};
  std::vector<float> pixel_values, weight_values;

  SampleProblem() {
    std::mt19937 random(1);
    const auto fill = [&](emu::Buffer& buffer, std::vector<float>& values) {
      for (std::size_t i = 0; i < buffer.size() / 2; ++i) {
        const auto bits = emu::float_to_bf16(float(int(random() % 17) - 8) / 8);
        buffer.host<std::uint16_t>()[i] = bits;
        values.push_back(emu::bf16_to_float(bits));
      }
    };
    fill(pixels, pixel_values);
    fill(weights, weight_values);
  }

  // Throws what the emulator finds, or a wrong result.
  emu::Stats ring(const emu::Options& options, Slip slip = Slip::none) const {
    emu::Buffer out("out", kPixels * 16 * 4, emu::Buffer::Role::output_once);
    const Ring kernel{
        cuda::matrix_map(const_cast<emu::Buffer&>(pixels).host<void>(), 2, kPixels, kSlices * 16, 64, 16,
                         cuda::kSwizzle32),
        cuda::matrix_map(const_cast<emu::Buffer&>(weights).host<void>(), 2, kSlices * 16, 16, 8, 16, cuda::kSwizzle32),
        dev::global_ptr<float>(out), kSlices, slip};
    static emu::Block block;
    block.options = options;
    block.stats = {};
    block.launch({2, kPixels / 128, 1}, Ring::kThreads, Ring::kSharedBytes, kernel, 2);
    for (int p = 0; p < kPixels; ++p)
      for (int n = 0; n < 16; ++n) {
        float sum = 0;
        for (int k = 0; k < kSlices * 16; ++k)
          sum += pixel_values[p * kSlices * 16 + k] * weight_values[(k / 16 * 16 + n) * 16 + k % 16];
        if (out.host<float>()[p * 16 + n] != sum) throw emu::Failure("wrong result of the ring");
      }
    return block.stats;
  }
  emu::Stats rewrite(const emu::Options& options, Slip slip = Slip::none) const {
    emu::Buffer out("out", 64 * 16 * 4, emu::Buffer::Role::output_once);
    const Rewrite kernel{dev::global_ptr<const Bf>(const_cast<emu::Buffer&>(pixels)), dev::global_ptr<float>(out), 3,
                         slip};
    static emu::Block block;
    block.options = options;
    block.stats = {};
    block.launch({1, 1, 1}, Rewrite::kThreads, Rewrite::kSharedBytes, kernel);
    for (int p = 0; p < 64; ++p)
      for (int q = 0; q < 16; ++q) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += 21 * pixel_values[p * 16 + k] * pixel_values[q * 16 + k];
        if (out.host<float>()[p * 16 + q] != sum) throw emu::Failure("wrong result of the rewritten operand");
      }
    return block.stats;
  }
};

}  // namespace ddst::test
