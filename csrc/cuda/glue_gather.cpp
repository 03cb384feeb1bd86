// ddst_cuda::conv2d_gather, and what the kernel refuses. The records are made by ddst/ops/cuda/gather.py.
#include "glue_gather.hpp"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <optional>

#include "conv2d_gather.h"

namespace ddst::cuda {
namespace {

constexpr const char* kOp = "conv2d_gather";

// The entries of `records` are trusted: reading them would wait for the device.
Tensor conv2d_gather(const Tensor& input, const Tensor& values, const Tensor& records,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, const Ints& weight_shape,
                     const Ints& input_size, const Ints& stride, const Ints& padding, bool input_gradient, bool relu,
                     bool large_tile, bool allow_tf32, bool fused, const std::optional<Tensor>& mean,
                     const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                     const std::optional<Tensor>& activated, double slope, int64_t upsample, int64_t pool,
                     int64_t residual_upsample) {
  const GatherFactors by{upsample, pool, residual_upsample};
  check_factors(kOp, fused, by);
  const GatherCall call = check_gather(kOp, input, values, bias, residual, weight_shape, input_size, stride, padding,
                                       input_gradient, allow_tf32, by);
  const auto& problem = call.problem;
  const int32_t device = call.device;
  const Prologues tables = check_fused(kOp, call, input, mean, scale, shift, activated);

  GatherGeometry g;
  const GatherTile tile = gather_tile(large_tile, ddst_cuda_element_bytes(problem.dtype));
  const auto why = gather_geometry(problem, input_gradient, tile, static_cast<int>(shared_limit(kOp, device)), g,
                                   {fused, (input_gradient ? upsample : pool) == 2});
  if (!why.empty()) fail(kOp, why);
  const int64_t lines = int64_t{g.phases_y} * g.phases_x * g.groups * g.in_blocks;
  const int32_t* lists = check_index(kOp, "records", records, lines * g.record_ints, device);
  check_aligned(kOp, "records", records);

  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor output = gather_output(kOp, call, input);
  const ddst_cuda_gather_arrays arrays{input.data_ptr(),
                                       values.data_ptr(),
                                       lists,
                                       data_or_null(bias),
                                       data_or_null(residual),
                                       output.data_ptr(),
                                       relu,
                                       fused,
                                       tables.mean,
                                       tables.scale,
                                       tables.shift,
                                       data_or_null(activated),
                                       tables.norm,
                                       (input_gradient ? pool : upsample) == 2,
                                       residual_upsample == 2,
                                       (input_gradient ? upsample : pool) == 2,
                                       static_cast<float>(slope),
                                       pool == 2 ? 0.25f : 1.f};
  check_launch(kOp, ddst_cuda_conv2d_gather(problem.dtype, input_gradient, large_tile, &g, &arrays,
                                            current_stream(kOp, device)));
  return output;
}

}  // namespace
}  // namespace ddst::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(ddst_cuda, m) {
  m.def(
      "conv2d_gather(Tensor input, Tensor values, Tensor records, Tensor? bias, Tensor? residual, int[] weight_shape, "
      "int[] input_size, int[] stride, int[] padding, bool input_gradient, bool relu, bool large_tile, "
      "bool allow_tf32, bool fused, Tensor? mean, Tensor? scale, Tensor? shift, Tensor? activated, float slope, "
      "int upsample, int pool, int residual_upsample) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ddst_cuda, CUDA, m) { m.impl("conv2d_gather", TORCH_BOX(&ddst::cuda::conv2d_gather)); }

// Why a CTA with so much shared memory cannot run the kernel on this problem: writes it into `message`, "" if it can.
// No operator, as torch keeps the memory of every string that an operator returns.
extern "C" __attribute__((visibility("default"))) void ddst_cuda_gather_refusal(const ddst_cuda_conv2d_problem* problem,
                                                                                bool input_gradient, bool large_tile,
                                                                                bool fused, bool squares,
                                                                                int shared_bytes, char* message,
                                                                                int size) {
  ddst::cuda::GatherGeometry geometry;
  const auto tile = ddst::cuda::gather_tile(large_tile, ddst_cuda_element_bytes(problem->dtype));
  const std::string why =
      ddst::cuda::gather_geometry(*problem, input_gradient, tile, shared_bytes, geometry, {fused, squares});
  std::snprintf(message, static_cast<size_t>(size), "%s", why.c_str());
}
