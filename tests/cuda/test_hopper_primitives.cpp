// What sm_90a adds, on the emulator, against the PTX manual. Layouts are written here element by element, from the
// manual's tables, so that a slip in the emulator's formulas does not repeat itself.
#include <cmath>

#include "hopper_samples.hpp"

using namespace ddst;
using namespace ddst::test;

namespace {

std::mt19937 rng(1);
using Words = std::vector<std::uint16_t>;

emu::Buffer input(const Words& from) {
  emu::Buffer buffer("input", from.size() * 2, emu::Buffer::Role::input);
  std::memcpy(buffer.host<char>(), from.data(), from.size() * 2);
  return buffer;
}
Words numbered(std::size_t count) {  // 1, 2, ...: zero is what lies outside
  Words words(count);
  for (std::size_t i = 0; i < count; ++i) words[i] = std::uint16_t(i + 1);
  return words;
}

// What a copy that one thread starts leaves in shared memory.
Words copied(std::size_t bytes, const std::function<void(Shared<Bf>, Shared<dev::Barrier>)>& copy,
             emu::Stats* stats = nullptr) {
  Words result(bytes / 2);
  emu::Block block;
  block.launch({1, 1, 1}, 32, bytes + 8, [&] {
    const auto shared = dev::dynamic_shared<Bf>();
    const auto arrived = (shared + int(bytes / 2)).as<dev::Barrier>();
    if (!dev::elect_one()) return;
    dev::barrier_init(arrived, 1);
    dev::fence_barrier_init();
    dev::barrier_arrive_expect(arrived, int(bytes));
    copy(shared, arrived);
    dev::barrier_wait(arrived, 0);
    for (int i = 0; i < int(bytes) / 16; ++i) {
      const dev::Words4 words = dev::load_words(shared + i * 8);
      std::memcpy(&result[std::size_t(i) * 8], &words, 16);
    }
  });
  if (stats) *stats = block.stats;
  return result;
}

// The place of element `e` of row `row` if rows of `swizzle` bytes (none: `e` counts on) follow each other.
std::size_t place(int row, int e, int row_elements, int swizzle) {
  const int chunk = e / 8, line = row * swizzle / 128;  // of 128 bytes
  return std::size_t(row * row_elements + (swizzle ? chunk ^ line % (swizzle / 16) : chunk) * 8 + e % 8);
}

void test_boxes() {
  constexpr int kImages = 3, kHeight = 5, kWidth = 7, kChannels = 72;
  const Words x = numbered(kImages * kHeight * kWidth * kChannels);
  auto buffer = input(x);
  for (const int swizzle : {0, 32, 64, 128})
    for (const int step : {1, 2})
      for (const int channel : {0, 8, 48}) {  // from 48 on, boxes of 32 and 64 leave the tensor
        const int inner = swizzle ? swizzle / 2 : 24, columns = 5, rows = 3, images = 2;
        auto map = cuda::patch_map(buffer.host<char>(), 2, kImages, kHeight, kWidth, kChannels,
                                   {inner, columns * step, rows, images}, swizzle);
        map.steps[1] = step;
        const int bytes = inner * 2 * columns * rows * images;
        emu::Stats stats;
        const int at[4] = {channel, -2, 3, 2};
        const Words found =
            copied(std::size_t((bytes + 7) / 8 * 8), [&](auto to, auto b) { dev::copy_box(to, &map, at, b); }, &stats);
        bool right = true;
        long inside = 0;
        for (int i = 0, row = 0; i < images; ++i)
          for (int h = 0; h < rows; ++h)
            for (int w = 0; w < columns; ++w, ++row)
              for (int c = 0; c < inner; ++c) {
                const int image = at[3] + i, y = at[2] + h, column = at[1] + w * step, from = at[0] + c;
                const bool there = image < kImages && y < kHeight && column >= 0 && column < kWidth && from < kChannels;
                inside += there;
                const std::uint16_t expected =
                    there ? x[std::size_t(((image * kHeight + y) * kWidth + column) * kChannels + from)] : 0;
                right = right && found[place(row, c, inner, swizzle)] == expected;
              }
        const std::string name = "box, swizzle " + std::to_string(swizzle) + ", step " + std::to_string(step);
        expect(right, name);
        expect(stats.bulk_bytes == inside * 2 && stats.bulk_bytes_written == bytes && stats.bulk_copies == 1,
               name + ": bytes");
      }
}

// Each tap of a convolution is one copy of its input pixels, for 32 output pixels in a row.
void test_columns() {
  constexpr int kImages = 2, kHeight = 5, kWidth = 6, kChannels = 32, kPixels = 32;
  const Words x = numbered(kImages * kHeight * kWidth * kChannels);
  auto buffer = input(x);
  for (const int kernel : {1, 3, 4})
    for (const int stride : {1, 2})
      for (const int padding : {0, kernel / 2}) {
        const auto map = cuda::column_map(buffer.host<char>(), 2, kImages, kHeight, kWidth, kChannels, {kernel, kernel},
                                          {stride, stride}, {padding, padding}, 16, kPixels, 32);
        const int wide = (kWidth + 2 * padding - kernel) / stride + 1,
                  high = (kHeight + 2 * padding - kernel) / stride + 1;
        for (const int first : {0, 5})
          for (int tap = 0; tap < kernel * kernel; tap += kernel + 1) {
            const int at[4] = {16, first % wide * stride - padding, first / wide % high * stride - padding,
                               first / (wide * high)};
            const int offset[2] = {tap % kernel, tap / kernel};
            const Words found =
                copied(kPixels * 32, [&](auto to, auto b) { dev::copy_im2col(to, &map, at, offset, b); });
            bool right = true;
            for (int p = 0; p < kPixels; ++p)
              for (int c = 0; c < 16; ++c) {
                const int out = first + p, image = out / (wide * high), y = out / wide % high * stride - padding,
                          column = out % wide * stride - padding;
                const int h = y + offset[1], w = column + offset[0];
                const bool there = image < kImages && h >= 0 && h < kHeight && w >= 0 && w < kWidth;
                const std::uint16_t expected =
                    there ? x[std::size_t(((image * kHeight + h) * kWidth + w) * kChannels + 16 + c)] : 0;
                right = right && found[place(p, c, 16, 32)] == expected;
              }
            expect(right, "im2col, kernel " + std::to_string(kernel) + ", stride " + std::to_string(stride) +
                              ", padding " + std::to_string(padding) + ", tap " + std::to_string(tap));
          }
      }
}

template <class T>
std::uint16_t rounded(float& value) {
  if constexpr (std::is_same_v<T, dev::bf16>) {
    const auto bits = emu::float_to_bf16(value);
    value = emu::bf16_to_float(bits);
    return bits;
  } else {
    const auto bits = emu::float_to_fp16(value);
    value = emu::fp16_to_float(bits);
    return bits;
  }
}

// An operand of `rows` rows (of m or n) and 16 along k in shared memory, as the manual's canonical layouts have it:
// where an element lies, and the descriptor that says so. Offsets are larger than they need to be.
struct Operand {
  int rows, swizzle;
  bool transposed;
  int leading() const { return transposed && swizzle ? 2 * 8 * swizzle * 2 : 128; }
  int stride() const { return swizzle ? 2 * 8 * swizzle : transposed ? 256 + 128 : 256; }
  int bytes() const {
    if (!swizzle) return rows / 8 * 384 + 1024;
    const int atoms = transposed ? (rows * 2 + swizzle - 1) / swizzle * 2 : (rows + 7) / 8;
    return atoms * 2 * 8 * swizzle;
  }
  int byte_of(int row, int k) const {
    int byte;
    if (!transposed)
      byte = row / 8 * stride() + (swizzle ? row % 8 * swizzle + k * 2 : row % 8 * 16 + k / 8 * leading() + k % 8 * 2);
    else if (!swizzle)
      byte = row / 8 * stride() + k / 8 * leading() + k % 8 * 16 + row % 8 * 2;
    else
      byte = row / (swizzle / 2) * leading() + row % (swizzle / 2) * 2 + k % 8 * swizzle + k / 8 * stride();
    if (!swizzle) return byte;
    return byte ^ byte / 128 % (swizzle / 16) * 16;
  }
  dev::MatrixDescriptor descriptor(int at) const {
    const std::uint32_t mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
    return {std::uint32_t(at / 16 | leading() / 16 << 16), std::uint32_t(stride() / 16) | mode << 30};
  }
};

template <class T, int kN, bool kTransposedA, bool kTransposedB>
void test_product(int swizzle_a, int swizzle_b, bool a_in_registers) {
  const Operand operand_a{64, swizzle_a, kTransposedA}, operand_b{kN, swizzle_b, kTransposedB};
  const int b_at = (operand_a.bytes() + 1023) / 1024 * 1024, bytes = b_at + operand_b.bytes();
  Words image(std::size_t(bytes) / 2, 0x7fff);  // NaN where nothing is meant to be read
  float a[64][16], b[kN][16], c[64][kN];
  Words a_bits(64 * 16);
  const auto fill = [&](float& value) { return rounded<T>(value = std::uniform_real_distribution<float>(-1, 1)(rng)); };
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 16; ++k)
      image[std::size_t(operand_a.byte_of(m, k)) / 2] = a_bits[std::size_t(m * 16 + k)] = fill(a[m][k]);
  for (int n = 0; n < kN; ++n)
    for (int k = 0; k < 16; ++k) image[std::size_t(b_at + operand_b.byte_of(n, k)) / 2] = fill(b[n][k]);
  for (auto& row : c)
    for (float& value : row) fill(value);
  auto buffer = input(image);
  std::vector<float> out(64 * kN);
  emu::Block block;
  block.launch({1, 1, 1}, 128, std::size_t(bytes) + 8, [&] {
    const int t = dev::thread_index(), lane = t % 32;
    const auto shared = dev::dynamic_shared<Bf>();
    const auto arrived = (shared + bytes / 2).as<dev::Barrier>();
    if (t == 0) {
      dev::barrier_init(arrived, 1);
      dev::fence_barrier_init();
      dev::barrier_arrive_expect(arrived, bytes);
      dev::copy_bytes(shared, dev::global_ptr<const Bf>(buffer), bytes, arrived);
    }
    dev::sync_threads();
    dev::barrier_wait(arrived, 0);
    // Element i of the four registers, and sum i, belong to these rows and columns.
    const auto row = [&](int i) { return t / 32 * 16 + lane / 4 + (i & 2) / 2 * 8; };
    std::uint32_t words[4] = {};
    for (int i = 0; i < 8; ++i)
      words[i / 2] |= std::uint32_t(a_bits[std::size_t(row(i) * 16 + lane % 4 * 2 + i % 2 + i / 4 * 8)]) << i % 2 * 16;
    float d[kN / 2];
    for (int i = 0; i < kN / 2; ++i) d[i] = c[row(i)][i / 4 * 8 + lane % 4 * 2 + i % 2];
    dev::wgmma_fence();
    if constexpr (!kTransposedA) {
      if (a_in_registers) dev::wgmma_k16<T, kN, kTransposedB>(d, words, operand_b.descriptor(b_at));
    }
    if (!a_in_registers)
      dev::wgmma_k16<T, kN, kTransposedA, kTransposedB>(d, operand_a.descriptor(0), operand_b.descriptor(b_at));
    dev::wgmma_commit();
    dev::wgmma_wait<0>();
    for (int i = 0; i < kN / 2; ++i) out[std::size_t(row(i) * kN + i / 4 * 8 + lane % 4 * 2 + i % 2)] = d[i];
  });
  double worst = 0;
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < kN; ++n) {
      double sum = c[m][n];
      for (int k = 0; k < 16; ++k) sum += double(a[m][k]) * b[n][k];
      worst = std::max(worst, std::abs(sum - out[std::size_t(m * kN + n)]));
      if (std::isnan(out[std::size_t(m * kN + n)])) worst = 1e9;
    }
  expect(worst < 4e-6 && block.stats.wgmma[kN / 8] == 1, "wgmma, N = " + std::to_string(kN) + ", swizzles " +
                                                             std::to_string(swizzle_a) + ' ' +
                                                             std::to_string(swizzle_b) + (kTransposedA ? ", A^T" : "") +
                                                             (kTransposedB ? ", B^T: " : ": ") + std::to_string(worst));
}

