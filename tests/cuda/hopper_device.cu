// What sm_90a adds, against results computed on the host: on a GPU when nvcc compiles it (make gpu), on the emulator
// when g++ does (tests/cuda/test_cuda_primitives.py).
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -Icsrc/cuda tests/cuda/hopper_device.cu -o /tmp/hopper &&
//   /tmp/hopper
#include "hopper_probes.hpp"

// Two CTAs copy half of a box each, to both.
DDST_KERNEL(32, 1) multicast_probe(DDST_GRID_CONSTANT dev::TensorMap map, In, Out out, Ask ask) {
  const auto shared = dev::dynamic_shared<dev::bf16>();
  const auto arrived = barriers();
  const int rank = dev::cluster_rank();
  if (dev::elect_one()) {
    dev::barrier_init(arrived, 1);
    dev::fence_barrier_init();
  }
  dev::cluster_sync();
  if (dev::elect_one()) {
    dev::barrier_arrive_expect(arrived, ask.bytes);
    const int at[2] = {0, rank * ask.at[1]};
    dev::copy_box_to_all(shared + rank * (ask.bytes / 4), &map, at, arrived, 3);
  }
  dev::sync_warp();
  dev::barrier_wait(arrived, 0);
  write_out(shared, out + rank * (ask.bytes / 4), ask.bytes, 32);
  dev::cluster_sync();  // nobody leaves while what it copies to the other one is on its way
}

// A copying warp and two warpgroups that add up rows, over a ring of two stages; CTAs wait for each other's consumers.
// Threads begin with 168 registers. The sums need more: without the increase they would not be there.
constexpr int kSums = 184;
static_assert(dev::registers_at_entry(384) < kSums && dev::registers_fit(384, 256, 240, 24));
DDST_KERNEL(384, 1) ring_probe(DDST_GRID_CONSTANT dev::TensorMap map, In, Out out, Ask ask) {
  const auto shared = dev::dynamic_shared<dev::bf16>();
  const auto full = barriers(), empty = full + 2;
  const int warp = dev::warp_index(), rank = dev::cluster_rank();
  if (warp == 0 && dev::elect_one()) {
    for (int i = 0; i < 2; ++i) dev::barrier_init(full + i, 1), dev::barrier_init(empty + i, 2);
    dev::fence_barrier_init();
  }
  dev::cluster_sync();
  if (warp >= 8) {
    dev::give_registers<24>();
    for (int i = 0; warp == 8 && i < ask.kind + 2; ++i) {  // two more: the other CTA's last arrivals have landed
      dev::barrier_wait(empty + i % 2, (i / 2 & 1) ^ 1);
      if (i < ask.kind && dev::elect_one()) {
        dev::barrier_arrive_expect(full + i % 2, 512);
        const int at[2] = {0, 2 * i + rank};
        dev::copy_box(shared + i % 2 * 256, &map, at, full + i % 2);
      }
    }
  } else {
    dev::take_registers<240>();
    std::uint32_t sums[kSums] = {}, all = 0;
    for (int i = 0; i < ask.kind; ++i) {
      dev::barrier_wait(full + i % 2, i / 2 & 1);
      const auto word = dev::load((shared + (i % 2 * 256 + dev::thread_index() % 128 * 2)).as<std::uint32_t>());
      DDST_UNROLL
      for (int k = 0; k < kSums; ++k) sums[k] = sums[k] * std::uint32_t(2 * k + 3) + word;
      dev::sync_some<1>(256);
      if (warp == 0 && dev::elect_one()) {
        dev::barrier_arrive(empty + i % 2);
        dev::barrier_arrive_at(empty + i % 2, rank ^ 1);
      }
    }
    DDST_UNROLL
    for (int k = 0; k < kSums; ++k) all ^= sums[k];
    dev::store(out + (rank * 256 + dev::thread_index()), all);
  }
}

