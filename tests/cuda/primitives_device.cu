// Every device primitive against results computed on the host: on a GPU when nvcc compiles it (make gpu), on the
// emulator when g++ does (tests/cuda/test_cuda_primitives.py), which checks this program's own expectations where there
// is no GPU.
//
//   nvcc -std=c++17 -O3 -arch=native -Icsrc/cuda tests/cuda/primitives_device.cu -o /tmp/primitives && /tmp/primitives
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "device/primitives.cuh"

using namespace ddst;
using Words = std::vector<std::uint32_t>;
using In = dev::global_ptr<const std::uint32_t>;
using Out = dev::global_ptr<std::uint32_t>;

constexpr int kSharedBytes = 4096;

#ifdef __CUDACC__
#include <cuda_runtime.h>

void must(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::printf("FAIL %s\n", cudaGetErrorString(status));
  std::exit(1);
}

// DDST_RUN runs a kernel on some words and returns those that it writes: a macro, as a launch names its kernel.
template <class Launch>
Words run(const Words& in, std::size_t out_words, const Launch& launch) {
  std::uint32_t *from = nullptr, *to = nullptr;
  must(cudaMalloc(&from, in.size() * 4 + 16));
  must(cudaMalloc(&to, out_words * 4));
  must(cudaMemset(to, 0xff, out_words * 4));
  must(cudaMemcpy(from, in.data(), in.size() * 4, cudaMemcpyHostToDevice));
  launch(from, to);
  must(cudaGetLastError());
  must(cudaDeviceSynchronize());
  Words out(out_words);
  must(cudaMemcpy(out.data(), to, out_words * 4, cudaMemcpyDeviceToHost));
  must(cudaFree(from));
  must(cudaFree(to));
  return out;
}
#define DDST_RUN(GRID_X, GRID_Y, THREADS, IN, OUT_WORDS, ...)               \
  run(IN, OUT_WORDS, [](const std::uint32_t* from, std::uint32_t* to) {     \
    __VA_ARGS__<<<dim3(GRID_X, GRID_Y), THREADS, kSharedBytes>>>(from, to); \
  })
#else
template <class Kernel>
Words run(int grid_x, int grid_y, int threads, const Words& in, std::size_t out_words, const Kernel& kernel) {
  emu::Buffer from("in", in.size() * 4, emu::Buffer::Role::input);
  emu::Buffer to("out", out_words * 4, emu::Buffer::Role::output_once);
  if (!in.empty()) std::memcpy(from.host<char>(), in.data(), in.size() * 4);
  emu::Block().launch({grid_x, grid_y, 1}, threads, kSharedBytes, [&] { kernel(In(from), Out(to)); });
  return Words(to.host<std::uint32_t>(), to.host<std::uint32_t>() + out_words);
}
#define DDST_RUN(GRID_X, GRID_Y, THREADS, IN, OUT_WORDS, ...) \
  run(GRID_X, GRID_Y, THREADS, IN, OUT_WORDS, [](In from, Out to) { __VA_ARGS__(from, to); })
#endif

// ---- kernels ----

template <class T>  // per lane: 4 words of a, 2 of b, 4 of c
DDST_KERNEL(32) multiply(In in, Out out) {
  const int lane = dev::thread_index();
  std::uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = dev::load(in + (lane * 10 + i));
  for (int i = 0; i < 2; ++i) b[i] = dev::load(in + (lane * 10 + 4 + i));
  for (int i = 0; i < 4; ++i) c[i] = dev::float_of(dev::load(in + (lane * 10 + 6 + i)));
  if constexpr (sizeof(T) == 4)
    dev::mma_m16n8k8_tf32(c, a, b);
  else
    dev::mma_m16n8k16<T>(c, a, b);
  for (int i = 0; i < 4; ++i) dev::store(out + (lane * 4 + i), dev::float_bits(c[i]));
}

