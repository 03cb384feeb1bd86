// What sm_90a adds, on the emulator. Same names and signatures as csrc/cuda/device/hopper_ptx.cuh, plus the caller's
// place.
#pragma once
#include "primitives_host.hpp"
#include "warpgroup_products.hpp"

namespace ddst::dev {

using TensorMap = cuda::TensorMap;  // what the driver would encode

// ---- mbarriers ----
inline void barrier_init(emu::SharedPtr<Barrier> b, int arrivals, Where where = Where::current()) {
  Block& block = *Block::current;
  emu::Thread& self = block.self();
  block.shared_data(b.offset(), 8, 8, where);
  block.barriers.init(self.id, self.block, b.offset(), arrivals, where);
  block.note_write(self, b.offset(), 8, emu::Shadow::kBarrier, where);
}
inline void fence_barrier_init(Where where = Where::current()) {
  Block& block = *Block::current;
  if (!block.dropped(where)) block.barriers.fence_inits(block.self().id);
}
inline void arrive(int rank, emu::SharedPtr<Barrier> b, int bytes, Where where) {
  Block& block = *Block::current;
  emu::Thread& self = block.self();
  block.reach(rank, "arrival", self.id, block.clocks.now(self.id), where);
  const bool remote = rank != self.block;
  ++(remote ? block.stats.remote_arrivals : block.stats.barrier_arrivals);
  block.barriers.arrive(block.barriers.used(self.id, rank, b.offset(), remote, "arrival", where), self.id, bytes,
                        where);
}
inline void barrier_arrive(emu::SharedPtr<Barrier> b, Where where = Where::current()) {
  arrive(Block::current->cluster_rank(), b, 0, where);
}
inline void barrier_arrive_expect(emu::SharedPtr<Barrier> b, int bytes, Where where = Where::current()) {
  if (bytes < 0 || bytes >= 1 << 20) Block::current->fail("barrier_arrive_expect of " + std::to_string(bytes), where);
  arrive(Block::current->cluster_rank(), b, bytes, where);
}
inline void barrier_arrive_at(emu::SharedPtr<Barrier> b, int rank, Where where = Where::current()) {
  arrive(rank, b, 0, where);
}
inline void barrier_wait(emu::SharedPtr<Barrier> b, int parity, Where where = Where::current()) {
  if (parity != 0 && parity != 1) Block::current->fail("barrier_wait for parity " + std::to_string(parity), where);
  Block::current->wait(b.offset(), parity, where);
}

// ---- threads, registers, clusters ----
inline bool elect_one(Where where = Where::current()) {
  emu::ElectArgs args{};
  Block::current->warp_op(&emu::elect, &args, "elect.sync", where);
  return args.mine;
}
template <int kCount>
void give_registers(Where where = Where::current()) {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0);
  emu::RegisterArgs args{kCount, false};
  Block::current->warp_op(&emu::set_registers, &args, "setmaxnreg.dec", where);
}
template <int kCount>
void take_registers(Where where = Where::current()) {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0);
  emu::RegisterArgs args{kCount, true};
  Block::current->warp_op(&emu::set_registers, &args, "setmaxnreg.inc", where);
}
template <int kId>
void sync_some(int threads, Where where = Where::current()) {
  static_assert(kId > 0 && kId < 16);
  Block::current->some_barrier(kId, threads, where);
}
inline int cluster_rank() { return Block::current->cluster_rank(); }
inline void cluster_sync(Where where = Where::current()) { Block::current->cluster_barrier(where); }
inline void fence_async_shared(Where where = Where::current()) {
  Block& block = *Block::current;
  if (block.dropped(where)) return;
  const int self = block.self().id;
  block.shadow.fence(self, block.clocks.now(self));
  block.clocks.tick(self);
}