// d = c + a b of one wgmma. `in`: an image of shared memory, then of each thread the words of a and the sums.
template <class T, int kN, bool kTransposedA, bool kTransposedB, bool kRegisters, int kSwizzleA, int kSwizzleB>
DDST_KERNEL(128, 1)
product_probe(DDST_GRID_CONSTANT dev::TensorMap, In in, Out out, Ask ask) {
  const auto shared = dev::dynamic_shared<T>();
  const auto arrived = barriers();
  const int thread = dev::thread_index();
  if (dev::warp_index() == 0 && dev::elect_one()) {
    dev::barrier_init(arrived, 1);
    dev::fence_barrier_init();
    dev::barrier_arrive_expect(arrived, ask.bytes);
    dev::copy_bytes(shared.template as<std::uint32_t>(), in, ask.bytes, arrived);
  }
  dev::sync_threads();
  const In mine = in + (ask.bytes / 4 + thread * (4 + kN / 2));
  std::uint32_t a[4];
  float d[kN / 2];
  for (int i = 0; i < 4; ++i) a[i] = dev::load(mine + i);
  for (int i = 0; i < kN / 2; ++i) d[i] = dev::float_of(dev::load(mine + (4 + i)));
  dev::barrier_wait(arrived, 0);
  const auto b = dev::matrix_descriptor<kSwizzleB>(shared + ask.at[0] / 2, ask.at[3], ask.at[4]);
  dev::wgmma_fence();
  if constexpr (kRegisters) {
    dev::wgmma_k16<T, kN, kTransposedB>(d, a, b);
  } else {
    const auto place = dev::matrix_descriptor<kSwizzleA>(shared, ask.at[1], ask.at[2]);
    dev::wgmma_k16<T, kN, kTransposedA, kTransposedB>(d, place, b);
  }
  dev::wgmma_commit();
  dev::wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) dev::store(out + (thread * (kN / 2) + i), dev::float_bits(d[i]));
}

// ---- checks ----

void check_boxes() {
  for (const int swizzle : {0, 32, 64, 128})
    for (const int step : {1, 2})
      for (const int channel : {0, 48}) {  // from 48 on, boxes of 32 and 64 leave the tensor
        const int inner = swizzle ? swizzle / 2 : 24, columns = 5, rows = 3, images = 2;
        cuda::TensorMap map = cuda::patch_map(nullptr, 2, kImages, kHeight, kWidth, kChannels,
                                              {inner, columns * step, rows, images}, swizzle);
        map.steps[1] = step;
        const int bytes = int(cuda::copied_bytes(map));
        const Words found = run(copy_probe, 1, 32, kTensor, std::size_t(bytes) / 4, map,
                                {kBox4, bytes, {channel, -2, 3, 2, 0}, {0, 0}});
        bool right = true;
        for (int row = 0; row < columns * rows * images; ++row)
          for (int c = 0; c < inner; ++c)
            right = right && half(found, place(row, c, inner, swizzle)) ==
                                 element(2 + row / columns / rows, 3 + row / columns % rows, -2 + row % columns * step,
                                         channel + c);
        expect(right, "box, swizzle " + std::to_string(swizzle) + ", step " + std::to_string(step) + ", channel " +
                          std::to_string(channel));
      }
}

// Corners that are not alike tell in which order the driver takes them.
void check_columns() {
  constexpr int kPixels = 32;
  for (const int stride : {1, 2})
    for (const int tap : {0, 5, 11}) {
      const int kernel[2] = {4, 3}, strides[2] = {stride, 1}, padding[2] = {2, 1};  // of width, height
      const cuda::TensorMap map =
          cuda::column_map(nullptr, 2, kImages, kHeight, kWidth, kChannels, kernel, strides, padding, 16, kPixels, 32);
      const int wide = (kWidth + 4 - 4) / stride + 1, high = kHeight + 2 - 3 + 1, first = 3;
      const Ask ask{
          kIm2col, kPixels * 32, {16, first % wide * stride - 2, first / wide % high - 1, 0, 0}, {tap % 4, tap / 4}};
      const Words found = run(copy_probe, 1, 32, kTensor, kPixels * 8, map, ask);
      bool right = true;
      for (int p = 0; p < kPixels; ++p)
        for (int c = 0; c < 16; ++c) {
          const int out = first + p;
          right =
              right && half(found, place(p, c, 16, 32)) == element(out / (wide * high), out / wide % high - 1 + tap / 4,
                                                                   out % wide * stride - 2 + tap % 4, 16 + c);
        }
      expect(right, "im2col, stride " + std::to_string(stride) + ", tap " + std::to_string(tap));
    }
}