void test_products() {
  for (const int swizzle : {0, 32, 64, 128}) {
    test_product<dev::bf16, 8, false, false>(0, swizzle, true);
    test_product<dev::bf16, 16, false, false>(0, swizzle, true);
    test_product<dev::fp16, 16, false, true>(0, swizzle == 0 ? 0 : 32, true);
    test_product<dev::fp16, 64, false, false>(swizzle, 32, false);
    test_product<dev::bf16, 64, false, true>(swizzle, swizzle, false);
    test_product<dev::bf16, 64, true, false>(swizzle, 128, false);
    test_product<dev::fp16, 128, true, true>(swizzle, swizzle, false);
    test_product<dev::bf16, 256, false, true>(0, swizzle, true);
  }
}

// A pattern that does not begin at a multiple of its size needs the base offset.
void test_base_offset() {
  const auto along = [](std::uint64_t base, int row) {
    const std::uint64_t start = 3 * 128 / 16, stride = 1024 / 16;
    return emu::MatrixPlace(start | stride << 32 | base << 49 | std::uint64_t(1) << 62).along_k(row, 0);
  };
  for (int row = 0; row < 16; ++row) {
    expect(along(3, row) == std::uint32_t(384 + row / 8 * 1024 + row % 8 * 128 + row % 8 * 16), "base offset 3");
    expect(along(0, row) == std::uint32_t(384 + row / 8 * 1024 + row % 8 * 128 + (row + 3) % 8 * 16), "base offset 0");
  }
}

