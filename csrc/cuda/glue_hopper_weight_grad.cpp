// ddst_cuda::hopper_weight_grad: the arguments of conv2d_weight_grad, with units for sixteen warps and tiles of 64
// pixels (hopper_weight_grad_shape.hpp). Part of libraries only that hold code for sm_90a.
#include <torch/csrc/stable/library.h>

#include "glue_weight_grad.hpp"
#include "hopper_weight_grad.h"

namespace ddst::cuda {
namespace {

std::string refusal(const WeightGradShape& shape, int element_bytes, const WeightGradUse& use, int64_t shared_limit) {
  if (use.halved) return "an operand has half of the sides: copies cannot repeat pixels";
  const std::string why = hopper_weight_grad_error(shape, element_bytes, use.fused);
  if (!why.empty()) return why;
  const int bytes = hopper_weight_grad_sizes(shape, use.fused).shared_bytes;
  return bytes <= shared_limit ? "" : "needs " + std::to_string(bytes) + " bytes of shared memory";
}

constexpr WeightGradKernel kHopperKernel{
    "hopper_weight_grad",
    kHopperWarps,
    &refusal,
    [](const WeightGradShape& shape, int, const WeightGradUse& use) {
      return hopper_weight_grad_sizes(shape, use.fused).partial_floats;
    },
    &ddst_cuda_hopper_weight_grad,
};

}  // namespace
}  // namespace ddst::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(ddst_cuda, m) { m.def("hopper_weight_grad" DDST_WEIGHT_GRAD_ARGUMENTS); }
STABLE_TORCH_LIBRARY_IMPL(ddst_cuda, CUDA, m) {
  m.impl("hopper_weight_grad", TORCH_BOX(&ddst::cuda::weight_grad_operator<ddst::cuda::kHopperKernel>));
}