DDST_KERNEL(32)
matrices(In in, Out out) {  // 4 matrices of 8 x 16 bytes; row r of matrix j is lane 8 j + r's
  const int lane = dev::thread_index();
  const auto shared = dev::dynamic_shared<std::uint32_t>();
  dev::Words4 words;
  for (int i = 0; i < 4; ++i) words.w[i] = dev::load(in + (lane * 4 + i));
  dev::store_words(shared + lane * 4, words);
  dev::sync_warp();
  std::uint32_t plain[4], transposed[4];
  dev::ldmatrix_x4(plain, shared + lane * 4);
  dev::ldmatrix_x4_trans(transposed, shared + lane * 4);
  for (int i = 0; i < 4; ++i) {
    dev::store(out + (lane * 8 + i), plain[i]);
    dev::store(out + (lane * 8 + 4 + i), transposed[i]);
  }
}

// Two groups of copies; lane's size in bytes is lane % 17. Each lane reads its own copies after its own wait.
DDST_KERNEL(32)
copies(In in, Out out) {
  const int lane = dev::thread_index();
  const auto shared = dev::dynamic_shared<std::uint32_t>();
  dev::cp_async16(shared + lane * 4, in + lane * 4, lane % 17);
  dev::cp_async_commit();
  dev::cp_async16(shared + (32 + lane) * 4, in + (31 - lane) * 4, 16);
  dev::cp_async_commit();
  dev::cp_async_wait<1>();
  for (int i = 0; i < 4; ++i) dev::store(out + (lane * 8 + i), dev::load(shared + (lane * 4 + i)));
  dev::cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) dev::store(out + (lane * 8 + 4 + i), dev::load(shared + ((32 + lane) * 4 + i)));
}

DDST_KERNEL(128)
across_warps(In in, Out out) {  // what another warp wrote is there after the barrier
  const int thread = dev::thread_index();
  const auto shared = dev::dynamic_shared<std::uint32_t>();
  const int block = dev::block_index_y() * 3 + dev::block_index_x();
  dev::store(shared + thread, dev::load(in + thread) + std::uint32_t(block));
  dev::sync_threads();
  dev::store(out + (block * 128 + thread), dev::load(shared + (127 - thread)));
}

DDST_KERNEL(32)
exchanged(In in, Out out) {
  const int lane = dev::thread_index();
  const std::uint32_t value = dev::load(in + lane);
  for (int i = 0; i < 32; ++i) dev::store(out + (i * 32 + lane), dev::shfl_xor(value, i));
}

DDST_KERNEL(32)
converted(In in, Out out) {  // a pair of floats per lane
  const int lane = dev::thread_index();
  const std::uint32_t bits = dev::load(in + lane * 2);
  const float lo = dev::float_of(bits), hi = dev::float_of(dev::load(in + (lane * 2 + 1)));
  const std::uint32_t bf16 = dev::pack2<dev::bf16>(lo, hi), fp16 = dev::pack2<dev::fp16>(lo, hi);
  dev::store_words(out + lane * 8, dev::Words4{{dev::to_tf32(lo), bf16, fp16, std::uint32_t(dev::popcount(bits))}});
  dev::store_words(out + (lane * 8 + 4), dev::Words2{{dev::float_bits(dev::widen<dev::bf16>(std::uint16_t(bf16))),
                                                      dev::float_bits(dev::widen<dev::fp16>(std::uint16_t(fp16)))}});
  dev::store_words(out + (lane * 8 + 6), dev::Words2{{dev::load_word(in + lane * 2), bits}});
}

// ---- expectations ----

int failures = 0, checks = 0;

void expect(const std::string& what, std::uint32_t got, std::uint32_t want) {
  ++checks;
  if (got == want) return;
  if (++failures <= 50) std::printf("FAIL %s: got %08x, expected %08x\n", what.c_str(), got, want);
}

std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
float value_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Bits of a small integer, which every type holds exactly.
template <class T>
std::uint32_t encode(int value);
template <>
std::uint32_t encode<float>(int value) {
  return bits_of(float(value));
}
template <>
std::uint32_t encode<dev::bf16>(int value) {
  return bits_of(float(value)) >> 16;
}
template <>
std::uint32_t encode<dev::fp16>(int value) {
  if (value == 0) return 0;
  const std::uint32_t bits = bits_of(float(value));
  return (bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 127 + 15) << 10) | (bits >> 13 & 0x3ff);
}

