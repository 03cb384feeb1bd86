// What the kernels for sm_90a, and the emulator with them, take for granted where the manual is short: a GPU tells
// (make gpu), and the emulator must agree (tests/cuda/test_cuda_primitives.py).
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -Icsrc/cuda tests/cuda/hopper_assumptions_device.cu
//     -o /tmp/assumptions && /tmp/assumptions
#include "hopper_probes.hpp"

// ---- kernels ----

// Bytes that land before they are expected, then a phase that expects none.
DDST_KERNEL(32, 1) late_probe(DDST_GRID_CONSTANT dev::TensorMap map, In, Out out, Ask ask) {
  const auto shared = dev::dynamic_shared<dev::bf16>();
  const auto early = barriers(), usual = early + 1;
  const auto second = shared + ask.bytes / 2;
  const int at[2] = {ask.at[0], ask.at[1]}, other[2] = {ask.at[2], ask.at[3]};
  if (dev::elect_one()) {
    dev::barrier_init(early, 1), dev::barrier_init(usual, 1);
    dev::fence_barrier_init();
    dev::copy_box(shared, &map, at, early);
    dev::barrier_arrive_expect(usual, ask.bytes);
    dev::copy_box(second, &map, other, usual);
  }
  dev::sync_warp();
  dev::barrier_wait(usual, 0);  // by now the first box has most likely landed, too
  if (dev::elect_one()) dev::barrier_arrive_expect(early, ask.bytes);
  dev::barrier_wait(early, 0);
  dev::sync_warp();
  if (dev::elect_one()) dev::barrier_arrive_expect(early, 0);
  dev::barrier_wait(early, 1);
  write_out(shared, out, 2 * ask.bytes, 32);
}

// Two CTAs copy half of the bytes each, to both, before either expects any; then the first one copies a box that lies
// outside of the tensor over what both have. ask.at: that box.
DDST_KERNEL(32, 1) peer_probe(DDST_GRID_CONSTANT dev::TensorMap map, In, Out out, Ask ask) {
  const auto shared = dev::dynamic_shared<dev::bf16>();
  const auto halves = barriers(), own = halves + 1, outside = halves + 2, ready = halves + 3;
  const int rank = dev::cluster_rank(), box = ask.bytes / 2;  // elements
  const auto third = shared + 2 * box;
  if (dev::elect_one()) {
    dev::barrier_init(halves, 1), dev::barrier_init(own, 1), dev::barrier_init(outside, 1), dev::barrier_init(ready, 2);
    dev::fence_barrier_init();
  }
  dev::cluster_sync();
  if (dev::elect_one()) {
    const int at[2] = {0, 8 * rank}, full_of_numbers[2] = {0, 16};
    dev::copy_box_to_all(shared + rank * box, &map, at, halves, 3);
    dev::barrier_arrive_expect(own, ask.bytes);
    dev::copy_box(third, &map, full_of_numbers, own);
  }
  dev::sync_warp();
  dev::barrier_wait(own, 0);
  dev::sync_warp();
  if (dev::elect_one()) {
    dev::barrier_arrive_expect(outside, ask.bytes);
    dev::barrier_arrive_at(ready, 0);
    dev::barrier_arrive_expect(halves, 2 * ask.bytes);
  }
  dev::barrier_wait(halves, 0);
  if (rank == 0) {
    dev::barrier_wait(ready, 0);
    const int at[2] = {ask.at[0], ask.at[1]};
    if (dev::elect_one()) dev::copy_box_to_all(third, &map, at, outside, 3);
  }
  dev::sync_warp();
  dev::barrier_wait(outside, 0);
  write_out(shared, out + rank * (3 * ask.bytes / 4), 3 * ask.bytes, 32);
  dev::cluster_sync();  // nobody leaves while what it copies to the other one is on its way
}

