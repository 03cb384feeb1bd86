// Device primitives on the emulator. Same names and signatures as csrc/cuda/device/primitives_ptx.cuh, plus the
// caller's place.
#pragma once
#include "memory.hpp"
#include "warp_ops.hpp"

#define DDST_KERNEL(...) inline void
#define DDST_DEVICE inline
#define DDST_UNROLL

namespace ddst::dev {

using emu::Block;
using emu::Where;

template <class T>
using global_ptr = emu::GlobalPtr<T>;
template <class T>
using shared_ptr = emu::SharedPtr<T>;

inline int thread_index() { return Block::current->thread_id(); }
inline int block_index_x() { return Block::current->block_index().x; }
inline int block_index_y() { return Block::current->block_index().y; }
inline void sync_threads(Where where = Where::current()) { Block::current->barrier(where); }
inline void sync_warp(Where where = Where::current()) {
  bool orders = !Block::current->dropped(where);
  Block::current->warp_op(&emu::sync_warp, &orders, "__syncwarp", where);
}

template <class T>
shared_ptr<T> dynamic_shared() {
  return shared_ptr<T>(0);
}

template <class T>
std::remove_const_t<T> load(emu::GlobalPtr<T> p, Where where = Where::current()) {
  std::remove_const_t<T> value;
  std::memcpy(&value, p.buffer()->read(p.byte_offset(), sizeof(T), sizeof(T), where), sizeof(T));
  return value;
}
template <class T>
std::uint32_t load_word(emu::GlobalPtr<const T> p, Where where = Where::current()) {
  std::uint32_t word;
  std::memcpy(&word, p.buffer()->read(p.byte_offset(), 4, 4, where), 4);
  return word;
}
template <class T>
Words4 load_words(emu::GlobalPtr<const T> p, Where where = Where::current()) {
  Words4 words;
  std::memcpy(&words, p.buffer()->read(p.byte_offset(), 16, 16, where), 16);
  return words;
}
template <class T>
void store(emu::GlobalPtr<T> p, std::type_identity_t<T> value, Where where = Where::current()) {
  std::memcpy(p.buffer()->write(p.byte_offset(), sizeof(T), sizeof(T), where), &value, sizeof(T));
}
template <class T, class Words>
void store_words(emu::GlobalPtr<T> p, Words v, Where where = Where::current()) {
  std::memcpy(p.buffer()->write(p.byte_offset(), sizeof v, sizeof v, where), &v, sizeof v);
}
template <class T>
T load(emu::SharedPtr<T> p, Where where = Where::current()) {
  Block& block = *Block::current;
  T value;
  std::memcpy(&value, block.shared_data(p.offset(), sizeof(T), sizeof(T), where), sizeof(T));
  block.note_read(block.self(), p.offset(), sizeof(T), where);
  return value;
}
template <class T>
void store(emu::SharedPtr<T> p, std::type_identity_t<T> value, Where where = Where::current()) {
  Block& block = *Block::current;
  std::byte* to = block.shared_data(p.offset(), sizeof(T), sizeof(T), where);
  block.note_write(block.self(), p.offset(), sizeof(T), emu::Shadow::kPlain, where);
  std::memcpy(to, &value, sizeof(T));
}
template <class T>
Words4 load_words(emu::SharedPtr<T> p, Where where = Where::current()) {
  return load(p.template as<Words4>(), where);
}
template <class T>
void store_words(emu::SharedPtr<T> p, Words4 v, Where where = Where::current()) {
  store(p.template as<Words4>(), v, where);
}

template <class T>
void cp_async16(emu::SharedPtr<T> dst, emu::GlobalPtr<const T> src, int source_bytes, Where where = Where::current()) {
  Block& block = *Block::current;
  if (source_bytes < 0 || source_bytes > 16) block.fail("cp.async source size " + std::to_string(source_bytes), where);
  std::byte* to = block.shared_data(dst.offset(), 16, 16, where);
  block.note_write(block.self(), dst.offset(), 16, emu::Shadow::kCpAsync, where);
  const std::byte* from = source_bytes ? src.buffer()->read(src.byte_offset(), source_bytes, 16, where) : nullptr;
  ++block.stats.copies;
  const auto move = [=](std::byte* target) {
    if (source_bytes) std::memcpy(target, from, source_bytes);
    std::memset(target + source_bytes, 0, 16 - source_bytes);
  };
  if (block.options.delay_copies)
    std::memset(to, 0xff, 16);
  else
    move(to);
  block.self().copies.push_back({dst.offset(), 16, block.self().groups, move});
}
inline void cp_async_commit() { ++Block::current->self().groups; }
template <int kLeft>
void cp_async_wait() {
  Block& block = *Block::current;
  emu::Thread& self = block.self();
  ++block.stats.waits;
  if (self.waits++ == block.options.drop_wait) return;
  auto& copies = self.copies;
  std::size_t kept = 0;
  for (auto& copy : copies) {
    if (copy.group < self.groups - kLeft)
      block.land(self, copy);
    else
      copies[kept++] = std::move(copy);
  }
  copies.resize(kept);
}

template <class T>
void ldmatrix_x4(std::uint32_t (&r)[4], emu::SharedPtr<T> row, Where where = Where::current()) {
  emu::LdmatrixArgs args{r, row.offset()};
  Block::current->warp_op(&emu::ldmatrix<4, false>, &args, "ldmatrix.x4", where);
}
template <class T>
void ldmatrix_x4_trans(std::uint32_t (&r)[4], emu::SharedPtr<T> row, Where where = Where::current()) {
  emu::LdmatrixArgs args{r, row.offset()};
  Block::current->warp_op(&emu::ldmatrix<4, true>, &args, "ldmatrix.x4.trans", where);
}

template <class T>
void mma_m16n8k16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                  Where where = Where::current()) {
  emu::MmaArgs args{c, a, b};
  constexpr bool bf = std::is_same_v<T, bf16>;
  static_assert(bf || std::is_same_v<T, fp16>);
  Block::current->warp_op(bf ? &emu::mma_m16n8k16<&emu::bf16_to_float> : &emu::mma_m16n8k16<&emu::fp16_to_float>, &args,
                          "mma.m16n8k16", where);
}
inline void mma_m16n8k8_tf32(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                             Where where = Where::current()) {
  emu::MmaArgs args{c, a, b};
  Block::current->warp_op(&emu::mma_m16n8k8_tf32, &args, "mma.m16n8k8.tf32", where);
}
inline int popcount(std::uint32_t bits) { return std::popcount(bits); }
inline std::uint32_t float_bits(float value) { return std::bit_cast<std::uint32_t>(value); }
inline float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }
inline std::uint32_t to_tf32(float value) { return float_bits(emu::float_to_tf32(value)); }
template <class T>
float widen(std::uint16_t bits) {
  if constexpr (std::is_same_v<T, bf16>)
    return emu::bf16_to_float(bits);
  else
    return emu::fp16_to_float(bits);
}

inline std::uint32_t shfl_xor(std::uint32_t value, int mask, Where where = Where::current()) {
  emu::ShuffleArgs args{value, 0, mask};
  Block::current->warp_op(&emu::shuffle_xor, &args, "shfl.xor", where);
  return args.out;
}
inline std::uint32_t shfl(std::uint32_t value, int lane, Where where = Where::current()) {
  emu::ShuffleArgs args{value, 0, lane};
  Block::current->warp_op(&emu::shuffle, &args, "shfl.idx", where);
  return args.out;
}

template <class T>
std::uint32_t pack2(float lo, float hi) {
  if constexpr (std::is_same_v<T, bf16>)
    return emu::float_to_bf16(lo) | std::uint32_t(emu::float_to_bf16(hi)) << 16;
  else
    return emu::float_to_fp16(lo) | std::uint32_t(emu::float_to_fp16(hi)) << 16;
}

}  // namespace ddst::dev