struct Place {
  int lane, word, half;
};

// The PTX manual's fragments, from element to place. K is 16 for 16-bit types and 8 for tf32.
template <class T>
void check_multiply(const char* name) {
  constexpr bool kWide = sizeof(T) == 4;
  constexpr int kK = kWide ? 8 : 16;
  const auto a_place = [](int m, int k) {
    return kWide ? Place{m % 8 * 4 + k % 4, m / 8 + k / 4 * 2, 0}
                 : Place{m % 8 * 4 + k % 8 / 2, m / 8 + k / 8 * 2, k % 2};
  };
  const auto b_place = [](int k, int n) {
    return kWide ? Place{n * 4 + k % 4, 4 + k / 4, 0} : Place{n * 4 + k % 8 / 2, 4 + k / 8, k % 2};
  };
  const auto c_place = [](int m, int n) { return Place{m % 8 * 4 + n / 2, m / 8 * 2 + n % 2, 0}; };
  std::uint32_t state = 12345;
  const auto next = [&] { return int((state = state * 1664525u + 1013904223u) >> 16) % 17 - 8; };
  Words in(320);
  const auto put = [&](Place p, std::uint32_t bits) { in[p.lane * 10 + p.word] |= bits << (16 * p.half); };
  int a[16][kK], b[kK][8], c[16][8];
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kK; ++k) put(a_place(m, k), encode<T>(a[m][k] = next()));
  for (int k = 0; k < kK; ++k)
    for (int n = 0; n < 8; ++n) put(b_place(k, n), encode<T>(b[k][n] = next()));
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      const Place p = c_place(m, n);
      in[p.lane * 10 + 6 + p.word] = encode<float>(c[m][n] = next());
    }
  const Words out = DDST_RUN(1, 1, 32, in, 128, multiply<T>);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      int sum = c[m][n];
      for (int k = 0; k < kK; ++k) sum += a[m][k] * b[k][n];
      expect(std::string("mma ") + name, out[c_place(m, n).lane * 4 + c_place(m, n).word], bits_of(float(sum)));
    }
}

void check_matrices() {
  Words in(128);
  for (int i = 0; i < 128; ++i) in[i] = std::uint32_t(2 * i) | std::uint32_t(2 * i + 1) << 16;
  const Words out = DDST_RUN(1, 1, 32, in, 256, matrices);
  for (int j = 0; j < 4; ++j)
    for (int row = 0; row < 8; ++row)
      for (int col = 0; col < 8; ++col) {
        const auto element = std::uint32_t(j * 64 + row * 8 + col);
        expect("ldmatrix", out[(row * 4 + col / 2) * 8 + j] >> (col % 2 * 16) & 0xffff, element);
        expect("ldmatrix.trans", out[(col * 4 + row / 2) * 8 + 4 + j] >> (row % 2 * 16) & 0xffff, element);
      }
}

void check_copies() {
  Words in(128);
  for (int i = 0; i < 128; ++i) in[i] = 0x01020304u * std::uint32_t(i % 60 + 1);
  const Words out = DDST_RUN(1, 1, 32, in, 256, copies);
  for (int lane = 0; lane < 32; ++lane) {
    unsigned char want[16] = {};
    std::memcpy(want, &in[lane * 4], std::size_t(lane % 17));
    for (int i = 0; i < 4; ++i) {
      std::uint32_t word;
      std::memcpy(&word, want + i * 4, 4);
      expect("cp.async of " + std::to_string(lane % 17) + " bytes", out[lane * 8 + i], word);
      expect("cp.async of the second group", out[lane * 8 + 4 + i], in[(31 - lane) * 4 + i]);
    }
  }
}