void check_blocks_and_bytes() {
  const Halves rows = numbered(40 * 64);
  cuda::TensorMap map = cuda::matrix_map(nullptr, 2, 40, 64, 16, 16, cuda::kSwizzle32);
  const Words block = run(copy_probe, 1, 32, rows, 128, map, {kBox2, 512, {32, 30, 0, 0, 0}, {0, 0}});
  bool right = true;
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c)
      right =
          right && half(block, place(r, c, 16, 32)) == (30 + r < 40 ? rows[std::size_t((30 + r) * 64 + 32 + c)] : 0);
  expect(right, "the columns of a block; rows behind the last one are zero");

  map.rank = 3, map.sizes[0] = 16, map.sizes[2] = 4, map.strides[2] = 32, map.box[2] = 4, map.steps[2] = 1;
  const Words granules = run(copy_probe, 1, 32, rows, 512, map, {kBox3, 2048, {0, 8, 0, 0, 0}, {0, 0}});
  right = true;
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 64; ++c)
      right = right && half(granules, place(c / 16 * 16 + r, c % 16, 16, 32)) == rows[std::size_t((8 + r) * 64 + c)];
  expect(right, "rows of a block as granules");

  const Words bytes = run(copy_probe, 1, 32, rows, 64, map, {kBytes, 256, {8, 0, 0, 0, 0}, {0, 0}});
  right = true;
  for (std::size_t i = 0; i < 128; ++i) right = right && half(bytes, i) == rows[16 + i];
  expect(right, "bytes in a row");

  map = cuda::matrix_map(nullptr, 2, 40, 64, 8, 64, cuda::kSwizzle128);
  const Words both = run(multicast_probe, 2, 32, rows, 2 * 512, map, {0, 2048, {0, 8, 0, 0, 0}, {0, 0}});
  right = true;
  for (int rank = 0; rank < 2; ++rank)
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < 64; ++c)
        right = right && half(both, std::size_t(rank) * 1024 + place(r, c, 64, 128)) == rows[std::size_t(r * 64 + c)];
  expect(right, "halves that two CTAs copy to both");

  constexpr int kRounds = 9;
  const Halves many = numbered(2 * kRounds * 256);
  map = cuda::matrix_map(nullptr, 2, 2 * kRounds, 256, 1, 256, cuda::kSwizzleNone);
  const Words found = run(ring_probe, 2, 384, many, 512, map, {kRounds, 0, {}, {0, 0}});
  right = true;
  for (std::size_t rank = 0; rank < 2; ++rank)
    for (std::size_t t = 0; t < 256; ++t) {
      std::uint32_t all = 0;
      for (std::uint32_t k = 0; k < kSums; ++k) {
        std::uint32_t sum = 0;
        for (std::size_t i = 0; i < kRounds; ++i) {
          const std::size_t at = (2 * i + rank) * 256 + t % 128 * 2;
          sum = sum * (2 * k + 3) + (std::uint32_t(many[at]) | std::uint32_t(many[at + 1]) << 16);
        }
        all ^= sum;
      }
      right = right && found[rank * 256 + t] == all;
    }
  expect(right, "a ring of two stages, whose phases take turns");
}

// An operand of rows (of m or n) and 16 along k, in swizzled patterns of 8 rows, of either direction.
struct Operand {
  int rows, swizzle;
  bool transposed;
  int leading() const { return transposed ? 16 * swizzle : 16; }
  int stride() const { return 8 * swizzle; }
  int bytes() const { return transposed ? (rows * 2 + swizzle - 1) / swizzle * leading() : rows * swizzle; }
  int byte_of(int row, int k) const {
    const int byte =
        transposed ? row / (swizzle / 2) * leading() + row % (swizzle / 2) * 2 + k * swizzle : row * swizzle + k * 2;
    return byte ^ byte / 128 % (swizzle / 16) * 16;
  }
};

