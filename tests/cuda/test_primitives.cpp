// The emulator against the PTX manual. Layouts are written here the other way round (element -> lane, register), so
// that a slip in the emulator's formulas does not repeat itself.
#include <random>

#include "check.hpp"
#include "device/primitives.cuh"

using namespace ddst;

namespace {

std::mt19937 rng(1);
float uniform() { return std::uniform_real_distribution<float>(-1, 1)(rng); }

struct Place {
  int lane, reg, half;
};
Place a16(int row, int k) { return {row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2}; }
Place b16(int k, int n) { return {n * 4 + k % 8 / 2, k / 8, k % 2}; }
Place a8(int row, int k) { return {row % 8 * 4 + k % 4, row / 8 + k / 4 * 2, 0}; }
Place b8(int k, int n) { return {n * 4 + k % 4, k / 4, 0}; }
Place c(int row, int n) { return {row % 8 * 4 + n / 2, row / 8 * 2 + n % 2, 0}; }

void one_warp(std::size_t shared_bytes, const std::function<void()>& kernel) {
  emu::Block().launch({1, 1, 1}, 32, shared_bytes, kernel);
}

template <class T, int K>
void test_mma(const char* name) {
  float a[16][K], b[K][8], c0[16][8];
  std::uint32_t ra[32][4] = {}, rb[32][2] = {};
  float rc[32][4];
  const auto bits = [](float& v) -> std::uint32_t {
    if constexpr (std::is_same_v<T, float>) {
      v = emu::float_to_tf32(v);
      return std::bit_cast<std::uint32_t>(v);
    } else if constexpr (std::is_same_v<T, dev::bf16>) {
      const auto u = emu::float_to_bf16(v);
      v = emu::bf16_to_float(u);
      return u;
    } else {
      const auto u = emu::float_to_fp16(v);
      v = emu::fp16_to_float(u);
      return u;
    }
  };
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < K; ++k) {
      const Place p = K == 16 ? a16(m, k) : a8(m, k);
      ra[p.lane][p.reg] |= bits(a[m][k] = uniform()) << (16 * p.half);
    }
  for (int k = 0; k < K; ++k)
    for (int n = 0; n < 8; ++n) {
      const Place p = K == 16 ? b16(k, n) : b8(k, n);
      rb[p.lane][p.reg] |= bits(b[k][n] = uniform()) << (16 * p.half);
    }
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) rc[c(m, n).lane][c(m, n).reg] = c0[m][n] = uniform();
  one_warp(0, [&] {
    const int lane = dev::thread_index();
    if constexpr (K == 16)
      dev::mma_m16n8k16<T>(rc[lane], ra[lane], rb[lane]);
    else
      dev::mma_m16n8k8_tf32(rc[lane], ra[lane], rb[lane]);
  });
  double worst = 0;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      double sum = c0[m][n];
      for (int k = 0; k < K; ++k) sum += double(a[m][k]) * b[k][n];
      worst = std::max(worst, std::abs(sum - rc[c(m, n).lane][c(m, n).reg]));
    }
  expect(worst < 2e-6, std::string("mma ") + name + ' ' + std::to_string(worst));
}

void fill_shared(dev::shared_ptr<dev::bf16> to, const std::vector<std::uint16_t>& from) {
  for (int i = dev::thread_index(); i < int(from.size()) / 8; i += 32) {
    dev::Words4 w;
    std::memcpy(&w, &from[i * 8], 16);
    dev::store_words(to + i * 8, w);
  }
  dev::sync_threads();
}

// Matrix j, row r is 16 bytes at (8 j + r) * 16; element (r, col) must reach lane 4 r + col / 2 (transposed: r and col
// swap).
void test_ldmatrix() {
  std::vector<std::uint16_t> matrices(4 * 64);
  for (int i = 0; i < 256; ++i) matrices[i] = std::uint16_t(i);
  std::uint32_t plain[32][4], trans[32][4];
  one_warp(512, [&] {
    const auto shared = dev::dynamic_shared<dev::bf16>();
    fill_shared(shared, matrices);
    dev::ldmatrix_x4(plain[dev::thread_index()], shared + dev::thread_index() * 8);
    dev::ldmatrix_x4_trans(trans[dev::thread_index()], shared + dev::thread_index() * 8);
  });
  bool ok = true;
  for (int j = 0; j < 4; ++j)
    for (int r = 0; r < 8; ++r)
      for (int col = 0; col < 8; ++col) {
        const std::uint32_t element = std::uint32_t(j * 64 + r * 8 + col);
        ok &= (plain[r * 4 + col / 2][j] >> (col % 2 * 16) & 0xffff) == element;
        ok &= (trans[col * 4 + r / 2][j] >> (r % 2 * 16) & 0xffff) == element;
      }
  expect(ok, "ldmatrix layouts");
}