// ---- copies ----
template <class T, int kDims>
void copy_box_to_all(emu::SharedPtr<T> to, const TensorMap* map, const int (&at)[kDims], emu::SharedPtr<Barrier> b,
                     unsigned mask, Where where = Where::current()) {
  if (map->rank != kDims)
    Block::current->fail(
        "copy_box of " + std::to_string(kDims) + " dimensions of a map with " + std::to_string(map->rank), where);
  emu::MapReader reader(*map, where);
  reader.box(at);
  emu::start_map_copy(*map, reader, to.offset(), b.offset(), mask, where);
}
template <class T, int kDims>
void copy_box(emu::SharedPtr<T> to, const TensorMap* map, const int (&at)[kDims], emu::SharedPtr<Barrier> b,
              Where where = Where::current()) {
  copy_box_to_all(to, map, at, b, 1u << cluster_rank(), where);
}
template <class T>
void copy_im2col(emu::SharedPtr<T> to, const TensorMap* map, const int (&at)[4], const int (&offset)[2],
                 emu::SharedPtr<Barrier> b, Where where = Where::current()) {
  emu::MapReader reader(*map, where);
  reader.pixels(at, offset);
  emu::start_map_copy(*map, reader, to.offset(), b.offset(), 1u << cluster_rank(), where);
}
template <class T>
void copy_bytes(emu::SharedPtr<T> to, emu::GlobalPtr<const T> from, int bytes, emu::SharedPtr<Barrier> b,
                Where where = Where::current()) {
  Block& block = *Block::current;
  if (bytes <= 0 || bytes % 16) block.fail("bulk copy of " + std::to_string(bytes) + " bytes", where);
  const std::byte* data = from.buffer()->read(from.byte_offset(), bytes, 16, where);
  emu::start_copy(block.cluster_rank(), to.offset(), std::make_shared<std::vector<std::byte>>(data, data + bytes),
                  b.offset(), where);
  ++block.stats.bulk_copies;
  block.stats.bulk_bytes += bytes;
}

// ---- wgmma ----
struct MatrixDescriptor {
  std::uint32_t low, high;
  MatrixDescriptor operator+(int bytes) const { return {low + std::uint32_t(bytes) / 16, high}; }
};
template <int kSwizzle, class T>
MatrixDescriptor matrix_descriptor(emu::SharedPtr<T> at, int leading_bytes, int stride_bytes) {
  static_assert(kSwizzle == 32 || kSwizzle == 64 || kSwizzle == 128);
  constexpr std::uint32_t kMode = kSwizzle == 128 ? 1 : kSwizzle == 64 ? 2 : 3;
  return {(at.offset() & 0x3ffff) / 16 | std::uint32_t(leading_bytes / 16) << 16,
          std::uint32_t(stride_bytes / 16) | kMode << 30};
}
inline std::uint64_t whole(MatrixDescriptor m) { return std::uint64_t(m.high) << 32 | m.low; }

inline void wgmma_fence(Where where = Where::current()) {
  Block& block = *Block::current;
  if (!block.dropped(where)) block.self().products.fence();
}
inline void wgmma_commit() { Block::current->self().products.commit(); }
template <int kLeft>
void wgmma_wait(Where where = Where::current()) {
  Block& block = *Block::current;
  if (block.dropped(where)) return;
  emu::Thread& self = block.self();
  if (const char* complaint = self.products.wait(kLeft)) block.fail(complaint, where);
  block.clocks.learn(self.id, block.clocks.warpgroup(self.id), self.products.committed() - kLeft);
}
template <class T, int kN>
void start_product(float (&d)[kN / 2], const std::uint32_t* a, MatrixDescriptor a_place, MatrixDescriptor b,
                   bool transposed_a, bool transposed_b, Where where) {
  static_assert(kN >= 8 && kN <= 256 && kN % 8 == 0);
  constexpr bool kBf = std::is_same_v<T, bf16>;
  static_assert(kBf || std::is_same_v<T, fp16>);
  emu::WarpgroupProductArgs args{
      d, a, whole(a_place), whole(b), kN, transposed_a, transposed_b, kBf ? &emu::bf16_to_float : &emu::fp16_to_float};
  Block::current->warpgroup_op(&emu::warpgroup_product, &args, "wgmma", where);
}
template <class T, int kN, bool kTransposedB>
void wgmma_k16(float (&d)[kN / 2], const std::uint32_t (&a)[4], MatrixDescriptor b, Where where = Where::current()) {
  start_product<T, kN>(d, a, {}, b, false, kTransposedB, where);
}
template <class T, int kN, bool kTransposedA, bool kTransposedB>
void wgmma_k16(float (&d)[kN / 2], MatrixDescriptor a, MatrixDescriptor b, Where where = Where::current()) {
  start_product<T, kN>(d, nullptr, a, b, kTransposedA, kTransposedB, where);
}

}  // namespace ddst::dev
