// Device primitives in PTX (sm_80 and later). Same names and signatures as the emulator's
// tests/cuda/emulator/primitives_host.hpp.
#pragma once
#include <cstring>

#define DDST_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)  // threads, blocks per multiprocessor
#define DDST_DEVICE __device__ __forceinline__
#define DDST_UNROLL _Pragma("unroll")

namespace ddst::dev {

template <class T>
using global_ptr = T*;

template <class T>
struct shared_ptr {  // a 32-bit address in the shared window
  std::uint32_t address;
  DDST_DEVICE shared_ptr operator+(int n) const { return {address + std::uint32_t(n) * std::uint32_t(sizeof(T))}; }
  template <class U>
  DDST_DEVICE shared_ptr<U> as() const {
    return {address};
  }
};

DDST_DEVICE int thread_index() { return int(threadIdx.x); }
DDST_DEVICE int block_index_x() { return int(blockIdx.x); }
DDST_DEVICE int block_index_y() { return int(blockIdx.y); }
DDST_DEVICE void sync_threads() { __syncthreads(); }
DDST_DEVICE void sync_warp() { __syncwarp(); }

extern __shared__ __align__(1024) unsigned char ddst_dynamic_shared[];
template <class T>
DDST_DEVICE shared_ptr<T> dynamic_shared() {
  return {std::uint32_t(__cvta_generic_to_shared(ddst_dynamic_shared))};
}

// Global memory. Loads are through the read-only cache: of memory that no kernel in flight writes.
template <class T>
DDST_DEVICE T load(const T* p) {
  return __ldg(p);
}
DDST_DEVICE bf16 load(const bf16* p) { return {__ldg(&p->bits)}; }
DDST_DEVICE fp16 load(const fp16* p) { return {__ldg(&p->bits)}; }
template <class T>
DDST_DEVICE std::uint32_t load_word(const T* p) {  // 4 bytes at a 4-byte boundary: two 16-bit elements
  return __ldg(reinterpret_cast<const std::uint32_t*>(p));
}
template <class T>
DDST_DEVICE Words4 load_words(const T* p) {  // 16 bytes at a 16-byte boundary
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
template <class T>
DDST_DEVICE void store(T* p, T value) {
  *p = value;
}
template <class T, class Words>
DDST_DEVICE void store_words(T* p, Words v) {
  *reinterpret_cast<Words*>(p) = v;
}

// Shared memory, 4-byte types and 16-byte words.
template <class T>
DDST_DEVICE T load(shared_ptr<T> p) {
  static_assert(sizeof(T) == 4);
  std::uint32_t bits;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(bits) : "r"(p.address) : "memory");
  T value;
  memcpy(&value, &bits, 4);
  return value;
}
template <class T>
DDST_DEVICE void store(shared_ptr<T> p, T value) {
  static_assert(sizeof(T) == 4);
  std::uint32_t bits;
  memcpy(&bits, &value, 4);
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(p.address), "r"(bits) : "memory");
}
template <class T>
DDST_DEVICE Words4 load_words(shared_ptr<T> p) {
  Words4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "r"(p.address)
               : "memory");
  return v;
}
template <class T>
DDST_DEVICE void store_words(shared_ptr<T> p, Words4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(p.address), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]),
               "r"(v.w[3])
               : "memory");
}

// 16 bytes, of which `source_bytes` are read and the rest become zero.
template <class T>
DDST_DEVICE void cp_async16(shared_ptr<T> dst, const T* src, int source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst.address), "l"(__cvta_generic_to_global(src)),
               "r"(source_bytes)
               : "memory");
}
DDST_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
DDST_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

template <class T>
DDST_DEVICE void ldmatrix_x4(std::uint32_t (&r)[4], shared_ptr<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address)
               : "memory");
}
template <class T>
DDST_DEVICE void ldmatrix_x4_trans(std::uint32_t (&r)[4], shared_ptr<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address)
               : "memory");
}

template <class T>
DDST_DEVICE void mma_m16n8k16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
#define DDST_MMA_K16(TYPE, NAME)                                                                                 \
  template <>                                                                                                    \
  DDST_DEVICE void mma_m16n8k16<TYPE>(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                                   \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                                                    \
        "{%0, %1, %2, %3};"                                                                                      \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                         \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                     \
  }
DDST_MMA_K16(bf16, "bf16")
DDST_MMA_K16(fp16, "f16")
#undef DDST_MMA_K16
DDST_DEVICE void mma_m16n8k8_tf32(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DDST_DEVICE std::uint32_t to_tf32(float value) {
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

DDST_DEVICE std::uint32_t float_bits(float value) { return __float_as_uint(value); }
DDST_DEVICE float float_of(std::uint32_t bits) { return __uint_as_float(bits); }
template <class T>
DDST_DEVICE float widen(std::uint16_t bits);
template <>
DDST_DEVICE float widen<bf16>(std::uint16_t bits) {
  return __uint_as_float(std::uint32_t(bits) << 16);
}
template <>
DDST_DEVICE float widen<fp16>(std::uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
DDST_DEVICE int popcount(std::uint32_t bits) { return __popc(bits); }
DDST_DEVICE std::uint32_t shfl_xor(std::uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
// The value of lane `lane` % 32.
DDST_DEVICE std::uint32_t shfl(std::uint32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// Two values rounded to nearest even; `lo` in the low half.
template <class T>
DDST_DEVICE std::uint32_t pack2(float lo, float hi);
template <>
DDST_DEVICE std::uint32_t pack2<bf16>(float lo, float hi) {
  std::uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
template <>
DDST_DEVICE std::uint32_t pack2<fp16>(float lo, float hi) {
  std::uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

}  // namespace ddst::dev
