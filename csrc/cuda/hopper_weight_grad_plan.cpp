// How the weight gradient's kernel for sm_90a would run a shape, or why it cannot: ddst/ops/cuda/hopper_weight_grad.py
// chooses by it. No operator, no torch, no CUDA, as hopper_gather_plan.cpp.
#include <cstdio>

#include "hopper_weight_grad_shape.hpp"

// facts: tiles; stages; bytes that a tile copies, of shared memory. message: why not, or an empty string.
extern "C" __attribute__((visibility("default"))) void ddst_cuda_hopper_weight_grad_plan(
    const ddst::cuda::WeightGradShape* shape, int element_bytes, bool fused, int32_t facts[4], char* message,
    int size) {
  const std::string why = hopper_weight_grad_error(*shape, element_bytes, fused);
  std::snprintf(message, static_cast<size_t>(size), "%s", why.c_str());
  if (!why.empty()) return;
  const auto z = hopper_weight_grad_sizes(*shape, fused);
  facts[0] = static_cast<int32_t>(z.tiles), facts[1] = z.stages, facts[2] = z.copied_bytes, facts[3] = z.shared_bytes;
}