// Sums and operands of two groups; the first arrives at the wait that leaves one.
void test_groups() {
  auto ones = input(Words(256, emu::float_to_bf16(1)));
  emu::Block().launch({1, 1, 1}, 128, 512 + 8, [&] {
    const auto shared = dev::dynamic_shared<Bf>();
    const auto arrived = (shared + 256).as<dev::Barrier>();
    if (dev::thread_index() == 0) {
      dev::barrier_init(arrived, 1);
      dev::fence_barrier_init();
      dev::barrier_arrive_expect(arrived, 512);
      dev::copy_bytes(shared, dev::global_ptr<const Bf>(ones), 512, arrived);
    }
    dev::sync_threads();
    dev::barrier_wait(arrived, 0);
    const std::uint32_t a[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
    float first[8] = {}, second[8] = {};
    const auto b = dev::matrix_descriptor<32>(shared, 16, 256);
    dev::wgmma_fence();
    dev::wgmma_k16<Bf, 16, false>(first, a, b);
    dev::wgmma_k16<Bf, 16, true>(first, a, b);
    dev::wgmma_commit();
    dev::wgmma_k16<Bf, 16, false>(second, a, b);
    dev::wgmma_commit();
    dev::wgmma_wait<1>();
    const bool one = first[7] == 32 && second[0] != second[0];
    dev::wgmma_wait<0>();
    if (!one || second[7] != 16) emu::Block::current->fail("groups", emu::Where::current());
  });
  expect(true, "groups");
}

void test_threads() {
  int elected = 0, ranks = 0;
  for (const std::uint64_t seed : {0, 7}) {
    emu::Block block;
    block.options.seed = seed;
    block.launch(
        {4, 1, 1}, 64, 0,
        [&] {
          for (int i = 0; i < 3; ++i) elected += dev::elect_one();
          if (dev::thread_index() == 0)
            ranks += dev::cluster_rank() * 10 + (dev::block_index_x() % 2 == dev::cluster_rank());
        },
        2);
  }
  expect(elected == 2 * 4 * 2 * 3, "one lane of each warp is elected, each time");
  expect(ranks == 2 * (2 * 10 + 4), "ranks");
}

// Barriers of some warps order what these warps did, and nothing else.
void test_some_threads() {
  const auto kernel = [](int first, int count) {
    return [=] {
      emu::Block().launch({1, 1, 1}, 96, 128, [=] {
        const int t = dev::thread_index();
        const auto shared = dev::dynamic_shared<int>();
        if (t == 0) dev::store(shared, 1);
        if (t / 32 >= first && t / 32 < first + count) dev::sync_some<3>(count * 32);
        if (t == 40) dev::load(shared);
      });
    };
  };
  kernel(0, 2)();
  expect_caught("barrier of other warps", "read after write", kernel(1, 2));
}

void test_counts() {
  const emu::Stats stats = SampleProblem().ring({});
  constexpr long kStages = 2 * 2 * SampleProblem::kSlices;  // of four CTAs
  expect(stats.wgmma[2] == kStages && stats.bulk_copies == 2 * kStages, "products and copies");
  expect(stats.bulk_bytes == kStages * (2048 + 256) && stats.bulk_bytes_written == kStages * (2048 + 512),
         "weights are read once for both CTAs");
  expect(stats.barrier_arrivals == kStages * (1 + 4) && stats.remote_arrivals == kStages * 4, "arrivals");
  constexpr long kDrained = 4 * 2 * 32;  // waits for stages that are not filled again, of lanes
  expect(
      stats.barrier_waits == kStages * 160 + kDrained && stats.ldmatrix == kStages * 4 && stats.ldmatrix_conflicts == 0,
      "waits, ldmatrix");
}

}  // namespace

int main() {
  test_boxes();
  test_columns();
  test_products();
  test_base_offset();
  test_groups();
  test_threads();
  test_some_threads();
  test_counts();
  return finish("hopper primitives");
}