// The sum of kGroups products a b, each in a group of its own and the next one's a loaded into the other set of
// registers meanwhile. The tensor copy writes the bs from byte ask.at[0] on. `in`: the bs, then each thread's words of
// the as.
template <class T, int kN, int kSwizzle, bool kTransposed, int kGroups>
DDST_KERNEL(128, 1)
groups_probe(DDST_GRID_CONSTANT dev::TensorMap map, In in, Out out, Ask ask) {
  constexpr int kRows = kTransposed ? 16 : kN, kBytes = kRows * kSwizzle;
  const auto shared = dev::dynamic_shared<T>() + ask.at[0] / 2;
  const auto arrived = barriers();
  const int thread = dev::thread_index();
  if (dev::warp_index() == 0 && dev::elect_one()) {
    dev::barrier_init(arrived, 1);
    dev::fence_barrier_init();
    dev::barrier_arrive_expect(arrived, kGroups * kBytes);
    for (int g = 0; g < kGroups; ++g) {
      const int at[2] = {0, g * kRows};
      dev::copy_box(shared + g * (kBytes / 2), &map, at, arrived);
    }
  }
  dev::sync_threads();
  const In mine = in + (ask.bytes / 4 + thread * kGroups * 4);
  std::uint32_t a[2][4];
  float d[kN / 2] = {};
  dev::barrier_wait(arrived, 0);
  auto b = dev::matrix_descriptor<kSwizzle>(shared, kBytes, 8 * kSwizzle);
  DDST_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    DDST_UNROLL
    for (int i = 0; i < 4; ++i) a[g % 2][i] = dev::load(mine + (g * 4 + i));
    dev::wgmma_fence();
    dev::wgmma_k16<T, kN, kTransposed>(d, a[g % 2], b);
    dev::wgmma_commit();
    dev::wgmma_wait<1>();
    b = b + kBytes;
  }
  dev::wgmma_wait<0>();
  DDST_UNROLL
  for (int i = 0; i < kN / 2; ++i) dev::store(out + (thread * (kN / 2) + i), dev::float_bits(d[i]));
}

// ---- checks ----

// Boxes that begin at odd places outside of the tensor and take every second or third column and row. A box may end
// with its last element or a whole step after it.
void check_steps() {
  constexpr int kColumns = 4, kRows = 4;
  for (const int step : {2, 3})
    for (const bool whole : {true, false}) {
      const int columns = whole ? kColumns * step : (kColumns - 1) * step + 1;
      const int rows = whole ? kRows * 2 : (kRows - 1) * 2 + 1;
      cuda::TensorMap map =
          cuda::patch_map(nullptr, 2, kImages, kHeight, kWidth, kChannels, {16, columns, rows, 2}, cuda::kSwizzle32);
      map.steps[1] = step, map.steps[2] = 2;
      const int bytes = 2 * kRows * kColumns * 32;
      expect(cuda::copied_bytes(map) == bytes, "bytes of a box with steps");
      const Words found =
          run(copy_probe, 1, 32, kTensor, std::size_t(bytes) / 4, map, {kBox4, bytes, {16, -1, -3, 1, 0}, {0, 0}});
      bool right = true;
      for (int pixel = 0; pixel < 2 * kRows * kColumns; ++pixel)
        for (int c = 0; c < 16; ++c)
          right = right && half(found, place(pixel, c, 16, 32)) == element(1 + pixel / kColumns / kRows,
                                                                           -3 + pixel / kColumns % kRows * 2,
                                                                           -1 + pixel % kColumns * step, 16 + c);
      expect(right, "box from (-1, -3) on, steps " + std::to_string(step) + " and 2, ends " +
                        (whole ? "after a whole step" : "with its last element"));
    }
}

// Rows `first` ... `first` + 7 of a matrix of 64 columns, as they lie at byte `at` of what was found.
bool rows_are(const Words& found, std::size_t at, const Halves& matrix, int first) {
  bool right = true;
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 64; ++c) {
      const std::uint16_t expected = first < 0 ? 0 : matrix[std::size_t((first + r) * 64 + c)];
      right = right && half(found, at / 2 + place(r, c, 64, 128)) == expected;
    }
  return right;
}

