// Device primitives in PTX for sm_90a. Same names and signatures as the emulator's tests/cuda/emulator/hopper_host.hpp.
//
// Scopes are the narrowest that hold: an acquire at cluster scope drops the first-level cache at each success, a
// release at cluster scope is two memory barriers. What is copied to both CTAs of a cluster arrives with the barrier of
// the CTA that it is copied to, so waiting is always of one's own CTA.
#pragma once
#include "primitives_ptx.cuh"

namespace ddst::dev {

// ---- mbarriers ----
DDST_DEVICE void barrier_init(shared_ptr<Barrier> b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b.address), "r"(arrivals) : "memory");
}
// Initialised barriers become visible to asynchronous copies and to the cluster.
DDST_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DDST_DEVICE void barrier_arrive(shared_ptr<Barrier> b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b.address) : "memory");
}
// Arrives, and the phase waits for `bytes` more of copies.
DDST_DEVICE void barrier_arrive_expect(shared_ptr<Barrier> b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b.address), "r"(bytes) : "memory");
}
// Arrives at the barrier at the same place of CTA `rank` of the cluster. Orders this thread's earlier reads; data that
// it wrote for the other CTA would need cluster scope.
DDST_DEVICE void barrier_arrive_at(shared_ptr<Barrier> b, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(b.address),
      "r"(rank)
      : "memory");
}
// Returns when the phase of this parity has completed: parity 0 waits for the first phase, the third...
DDST_DEVICE void barrier_wait(shared_ptr<Barrier> b, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(b.address),
      "r"(parity)
      : "memory");
}

// ---- threads, registers, clusters ----
// True in one lane of the warp, all of whose lanes are here. Copies by `threadIdx.x == 0` would be compiled to a loop.
DDST_DEVICE bool elect_one() {
  std::uint32_t chosen;
  asm volatile(
      "{\n"
      ".reg .pred mine;\n"
      "elect.sync _|mine, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, mine;\n"
      "}"
      : "=r"(chosen));
  return chosen != 0;
}
template <int kCount>
DDST_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
DDST_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
// A barrier of `threads` threads, whole warps; kId 0 is sync_threads'.
template <int kId>
DDST_DEVICE void sync_some(int threads) {
  static_assert(kId > 0 && kId < 16);
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "r"(threads) : "memory");
}
DDST_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of the cluster. Relaxed: it orders barriers that were initialised and fenced (fence_barrier_init), and
// nothing else: neither data, nor earlier arrivals at another CTA's barriers before that CTA's end. Whoever ends waits
// for those at the barriers themselves.
DDST_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// This thread's accesses to shared memory come before later asynchronous ones.
DDST_DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The address as one value: the compiler does not take the sum apart. One that all threads share then stays a scalar of
// the instruction that reads from it plus something else.
template <class T>
DDST_DEVICE shared_ptr<T> kept(shared_ptr<T> p) {
  asm volatile("" : "+r"(p.address));
  return p;
}
// The warp's number, as the compiler does not know that all lanes agree on thread_index() / 32.
DDST_DEVICE int warp_index() { return __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0); }

// ---- copies: asynchronous, they complete their bytes on the barrier ----
struct alignas(128) TensorMap {  // CUtensorMap, which the driver encodes; aligned as CUDA 13's
  std::uint64_t opaque[16];
};

// One box of a tensor map, tile mode; what lies outside of the tensor is zero. copy_box_to_all: to the same place of
// every CTA in `mask`, each of whose barriers receives the bytes.
#define DDST_COPY_BOX(DIMS, AT, MASK, ...)                                                                          \
  template <class T>                                                                                                \
  DDST_DEVICE void copy_box(shared_ptr<T> to, const TensorMap* map, const int (&at)[DIMS], shared_ptr<Barrier> b) { \
    asm volatile("cp.async.bulk.tensor." #DIMS                                                                      \
                 "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {" AT                       \
                 "}], [%2];" ::"r"(to.address),                                                                     \
                 "l"(map), "r"(b.address), __VA_ARGS__                                                              \
                 : "memory");                                                                                       \
  }                                                                                                                 \
  template <class T>                                                                                                \
  DDST_DEVICE void copy_box_to_all(shared_ptr<T> to, const TensorMap* map, const int (&at)[DIMS],                   \
                                   shared_ptr<Barrier> b, unsigned mask) {                                          \
    asm volatile("cp.async.bulk.tensor." #DIMS                                                                      \
                 "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {" AT    \
                 "}], [%2], " MASK ";" ::"r"(to.address),                                                           \
                 "l"(map), "r"(b.address), __VA_ARGS__, "h"(std::uint16_t(mask))                                    \
                 : "memory");                                                                                       \
  }