template <class T, int kN, bool kTransposedA, bool kTransposedB, bool kRegisters, int kSwizzleA, int kSwizzleB>
void check_product() {
  const Operand a{64, kSwizzleA, kTransposedA}, b{kN, kSwizzleB, kTransposedB};
  const int b_at = (a.bytes() + 1023) / 1024 * 1024, bytes = b_at + (b.bytes() + 1023) / 1024 * 1024;
  Halves in(std::size_t(bytes) / 2 + 128 * (4 + kN / 2) * 2, 0);
  const auto value = [](int which, int row, int k) { return (row * 7 + k * 5 + which * 3) % 9 - 4; };
  for (int k = 0; k < 16; ++k) {
    for (int m = 0; m < 64; ++m) in[std::size_t(a.byte_of(m, k)) / 2] = bits_of<T>(value(0, m, k));
    for (int n = 0; n < kN; ++n) in[std::size_t(b_at + b.byte_of(n, k)) / 2] = bits_of<T>(value(1, n, k));
  }
  const auto row = [](int t, int i) { return t / 32 * 16 + t % 32 / 4 + (i & 2) / 2 * 8; };
  const auto column = [](int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; };
  for (int t = 0; t < 128; ++t) {
    std::uint16_t* mine = &in[std::size_t(bytes) / 2 + std::size_t(t) * (4 + kN / 2) * 2];
    for (int i = 0; i < 8; ++i) mine[i] = bits_of<T>(value(0, row(t, i), t % 4 * 2 + i % 2 + i / 4 * 8));
    for (int i = 0; i < kN / 2; ++i) {
      const float c = float(row(t, i) - column(t, i));
      std::memcpy(mine + 8 + i * 2, &c, 4);
    }
  }
  const cuda::TensorMap unused = cuda::matrix_map(nullptr, 2, 8, 16, 8, 16, cuda::kSwizzle32);
  const Words out = run(product_probe<T, kN, kTransposedA, kTransposedB, kRegisters, kSwizzleA, kSwizzleB>, 1, 128, in,
                        std::size_t(128) * kN / 2, unused,
                        {0, bytes, {b_at, a.leading(), a.stride(), b.leading(), b.stride()}, {0, 0}});
  bool right = true;
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < kN / 2; ++i) {
      int sum = row(t, i) - column(t, i);
      for (int k = 0; k < 16; ++k) sum += value(0, row(t, i), k) * value(1, column(t, i), k);
      float got;
      std::memcpy(&got, &out[std::size_t(t) * kN / 2 + std::size_t(i)], 4);
      right = right && got == float(sum);
    }
  expect(right, "wgmma, N = " + std::to_string(kN) + ", swizzle " + std::to_string(kSwizzleB) +
                    (kRegisters ? ", A in registers" : "") + (kTransposedA ? ", A along m" : "") +
                    (kTransposedB ? ", B along n" : ""));
}

int main() {
  check_boxes();
  check_columns();
  check_blocks_and_bytes();
  check_product<dev::bf16, 16, false, false, true, 32, 32>();
  check_product<dev::bf16, 16, false, true, true, 32, 32>();
  check_product<dev::fp16, 16, false, false, true, 32, 64>();
  check_product<dev::bf16, 64, false, false, true, 32, 32>();
  check_product<dev::bf16, 64, false, true, true, 32, 32>();
  check_product<dev::fp16, 64, true, true, false, 128, 128>();
  check_product<dev::bf16, 32, true, false, false, 64, 32>();
  check_product<dev::bf16, 128, false, false, false, 32, 128>();
  std::printf("sm_90a's primitives on %s: %d checks, %d failures\n", kWhere, checks, failures);
  return failures != 0;
}