void check_barriers() {
  constexpr int kBytes = 1024;
  const Halves rows = numbered(24 * 64);
  const cuda::TensorMap map = cuda::matrix_map(nullptr, 2, 24, 64, 8, 64, cuda::kSwizzle128);
  const Words late = run(late_probe, 1, 32, rows, 2 * kBytes / 4, map, {0, kBytes, {0, 8, 0, 16, 0}, {0, 0}});
  expect(rows_are(late, 0, rows, 8) && rows_are(late, kBytes, rows, 16),
         "bytes are expected after they may have landed; none are");
  const int outside[3][2] = {{0, 24}, {0, -8}, {64, 0}};
  for (const auto& at : outside) {
    const Words found = run(peer_probe, 2, 32, rows, 6 * kBytes / 4, map, {0, kBytes, {at[0], at[1], 0, 0, 0}, {0, 0}});
    for (const std::size_t rank : {0, 1}) {
      const std::size_t begin = rank * 3 * kBytes;
      const std::string name = "CTA " + std::to_string(rank) + ": ";
      expect(rows_are(found, begin, rows, 0) && rows_are(found, begin + kBytes, rows, 8),
             name + "the other one's bytes come before they are expected");
      expect(rows_are(found, begin + 2 * kBytes, rows, -1), name + "a box for both from column " +
                                                                std::to_string(at[0]) + ", row " +
                                                                std::to_string(at[1]) + " on, outside of the tensor");
    }
  }
}

template <class T, int kN, int kSwizzle, bool kTransposed, int kGroups>
void check_groups(int at) {
  constexpr int kRows = kTransposed ? 16 : kN, kRow = kSwizzle / 2;  // of a copy; elements of one
  static_assert(!kTransposed || kN == kRow);
  const auto value = [](int which, int group, int i, int k) { return (i * 7 + k * 5 + group * 2 + which * 3) % 9 - 4; };
  const int bytes = kGroups * kRows * kSwizzle;
  Halves in(std::size_t(bytes) / 2 + 128 * kGroups * 8, 0);
  for (int g = 0; g < kGroups; ++g)
    for (int n = 0; n < kN; ++n)
      for (int k = 0; k < 16; ++k)
        in[std::size_t(kTransposed ? (g * kRows + k) * kRow + n : (g * kRows + n) * kRow + k)] =
            bits_of<T>(value(1, g, n, k));
  const auto row = [](int t, int i) { return t / 32 * 16 + t % 32 / 4 + (i & 2) / 2 * 8; };
  for (int t = 0; t < 128; ++t)
    for (int g = 0; g < kGroups; ++g)
      for (int i = 0; i < 8; ++i)
        in[std::size_t(bytes) / 2 + std::size_t((t * kGroups + g) * 8 + i)] =
            bits_of<T>(value(0, g, row(t, i), t % 4 * 2 + i % 2 + i / 4 * 8));
  const cuda::TensorMap map = cuda::matrix_map(nullptr, 2, kGroups * kRows, kRow, kRows, kRow, kSwizzle);
  const Words out = run(groups_probe<T, kN, kSwizzle, kTransposed, kGroups>, 1, 128, in, std::size_t(128) * kN / 2, map,
                        {0, bytes, {at, 0, 0, 0, 0}, {0, 0}});
  bool right = true;
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < kN / 2; ++i) {
      int sum = 0;
      for (int g = 0; g < kGroups; ++g)
        for (int k = 0; k < 16; ++k) sum += value(0, g, row(t, i), k) * value(1, g, i / 4 * 8 + t % 4 * 2 + i % 2, k);
      float got;
      std::memcpy(&got, &out[std::size_t(t) * kN / 2 + std::size_t(i)], 4);
      right = right && got == float(sum);
    }
  expect(right, std::to_string(kGroups) + " groups of products, N = " + std::to_string(kN) + ", B copied to byte " +
                    std::to_string(at) + (kTransposed ? ", along n" : "") + ", swizzle " + std::to_string(kSwizzle));
}

int main() {
  check_steps();
  check_barriers();
  check_groups<dev::bf16, 16, 32, false, 1>(256);
  check_groups<dev::bf16, 16, 32, true, 1>(256);
  check_groups<dev::bf16, 64, 32, false, 1>(512 + 256);
  check_groups<dev::fp16, 16, 64, false, 1>(512);
  check_groups<dev::fp16, 32, 64, true, 1>(512);
  check_groups<dev::bf16, 16, 32, false, 5>(512);
  check_groups<dev::bf16, 16, 32, true, 5>(256);
  std::printf("what sm_90a's kernels take for granted, on %s: %d checks, %d failures\n", kWhere, checks, failures);
  return failures != 0;
}