DDST_COPY_BOX(1, "%3", "%4", "r"(at[0]))
DDST_COPY_BOX(2, "%3, %4", "%5", "r"(at[0]), "r"(at[1]))
DDST_COPY_BOX(3, "%3, %4, %5", "%6", "r"(at[0]), "r"(at[1]), "r"(at[2]))
DDST_COPY_BOX(4, "%3, %4, %5, %6", "%7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]))
DDST_COPY_BOX(5, "%3, %4, %5, %6, %7", "%8", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]))
#undef DDST_COPY_BOX

// Pixels in a row of an im2col map, from {channel, w, h, image} on, each moved by `offset` = {w, h}.
template <class T>
DDST_DEVICE void copy_im2col(shared_ptr<T> to, const TensorMap* map, const int (&at)[4], const int (&offset)[2],
                             shared_ptr<Barrier> b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], [%2], {%7, %8};" ::"r"(to.address),
      "l"(map), "r"(b.address), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "h"(std::uint16_t(offset[0])),
      "h"(std::uint16_t(offset[1]))
      : "memory");
}
// `bytes` in a row; both places and the number are multiples of 16.
template <class T>
DDST_DEVICE void copy_bytes(shared_ptr<T> to, const T* from, int bytes, shared_ptr<Barrier> b) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to.address),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(b.address)
      : "memory");
}

// ---- wgmma ----
// An operand in shared memory. The high word is constant in a kernel; places are added to the low one.
struct MatrixDescriptor {
  std::uint32_t low, high;
  DDST_DEVICE MatrixDescriptor operator+(int bytes) const { return {low + std::uint32_t(bytes) / 16, high}; }
};
// kSwizzle: bytes of a row in the pattern that the copy wrote, 32, 64 or 128, with patterns of 8 rows.
// Rows along k (K-major): stride_bytes lies between 8 rows (of m or n); leading_bytes plays no role.
// Rows along m or n (transposed): stride_bytes lies between 8 rows (of k), leading_bytes between rows' continuations.
template <int kSwizzle, class T>
DDST_DEVICE MatrixDescriptor matrix_descriptor(shared_ptr<T> at, int leading_bytes, int stride_bytes) {
  static_assert(kSwizzle == 32 || kSwizzle == 64 || kSwizzle == 128);
  constexpr std::uint32_t kMode = kSwizzle == 128 ? 1 : kSwizzle == 64 ? 2 : 3;
  return {(at.address & 0x3ffff) / 16 | std::uint32_t(leading_bytes / 16) << 16,
          std::uint32_t(stride_bytes / 16) | kMode << 30};
}

// Registers that were written before are seen by the products that follow; shared memory takes fence_async_shared.
DDST_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DDST_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
DDST_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

#define DDST_PLACES_8(A, B, C, D, E, F, G, H) "%" #A ", %" #B ", %" #C ", %" #D ", %" #E ", %" #F ", %" #G ", %" #H
#define DDST_SUMS_8(I)                                                                                        \
  "+f"(d[I]), "+f"(d[I + 1]), "+f"(d[I + 2]), "+f"(d[I + 3]), "+f"(d[I + 4]), "+f"(d[I + 5]), "+f"(d[I + 6]), \
      "+f"(d[I + 7])
#define DDST_PLACES_16 DDST_PLACES_8(0, 1, 2, 3, 4, 5, 6, 7)
#define DDST_PLACES_32 DDST_PLACES_16 ", " DDST_PLACES_8(8, 9, 10, 11, 12, 13, 14, 15)
#define DDST_PLACES_64 \
  DDST_PLACES_32 ", " DDST_PLACES_8(16, 17, 18, 19, 20, 21, 22, 23) ", " DDST_PLACES_8(24, 25, 26, 27, 28, 29, 30, 31)
