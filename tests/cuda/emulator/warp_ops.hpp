// Warp collectives with the fragment layouts of the PTX ISA manual ("Matrix Fragments for mma.m16n8k16 / .m16n8k8",
// "ldmatrix").
#pragma once
#include <bit>
#include <cmath>

#include "block.hpp"

namespace ddst::emu {

inline float bf16_to_float(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t(bits) << 16); }
inline float fp16_to_float(std::uint16_t bits) { return float(std::bit_cast<_Float16>(bits)); }
inline std::uint16_t float_to_bf16(float value) {  // round to nearest even
  const auto u = std::bit_cast<std::uint32_t>(value);
  if (value != value) return 0x7fff;
  return std::uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline std::uint16_t float_to_fp16(float value) { return std::bit_cast<std::uint16_t>(_Float16(value)); }
inline float float_to_tf32(float value) {  // cvt.rna: ties away from zero
  if (!std::isfinite(value)) return value;
  return std::bit_cast<float>((std::bit_cast<std::uint32_t>(value) + 0x1000u) & ~0x1fffu);
}

struct MmaArgs {
  float* c;
  const std::uint32_t *a, *b;
};

inline float toward_zero(double value) {  // an infinite one where it overflows
  const auto nearest = float(value);
  if (std::isinf(nearest)) return nearest;
  return std::abs(double(nearest)) > std::abs(value) ? std::bit_cast<float>(std::bit_cast<std::uint32_t>(nearest) - 1)
                                                     : nearest;
}

// d = a b + c with rows of `c` in fp32. The hardware's order and rounding of the sum are not specified, never compare
// bits; known GPUs cut it off (Fasi, Higham, Mikaitis, Pranesh, PeerJ Comput. Sci. 7:e330, 2021), and so does this.
template <int K>
void multiply(Block& block, void* const* args, const float (&a)[16][K], const float (&b)[K][8]) {
  double c[16][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      c[lane / 4 + (i / 2) * 8][lane % 4 * 2 + i % 2] = static_cast<MmaArgs*>(args[lane])->c[i];
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) c[m][n] += double(a[m][k]) * double(b[k][n]);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<MmaArgs*>(args[lane])->c[i] = toward_zero(c[lane / 4 + (i / 2) * 8][lane % 4 * 2 + i % 2]);
  ++block.stats.mma;
}

template <float (*kToFloat)(std::uint16_t)>
void mma_m16n8k16(Block& block, int, void* const* args) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const MmaArgs*>(args[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 8; ++i) {  // element i lies in half i % 2 of register i / 2
      const auto bits = std::uint16_t(in.a[i / 2] >> (i % 2 * 16));
      a[group + (i / 2 % 2) * 8][pair + i % 2 + (i / 4) * 8] = kToFloat(bits);
    }
    for (int i = 0; i < 4; ++i)
      b[pair + i % 2 + (i / 2) * 8][group] = kToFloat(std::uint16_t(in.b[i / 2] >> (i % 2 * 16)));
  }
  multiply<16>(block, args, a, b);
}

inline void mma_m16n8k8_tf32(Block& block, int warp, void* const* args) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const MmaArgs*>(args[lane]);
    const auto value = [&](std::uint32_t bits) {
      if (bits & 0x1fffu)
        block.fail_for(&block.thread(warp * 32 + lane), "mma operand was not rounded to tf32",
                       block.thread(warp * 32 + lane).where);
      return std::bit_cast<float>(bits);
    };
    for (int i = 0; i < 4; ++i) a[lane / 4 + (i % 2) * 8][lane % 4 + (i / 2) * 4] = value(in.a[i]);
    for (int i = 0; i < 2; ++i) b[lane % 4 + i * 4][lane / 4] = value(in.b[i]);
  }
  multiply<8>(block, args, a, b);
}

struct LdmatrixArgs {
  std::uint32_t* out;
  std::uint32_t offset;
};

// Lanes 8 j .. 8 j + 7 give the row addresses of matrix j; every lane receives one register per matrix.
template <int kCount, bool kTranspose>
void ldmatrix(Block& block, int warp, void* const* args) {
  for (int j = 0; j < kCount; ++j) {
    std::uint16_t matrix[8][8];
    unsigned banks = 0;
    for (int row = 0; row < 8; ++row) {
      const int lane = j * 8 + row;
      const Thread& giver = block.thread(warp * 32 + lane);
      const std::uint32_t offset = static_cast<const LdmatrixArgs*>(args[lane])->offset;
      std::memcpy(matrix[row], block.shared_data_of(giver, offset, 16, 16, giver.where), 16);
      block.note_read(giver, offset, 16, giver.where);
      if (banks >> (offset / 16 % 8) & 1) ++block.stats.ldmatrix_conflicts;
      banks |= 1u << (offset / 16 % 8);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int r = lane / 4, c = lane % 4 * 2;
      const std::uint32_t lo = kTranspose ? matrix[c][r] : matrix[r][c],
                          hi = kTranspose ? matrix[c + 1][r] : matrix[r][c + 1];
      static_cast<LdmatrixArgs*>(args[lane])->out[j] = lo | hi << 16;
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    block.thread(warp * 32 + lane).products.wrote(static_cast<LdmatrixArgs*>(args[lane])->out);
  ++block.stats.ldmatrix;
}

struct ShuffleArgs {
  std::uint32_t in, out;
  int mask;  // of shuffle: the lane
};

inline void shuffle_xor(Block& block, int, void* const* args) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<ShuffleArgs*>(args[lane]);
    const int from = lane ^ mine.mask;
    mine.out = from < 32 ? static_cast<ShuffleArgs*>(args[from])->in : mine.in;
  }
  ++block.stats.shuffles;
}

inline void shuffle(Block& block, int, void* const* args) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<ShuffleArgs*>(args[lane]);
    mine.out = static_cast<ShuffleArgs*>(args[mine.mask & 31])->in;
  }
  ++block.stats.shuffles;
}

inline void sync_warp(Block& block, int warp, void* const* args) {
  bool orders = true;
  for (int lane = 0; lane < 32; ++lane) orders = orders && *static_cast<const bool*>(args[lane]);
  if (orders) block.clocks.sync_warp(warp);
}

}  // namespace ddst::emu
