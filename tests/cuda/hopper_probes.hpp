// What the programs for sm_90a's primitives share: running a kernel on a GPU (nvcc) or on the emulator (g++), a kernel
// that makes one copy, and what a copy should leave. All numbers are small integers, so that every result is exact.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "device/hopper.cuh"
#include "tensor_map.hpp"

using namespace ddst;
using Halves = std::vector<std::uint16_t>;
using Words = std::vector<std::uint32_t>;
using In = dev::global_ptr<const std::uint32_t>;
using Out = dev::global_ptr<std::uint32_t>;

constexpr int kData = 32768, kShared = kData + 64;  // bytes; barriers behind the data

// What a launch is asked for; ints only.
struct Ask {
  int kind, bytes, at[5], offset[2];
};
enum Kind { kBox2, kBox3, kBox4, kIm2col, kBytes };

int failures = 0, checks = 0;
void expect(bool ok, const std::string& what) {
  ++checks;
  if (!ok) ++failures, std::printf("FAIL %s\n", what.c_str());
}

#ifdef __CUDACC__
#include "tensor_maps.cu"

void must(int status) {
  if (status == cudaSuccess) return;
  std::printf("FAIL %s\n", cudaGetErrorString(cudaError_t(status)));
  std::exit(1);
}

// Runs a kernel on a tensor in global memory, which `map` describes, and returns the words that it writes.
template <class Kernel>
Words run(Kernel kernel, int cluster, int threads, const Halves& in, std::size_t out_words, cuda::TensorMap map,
          const Ask& ask) {
  std::uint32_t *from = nullptr, *to = nullptr;
  must(cudaMalloc(&from, in.size() * 2)), must(cudaMalloc(&to, out_words * 4));
  must(cudaMemset(to, 0xff, out_words * 4));
  must(cudaMemcpy(from, in.data(), in.size() * 2, cudaMemcpyHostToDevice));
  map.base = from;
  dev::TensorMap encoded{};
  cuda::EncodedTensorMap made{};
  must(ddst_cuda_tensor_map(&map, &made));
  std::memcpy(&encoded, &made, sizeof encoded);
  must(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(cluster), attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = unsigned(cluster), config.blockDim = unsigned(threads), config.dynamicSmemBytes = kShared;
  config.attrs = &attribute, config.numAttrs = 1;
  must(cudaLaunchKernelEx(&config, kernel, encoded, In(from), Out(to), ask));
  must(cudaDeviceSynchronize());
  Words out(out_words);
  must(cudaMemcpy(out.data(), to, out_words * 4, cudaMemcpyDeviceToHost));
  must(cudaFree(from)), must(cudaFree(to));
  return out;
}
constexpr const char* kWhere = "a GPU";
#else
template <class Kernel>
Words run(Kernel kernel, int cluster, int threads, const Halves& in, std::size_t out_words, cuda::TensorMap map,
          const Ask& ask) {
  emu::Buffer from("in", in.size() * 2, emu::Buffer::Role::input);
  emu::Buffer to("out", out_words * 4, emu::Buffer::Role::output_once);
  std::memcpy(from.host<char>(), in.data(), in.size() * 2);
  map.base = from.host<char>();
  emu::Block().launch({cluster, 1, 1}, threads, kShared, [&] { kernel(map, In(from), Out(to), ask); }, cluster);
  return Words(to.host<std::uint32_t>(), to.host<std::uint32_t>() + out_words);
}
constexpr const char* kWhere = "the emulator";
#endif

// ---- in kernels ----
DDST_DEVICE dev::shared_ptr<dev::Barrier> barriers() {
  return (dev::dynamic_shared<dev::bf16>() + kData / 2).as<dev::Barrier>();
}

DDST_DEVICE void write_out(dev::shared_ptr<dev::bf16> shared, Out out, int bytes, int threads) {
  for (int i = dev::thread_index(); i < bytes / 16; i += threads)
    dev::store_words(out + i * 4, dev::load_words(shared + i * 8));
}

// One copy, and what it leaves in shared memory.
DDST_KERNEL(32, 1) copy_probe(DDST_GRID_CONSTANT dev::TensorMap map, In in, Out out, Ask ask) {
  const auto shared = dev::dynamic_shared<dev::bf16>();
  const auto arrived = barriers();
  if (dev::elect_one()) {
    dev::barrier_init(arrived, 1);
    dev::fence_barrier_init();
    dev::barrier_arrive_expect(arrived, ask.bytes);
    const int two[2] = {ask.at[0], ask.at[1]}, three[3] = {ask.at[0], ask.at[1], ask.at[2]};
    const int four[4] = {ask.at[0], ask.at[1], ask.at[2], ask.at[3]};
    if (ask.kind == kBox2) dev::copy_box(shared, &map, two, arrived);
    if (ask.kind == kBox3) dev::copy_box(shared, &map, three, arrived);
    if (ask.kind == kBox4) dev::copy_box(shared, &map, four, arrived);
    if (ask.kind == kIm2col) dev::copy_im2col(shared, &map, four, ask.offset, arrived);
    if (ask.kind == kBytes) dev::copy_bytes(shared.as<std::uint32_t>(), in + ask.at[0], ask.bytes, arrived);
  }
  dev::sync_warp();
  dev::barrier_wait(arrived, 0);
  write_out(shared, out, ask.bytes, 32);
}

// ---- what is expected ----
Halves numbered(std::size_t count) {  // 1, 2, ...: zero is what lies outside
  Halves halves(count);
  for (std::size_t i = 0; i < count; ++i) halves[i] = std::uint16_t(i + 1);
  return halves;
}
std::uint16_t half(const Words& words, std::size_t i) { return std::uint16_t(words[i / 2] >> i % 2 * 16); }

// Element `e` of row `row` of a box whose rows have as many bytes as the swizzle (or, without one, `row_elements`).
std::size_t place(int row, int e, int row_elements, int swizzle) {
  const int chunk = e / 8, line = row * swizzle / 128;
  return std::size_t(row * row_elements + (swizzle ? chunk ^ line % (swizzle / 16) : chunk) * 8 + e % 8);
}

constexpr int kImages = 3, kHeight = 5, kWidth = 7, kChannels = 72;
const Halves kTensor = numbered(kImages * kHeight * kWidth * kChannels);
std::uint16_t element(int image, int y, int x, int c) {
  const bool inside = image < kImages && y >= 0 && y < kHeight && x >= 0 && x < kWidth && c < kChannels;
  return inside ? kTensor[std::size_t(((image * kHeight + y) * kWidth + x) * kChannels + c)] : 0;
}

template <class T>
std::uint16_t bits_of(int value) {  // |value| at most 8
  const float number = float(value);
  std::uint32_t word;
  std::memcpy(&word, &number, 4);
  if (sizeof(T) == 2 && std::is_same_v<T, dev::bf16>) return std::uint16_t(word >> 16);
  return value == 0 ? 0
                    : std::uint16_t(word >> 16 & 0x8000) |
                          std::uint16_t(((word >> 23 & 255) - 112) << 10 | (word >> 13 & 1023));
}