// ldmatrix must feed mma without any shuffling: row-major A and B^T plainly, row-major B with .trans.
void test_ldmatrix_feeds_mma(bool b_row_major) {
  std::vector<std::uint16_t> memory(16 * 16 + 16 * 16);
  double a[16][16], b[16][16];
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k) {
      a[i][k] = emu::bf16_to_float(memory[i * 16 + k] = emu::float_to_bf16(uniform()));
      b[k][i] =
          emu::bf16_to_float(memory[256 + (b_row_major ? k * 16 + i : i * 16 + k)] = emu::float_to_bf16(uniform()));
    }
  float out[32][2][4] = {};
  one_warp(1024, [&] {
    const auto shared = dev::dynamic_shared<dev::bf16>();
    const int lane = dev::thread_index();
    fill_shared(shared, memory);
    std::uint32_t ra[4], rb[4];
    dev::ldmatrix_x4(ra, shared + (lane % 16 * 16 + lane / 16 * 8));
    if (b_row_major)
      dev::ldmatrix_x4_trans(rb, shared + (256 + lane % 16 * 16 + lane / 16 * 8));
    else
      dev::ldmatrix_x4(rb, shared + (256 + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8));
    for (int n = 0; n < 2; ++n) {
      const std::uint32_t pair[2] = {rb[2 * n], rb[2 * n + 1]};
      dev::mma_m16n8k16<dev::bf16>(out[lane][n], ra, pair);
    }
  });
  double worst = 0;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      double sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[m][k] * b[k][n];
      worst = std::max(worst, std::abs(sum - out[c(m, n % 8).lane][n / 8][c(m, n % 8).reg]));
    }
  expect(worst < 2e-6, "ldmatrix feeds mma");
}

void test_scalars() {
  const std::vector<float> numbers{1, 2, 3, 4};
  emu::Buffer in("x", 16, emu::Buffer::Role::input), out("y", 128, emu::Buffer::Role::output_once);
  std::memcpy(in.host<float>(), numbers.data(), 16);
  emu::Block().launch({1, 1, 1}, 32, 128, [&] {
    const int lane = dev::thread_index();
    const auto shared = dev::dynamic_shared<float>();
    dev::store(shared + lane, dev::load(emu::GlobalPtr<const float>(in) + lane % 4));
    dev::sync_warp();
    dev::store(emu::GlobalPtr<float>(out) + lane, dev::load(shared + (31 - lane)));
  });
  for (int lane = 0; lane < 32; ++lane)
    expect(out.host<float>()[lane] == numbers[(31 - lane) % 4], "scalar loads and stores");
  std::uint32_t word = 0;
  one_warp(0, [&] { word = dev::load_word(emu::GlobalPtr<const dev::bf16>(in) + 2); });
  expect(word == std::bit_cast<std::uint32_t>(2.f), "load_word");
  expect(dev::popcount(0x80000005u) == 3, "popcount");
}

void test_shuffle() {
  std::uint32_t out[32];
  one_warp(0, [&] { out[dev::thread_index()] = dev::shfl_xor(std::uint32_t(dev::thread_index()), 5); });
  for (std::uint32_t lane = 0; lane < 32; ++lane) expect(out[lane] == (lane ^ 5), "shfl_xor");
}

