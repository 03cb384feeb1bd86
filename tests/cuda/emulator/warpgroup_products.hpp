// wgmma m64nNk16: descriptors, operands and sums with the layouts of the PTX ISA manual ("Asynchronous Warpgroup Level
// Matrix Multiply-Accumulate Instructions", "Shared Memory Matrix Layout").
#pragma once
#include "bulk_copies.hpp"
#include "warp_ops.hpp"

namespace ddst::emu {

// Where the elements of an operand lie, as the bits of its descriptor say. Chunks are 8 elements, 16 bytes.
class MatrixPlace {
 public:
  explicit MatrixPlace(std::uint64_t bits)
      : start_(std::uint32_t(bits & 0x3fff) * 16),
        leading_(std::uint32_t(bits >> 16 & 0x3fff) * 16),
        stride_(std::uint32_t(bits >> 32 & 0x3fff) * 16),
        base_(std::uint32_t(bits >> 49 & 7)) {
    constexpr int kSwizzles[] = {0, 128, 64, 32};
    swizzle_ = kSwizzles[bits >> 62];
  }
  // Rows along k: the chunk of row `row` that begins at k = 8 `chunk`.
  std::uint32_t along_k(int row, int chunk) const {
    const std::uint32_t pitch = swizzle_ ? std::uint32_t(swizzle_) : 16, next = swizzle_ ? 16 : leading_;
    return address(std::uint32_t(row / 8) * stride_ + std::uint32_t(row % 8) * pitch + std::uint32_t(chunk) * next);
  }
  // Rows along m or n: the chunk of row k that begins at 8 `chunk`.
  std::uint32_t across_k(int k, int chunk) const {
    if (!swizzle_)
      return address(std::uint32_t(chunk) * stride_ + std::uint32_t(k / 8) * leading_ + std::uint32_t(k % 8) * 16);
    const int wide = swizzle_ / 16;
    return address(std::uint32_t(chunk % wide) * 16 + std::uint32_t(chunk / wide) * leading_ +
                   std::uint32_t(k % 8) * std::uint32_t(swizzle_) + std::uint32_t(k / 8) * stride_);
  }

 private:
  std::uint32_t address(std::uint32_t offset) const {
    const std::uint32_t linear = (start_ + offset) & 0x3ffff;
    return swizzle_ ? swizzled_address(linear, swizzle_, (linear >> 7) - base_) : linear;
  }

  std::uint32_t start_, leading_, stride_, base_;
  int swizzle_;
};

struct WarpgroupProductArgs {
  float* d;
  const std::uint32_t* a;  // nullptr: in shared memory
  std::uint64_t a_place, b_place;
  int columns;
  bool transposed_a, transposed_b;
  float (*to_float)(std::uint16_t);
};

// `rows` rows (of m or n) of 16 elements along k, as floats; `warpgroup` reads them.
inline void read_operand(Block& block, const Thread& first, std::uint64_t descriptor, bool transposed, int rows,
                         float (*to_float)(std::uint16_t), int group, float* to) {
  const MatrixPlace place(descriptor);
  const int chunks = transposed ? rows / 8 * 16 : rows * 2;
  for (int i = 0; i < chunks; ++i) {
    const std::uint32_t address = transposed ? place.across_k(i % 16, i / 16) : place.along_k(i / 2, i % 2);
    const std::byte* from = block.shared_data_of(first, address, 16, 16, first.where);
    if (block.options.check_races)
      block.shadow.read_later(first.id, Block::kWarpgroup, block.shadow_offset(first.block, address), 16,
                              block.clocks.warpgroup(first.id), group, first.where);
    std::uint16_t elements[8];
    std::memcpy(elements, from, 16);
    for (int j = 0; j < 8; ++j) {
      const int row = transposed ? i / 16 * 8 + j : i / 2, k = transposed ? i % 16 : i % 2 * 8 + j;
      to[row * 16 + k] = to_float(elements[j]);
    }
  }
}

// The product is computed when all four warps have started it; threads receive it at their wait. A thread that has
// waited knows that the whole warpgroup's product is over, so one of them can tell others that its operands in shared
// memory are free.
inline void warpgroup_product(Block& block, int first_warp, void* const* args) {
  const Thread& first = block.thread(first_warp * Block::kWarp);
  const auto& of_first = *static_cast<const WarpgroupProductArgs*>(args[0]);
  const int columns = of_first.columns;
  std::vector<float>* sums[Block::kWarpgroup];
  float a[64][16], b_rows[256][16];
  for (int t = 0; t < Block::kWarpgroup; ++t) {
    Thread& thread = block.thread(first.id + t);
    const auto& mine = *static_cast<const WarpgroupProductArgs*>(args[t]);
    if (mine.b_place != of_first.b_place || mine.a_place != of_first.a_place)
      block.fail_for(&thread, "wgmma whose matrix descriptor differs from thread " + std::to_string(first.local) + "'s",
                     thread.where);
    if (thread.products.group() != first.products.group())
      block.fail_for(&thread, "wgmma after another number of wgmma_commit than thread " + std::to_string(first.local),
                     thread.where);
    if (const char* complaint = thread.products.start(mine.d, columns / 2, mine.a, sums[t]))
      block.fail_for(&thread, complaint, thread.where);
    if (!mine.a) continue;
    for (int i = 0; i < 8; ++i)  // as in mma.m16n8k16
      a[t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8][t % 4 * 2 + i % 2 + i / 4 * 8] =
          mine.to_float(std::uint16_t(mine.a[i / 2] >> (i % 2 * 16)));
  }
  const int group = first.products.group();
  if (!of_first.a)
    read_operand(block, first, of_first.a_place, of_first.transposed_a, 64, of_first.to_float, group, a[0]);
  read_operand(block, first, of_first.b_place, of_first.transposed_b, columns, of_first.to_float, group, b_rows[0]);
  double b[16][256];
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < columns; ++n) b[k][n] = b_rows[n][k];
  for (int m = 0; m < 64; ++m) {
    const int warp = m / 16, lane = m % 8 * 4, half = m / 8 % 2 * 2;
    double sum[256];
    const auto at = [&](int n) -> float& { return (*sums[warp * 32 + lane + n % 8 / 2])[n / 8 * 4 + half + n % 2]; };
    for (int n = 0; n < columns; ++n) sum[n] = at(n);
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < columns; ++n) sum[n] += double(a[m][k]) * b[k][n];
    for (int n = 0; n < columns; ++n) at(n) = toward_zero(sum[n]);
  }
  ++block.stats.wgmma[columns / 8];
}

struct ElectArgs {
  bool mine;
};
// One lane, always the same one of a warp; which, is the seed's choice.
inline void elect(Block& block, int, void* const* args) {
  const int chosen = int(block.options.seed * 13 % 32);
  for (int lane = 0; lane < 32; ++lane) static_cast<ElectArgs*>(args[lane])->mine = lane == chosen;
}
struct RegisterArgs {
  int count;
  bool more;
};
// setmaxnreg: what all warps have must fit, and a warpgroup's warps ask for the same (both checked when the block
// ends).
inline void set_registers(Block& block, int warp, void* const* args) {
  const auto& asked = *static_cast<const RegisterArgs*>(args[0]);
  block.set_registers(warp, asked.count, asked.more);
}

}  // namespace ddst::emu
