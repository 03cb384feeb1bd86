// Small kernels for sm_90a of which only the first is as kernels should be: what tests/cuda/test_hopper_sass.py looks
// for in machine code and in the compiler's messages must be found in each of the others.
#include <cstdio>

#include "device/hopper.cuh"

using namespace ddst;
using dev::bf16;

enum class Slip { none, thread, print, cluster, spill, registers, no_copy, no_product };

template <Slip kSlip>
__device__ __forceinline__ void body(const dev::TensorMap* map, float* out) {
  const auto box = dev::dynamic_shared<bf16>();
  const auto barrier = (box + 4096).as<dev::Barrier>();
  if (dev::warp_index() == 0 && dev::elect_one()) dev::barrier_init(barrier, 1);
  dev::fence_barrier_init();
  dev::sync_threads();
  dev::give_registers<104>();
  if constexpr (kSlip == Slip::print) std::printf("%d\n", dev::thread_index());
  if constexpr (kSlip == Slip::thread) {
    if (dev::thread_index() == 0)
      for (int i = 0; i < 4; ++i) dev::copy_box(box + i * 512, map, {0, i}, barrier);
  } else if constexpr (kSlip != Slip::no_copy) {
    if (dev::warp_index() == 0)
      for (int i = 0; i < 4; ++i)
        if (dev::elect_one()) dev::copy_box(box + i * 512, map, {0, i}, barrier);
  }
  if constexpr (kSlip == Slip::cluster)
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n}" ::"r"(
            barrier.address)
        : "memory");
  dev::barrier_wait(barrier, 0);
  constexpr int kTiles = kSlip == Slip::spill ? 32 : 2;  // of 64 x 16: 8 registers each
  float sums[kTiles][8] = {};
  const std::uint32_t a[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
  if constexpr (kSlip != Slip::no_product) {
    const auto b = dev::matrix_descriptor<32>(box, 0, 256);
    dev::wgmma_fence();
    DDST_UNROLL
    for (int i = 0; i < kTiles; ++i)
      if (out[i] != 0) dev::wgmma_k16<bf16, 16, false>(sums[i], a, b + i * 512);
    dev::wgmma_commit();
    dev::wgmma_wait<0>();
  }
  DDST_UNROLL
  for (int i = 0; i < kTiles * 8; ++i) out[i * 128 + dev::thread_index()] = sums[i / 8][i % 8];
}

#define DDST_PLANTED(NAME, ...)                                                                           \
  extern "C" DDST_KERNEL(__VA_ARGS__) planted_##NAME(DDST_GRID_CONSTANT dev::TensorMap map, float* out) { \
    body<Slip::NAME>(&map, out);                                                                          \
  }
DDST_PLANTED(none, 128, 1)
DDST_PLANTED(thread, 128, 1)
DDST_PLANTED(print, 128, 1)
DDST_PLANTED(cluster, 128, 1)
DDST_PLANTED(spill, 128, 1)
DDST_PLANTED(registers, 128)
DDST_PLANTED(no_copy, 128, 1)
DDST_PLANTED(no_product, 128, 1)