// Every misuse must be named.
void test_detection() {
  using P = dev::shared_ptr<dev::bf16>;
  emu::Buffer in("x", 64, emu::Buffer::Role::input), out("y", 64, emu::Buffer::Role::output_once);
  const emu::GlobalPtr<const dev::bf16> x(in);
  const emu::GlobalPtr<dev::bf16> y(out);
  const auto launch = [](int threads, std::function<void()> kernel) {
    return [=] { emu::Block().launch({1, 1, 1}, threads, 1024, kernel); };
  };
  const auto tid = [] { return dev::thread_index(); };
  const dev::Words4 zero{};
  float acc[4] = {};
  std::uint32_t a[4] = {}, b[2] = {};

  expect_caught("lane misses mma", "warp diverged: 31 lanes", launch(32, [&] {
                  if (tid() != 7) dev::mma_m16n8k16<dev::bf16>(acc, a, b);
                }));
  expect_caught("two different mma", "warp diverged: 32 lanes", launch(32, [&] {
                  if (tid() < 16)
                    dev::mma_m16n8k16<dev::bf16>(acc, a, b);
                  else
                    dev::mma_m16n8k16<dev::bf16>(acc, a, b);
                }));
  expect_caught("lane waits at barrier", "is at __syncthreads",
                launch(32, [&] { tid() < 31 ? (void)dev::shfl_xor(1, 1) : dev::sync_threads(); }));
  expect_caught("warp misses barrier", "ended threads never reach", launch(64, [&] {
                  if (tid() < 32) dev::sync_threads();
                }));
  expect_caught("different barriers", "different barriers", launch(64, [&] {
                  if (tid() < 32)
                    dev::sync_threads();
                  else
                    dev::sync_threads();
                }));
  expect_caught("uninitialised shared read", "uninitialised shared", launch(32, [&] {
                  std::uint32_t r[4];
                  dev::ldmatrix_x4(r, P(0) + tid() * 8);
                }));
  expect_caught("ldmatrix before barrier", "read after write", launch(32, [&] {
                  std::uint32_t r[4];
                  dev::store_words(P(0) + (tid() ^ 1) * 8, zero);
                  dev::ldmatrix_x4(r, P(0) + tid() * 8);
                }));
  expect_caught("write after read", "write after read", launch(32, [&] {
                  std::uint32_t r[4];
                  dev::store_words(P(0) + tid() * 8, zero);
                  dev::sync_warp();
                  dev::ldmatrix_x4(r, P(0) + tid() * 8);
                  dev::store_words(P(0) + (tid() ^ 1) * 8, zero);
                }));
  expect_caught("write after reads of two warps", "write after read, no barrier since several threads", launch(96, [&] {
                  if (tid() < 32) dev::store_words(P(0) + tid() * 8, zero);
                  dev::sync_threads();
                  if (tid() < 64) dev::load_words(P(0) + tid() % 32 * 8);
                  if (tid() >= 64) dev::store_words(P(0) + tid() % 32 * 8, zero);
                }));
  expect_caught("two writers", "write after write", launch(32, [&] { dev::store_words(P(0), zero); }));
  expect_caught("shared out of bounds", "out of bounds: offset 1024",
                launch(32, [&] { dev::store_words(P(0) + (tid() + 33) * 8, zero); }));
  expect_caught("misaligned ldmatrix", "misaligned shared", launch(32, [&] {
                  std::uint32_t r[4];
                  dev::ldmatrix_x4(r, P(0) + 4);
                }));
  expect_caught("copy without wait", "copy in flight (wait missing)", launch(32, [&] {
                  std::uint32_t r[4];
                  dev::cp_async16(P(0) + tid() * 8, x, 16);
                  dev::cp_async_commit();
                  dev::sync_threads();
                  dev::ldmatrix_x4(r, P(0) + tid() * 8);
                }));
  expect_caught("wait without barrier", "read after write", launch(64, [&] {
                  std::uint32_t r[4];
                  if (tid() < 32) dev::cp_async16(P(0) + tid() * 8, x, 16);
                  dev::cp_async_commit();
                  dev::cp_async_wait<0>();
                  if (tid() >= 32) dev::ldmatrix_x4(r, P(0) + tid() % 32 * 8);
                }));
  expect_caught("uncommitted copy", "ends with copies in flight", launch(32, [&] {
                  dev::cp_async16(P(0) + tid() * 8, x, 16);
                  dev::cp_async_wait<0>();
                }));
  expect_caught("global out of bounds", "x: global access out of bounds",
                launch(32, [&] { dev::load(x + tid() + 1); }));
  expect_caught("negative index", "x: global access out of bounds", launch(32, [&] { dev::load(x + (tid() - 1)); }));
  expect_caught("misaligned copy", "x: misaligned global",
                launch(32, [&] { dev::cp_async16(P(0) + tid() * 8, x + 4, 16); }));
  expect_caught("second owner of an output", "y: second write", launch(32, [&] { dev::store(y + tid() / 2, {}); }));
  expect_caught("read of an output", "y: read of uninitialised", launch(32, [&] { dev::load(y + tid()); }));
  expect_caught("tf32 not rounded", "not rounded to tf32", launch(32, [&] {
                  std::uint32_t q[4] = {1};
                  dev::mma_m16n8k8_tf32(acc, q, b);
                }));

  // The same patterns done right pass.
  launch(64, [&] {
    std::uint32_t r[4];
    dev::cp_async16(P(0) + tid() * 8, x, tid() % 2 ? 16 : 0);
    dev::cp_async_commit();
    dev::cp_async_wait<0>();
    dev::sync_threads();
    dev::ldmatrix_x4(r, P(0) + (tid() ^ 32) * 8);
    dev::sync_threads();
    dev::store_words(P(0) + (tid() ^ 32) * 8, zero);
    dev::sync_warp();
    dev::ldmatrix_x4(r, P(0) + (tid() ^ 33) * 8);
  })();
}

}  // namespace

int main() {
  for (int i = 0; i < 20; ++i) {
    test_mma<dev::bf16, 16>("bf16");
    test_mma<dev::fp16, 16>("fp16");
    test_mma<float, 8>("tf32");
    test_ldmatrix_feeds_mma(false);
    test_ldmatrix_feeds_mma(true);
  }
  test_ldmatrix();
  test_scalars();
  test_shuffle();
  test_detection();
  return finish("primitives");
}
