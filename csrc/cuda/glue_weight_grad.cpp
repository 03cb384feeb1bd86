// ddst_cuda::conv2d_weight_grad. The lists and the plan are made by ddst/ops/cuda/weight_grad.py.
#include "glue_weight_grad.hpp"

#include <torch/csrc/stable/library.h>

namespace ddst::cuda {
namespace {

constexpr WeightGradKernel kKernel{
    "conv2d_weight_grad",
    kWeightGradWarps,
    [](const WeightGradShape& shape, int element_bytes, const WeightGradUse&, int64_t shared_limit) {
      return weight_grad_error(shape, element_bytes, shared_limit);
    },
    [](const WeightGradShape& shape, int element_bytes, const WeightGradUse&) {
      return weight_grad_sizes(shape, element_bytes).partial_floats;
    },
    &ddst_cuda_weight_grad,
};

}  // namespace
}  // namespace ddst::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(ddst_cuda, m) { m.def("conv2d_weight_grad" DDST_WEIGHT_GRAD_ARGUMENTS); }
STABLE_TORCH_LIBRARY_IMPL(ddst_cuda, CUDA, m) {
  m.impl("conv2d_weight_grad", TORCH_BOX(&ddst::cuda::weight_grad_operator<ddst::cuda::kKernel>));
}