void check_threads() {
  Words in(128);
  for (int i = 0; i < 128; ++i) in[i] = std::uint32_t(i * i);
  const Words through = DDST_RUN(3, 2, 128, in, 768, across_warps);
  for (int i = 0; i < 768; ++i) expect("across warps", through[i], in[127 - i % 128] + std::uint32_t(i / 128));
  in.resize(32);
  const Words out = DDST_RUN(1, 1, 32, in, 1024, exchanged);
  for (int i = 0; i < 1024; ++i) expect("shfl_xor", out[i], in[i % 32 ^ i / 32]);
}

// Known roundings: to nearest even for 16 bits, ties away from zero for tf32.
void check_conversions() {
  const struct {
    float value;
    std::uint32_t tf32, bf16, fp16;
  } known[] = {
      {0.f, 0, 0, 0},
      {-2.f, 0xc0000000, 0xc000, 0xc000},
      {1.f / 3, 0x3eaaa000, 0x3eab, 0x3555},
      {65504.f, 0x477fe000, 0x4780, 0x7bff},
      {1e5f, 0x47c36000, 0x47c3, 0x7c00},
      {value_of(0x3f801000), 0x3f802000, 0x3f80, 0x3c00},  // 1 + 2^-11: a tie of tf32 and of fp16
      {value_of(0xbf803000), 0xbf804000, 0xbf80, 0xbc02},  // -(1 + 3 * 2^-11): again
      {value_of(0x3f800fff), 0x3f800000, 0x3f80, 0x3c00},
      {value_of(0x3f808000), 0x3f808000, 0x3f80, 0x3c04},  // 1 + 2^-8: a tie of bf16
      {value_of(0x3f818000), 0x3f818000, 0x3f82, 0x3c0c},
      {value_of(0x33800000), 0x33800000, 0x3380, 0x0001},  // 2^-24, fp16's smallest
      {value_of(0x33000000), 0x33000000, 0x3300, 0x0000},  // its half: a tie
      {value_of(0x7f800000), 0x7f800000, 0x7f80, 0x7c00},
  };
  constexpr int kKnown = int(sizeof known / sizeof known[0]);
  Words in(64);
  for (int lane = 0; lane < 32; ++lane) {
    in[lane * 2] = bits_of(known[lane % kKnown].value);
    in[lane * 2 + 1] = bits_of(known[(lane + 1) % kKnown].value);
  }
  const Words out = DDST_RUN(1, 1, 32, in, 256, converted);
  for (int lane = 0; lane < 32; ++lane) {
    const auto &lo = known[lane % kKnown], &hi = known[(lane + 1) % kKnown];
    const std::string of = " of " + std::to_string(lo.value);
    int ones = 0;
    for (int i = 0; i < 32; ++i) ones += in[lane * 2] >> i & 1;
    expect("to_tf32" + of, out[lane * 8], lo.tf32);
    expect("pack2<bf16>" + of, out[lane * 8 + 1], lo.bf16 | hi.bf16 << 16);
    expect("pack2<fp16>" + of, out[lane * 8 + 2], lo.fp16 | hi.fp16 << 16);
    expect("popcount" + of, out[lane * 8 + 3], std::uint32_t(ones));
    expect("widen<bf16>" + of, out[lane * 8 + 4], lo.bf16 << 16);
    if (lo.fp16 == 0x3555) expect("widen<fp16>" + of, out[lane * 8 + 5], 0x3eaaa000);
    if (lo.fp16 == 0x0001) expect("widen<fp16>" + of, out[lane * 8 + 5], 0x33800000);
    if (lo.fp16 == 0x7c00) expect("widen<fp16>" + of, out[lane * 8 + 5], 0x7f800000);
    expect("load_word" + of, out[lane * 8 + 6], in[lane * 2]);
    expect("float_of, float_bits" + of, out[lane * 8 + 7], in[lane * 2]);
  }
}

int main() {
  check_multiply<dev::bf16>("bf16");
  check_multiply<dev::fp16>("fp16");
  check_multiply<float>("tf32");
  check_matrices();
  check_copies();
  check_threads();
  check_conversions();
#ifdef __CUDACC__
  cudaDeviceProp device;
  must(cudaGetDeviceProperties(&device, 0));
  std::printf("on %s: ", device.name);
#else
  std::printf("on the emulator: ");
#endif
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