#define DDST_PLACES_128                                                                 \
  DDST_PLACES_64 ", " DDST_PLACES_8(32, 33, 34, 35, 36, 37, 38, 39) ", " DDST_PLACES_8( \
      40, 41, 42, 43, 44, 45, 46, 47) ", " DDST_PLACES_8(48, 49, 50, 51, 52, 53, 54,    \
                                                         55) ", " DDST_PLACES_8(56, 57, 58, 59, 60, 61, 62, 63)
#define DDST_SUMS_16 DDST_SUMS_8(0)
#define DDST_SUMS_32 DDST_SUMS_16, DDST_SUMS_8(8)
#define DDST_SUMS_64 DDST_SUMS_32, DDST_SUMS_8(16), DDST_SUMS_8(24)
#define DDST_SUMS_128 DDST_SUMS_64, DDST_SUMS_8(32), DDST_SUMS_8(40), DDST_SUMS_8(48), DDST_SUMS_8(56)

// d += a b for 64 rows, kN columns and 16 of k. kTransposed...: its rows in shared memory run along m or n.
// A in registers: a warp's 16 rows as in mma.m16n8k16. d[4 j + 2 r + i]: row lane / 4 + 8 r, column 8 j + lane % 4 * 2
// + i.
template <class T, int kN, bool kTransposedB>
struct WarpgroupProduct;
#define DDST_WGMMA(TYPE, NAME, N, A0, A1, A2, A3, DB, TB)                                                             \
  template <bool kTransposedB>                                                                                        \
  struct WarpgroupProduct<TYPE, N, kTransposedB> {                                                                    \
    static DDST_DEVICE void of(float (&d)[N / 2], const std::uint32_t (&a)[4], std::uint64_t b) {                     \
      asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME \
                   "." NAME " {" DDST_PLACES_##N "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #DB                 \
                                                 ", add, 1, 1, %" #TB ";\n}"                                          \
                   : DDST_SUMS_##N                                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kTransposedB)));                     \
    }                                                                                                                 \
    template <bool kTransposedA>                                                                                      \
    static DDST_DEVICE void of(float (&d)[N / 2], std::uint64_t a, std::uint64_t b) {                                 \
      asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME \
                   "." NAME " {" DDST_PLACES_##N "}, %" #A0 ", %" #A1 ", add, 1, 1, %" #A2 ", %" #A3 ";\n}"           \
                   : DDST_SUMS_##N                                                                                    \
                   : "l"(a), "l"(b), "n"(int(kTransposedA)), "n"(int(kTransposedB)));                                 \
    }                                                                                                                 \
  };
#define DDST_WGMMAS(TYPE, NAME)                      \
  DDST_WGMMA(TYPE, NAME, 16, 8, 9, 10, 11, 12, 13)   \
  DDST_WGMMA(TYPE, NAME, 32, 16, 17, 18, 19, 20, 21) \
  DDST_WGMMA(TYPE, NAME, 64, 32, 33, 34, 35, 36, 37) \
  DDST_WGMMA(TYPE, NAME, 128, 64, 65, 66, 67, 68, 69)
DDST_WGMMAS(bf16, "bf16")
DDST_WGMMAS(fp16, "f16")
#undef DDST_WGMMAS
#undef DDST_WGMMA
#undef DDST_SUMS_128
#undef DDST_SUMS_64
#undef DDST_SUMS_32
#undef DDST_SUMS_16
#undef DDST_SUMS_8
#undef DDST_PLACES_128
#undef DDST_PLACES_64
#undef DDST_PLACES_32
#undef DDST_PLACES_16
#undef DDST_PLACES_8

DDST_DEVICE std::uint64_t whole(MatrixDescriptor m) {
  std::uint64_t bits;
  asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "r"(m.low), "r"(m.high));
  return bits;
}
template <class T, int kN, bool kTransposedB>
DDST_DEVICE void wgmma_k16(float (&d)[kN / 2], const std::uint32_t (&a)[4], MatrixDescriptor b) {
  WarpgroupProduct<T, kN, kTransposedB>::of(d, a, whole(b));
}
template <class T, int kN, bool kTransposedA, bool kTransposedB>
DDST_DEVICE void wgmma_k16(float (&d)[kN / 2], MatrixDescriptor a, MatrixDescriptor b) {
  WarpgroupProduct<T, kN, kTransposedB>::template of<kTransposedA>(d, whole(a), whole(b));
}

}  // namespace ddst::dev
