// The only place where kernels meet the machine: inline PTX under nvcc, the emulator of tests/cuda otherwise. No torch.
#pragma once
#include <cstdint>

namespace ddst::dev {

struct bf16 {
  std::uint16_t bits;
};
struct fp16 {
  std::uint16_t bits;
};
struct alignas(8) Words2 {
  std::uint32_t w[2];
};
struct alignas(16) Words4 {
  std::uint32_t w[4];
};

}  // namespace ddst::dev

#ifdef __CUDACC__
#include "primitives_ptx.cuh"
#else
#include "emulator/primitives_host.hpp"
#endif
