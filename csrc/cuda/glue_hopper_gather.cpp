// ddst_cuda::hopper_gather, whose lists are made by ddst/ops/cuda/hopper_lists.py. Part of libraries only that hold
// code for sm_90a.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "glue_gather.hpp"
#include "hopper_gather.h"

namespace ddst::cuda {
namespace {

constexpr const char* kOp = "hopper_gather";

// The entries of `records` and `order` are trusted: reading them would wait for the device.
Tensor hopper_gather(const Tensor& input, const Tensor& values, const Tensor& records, const Tensor& order,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, const Ints& weight_shape,
                     const Ints& input_size, const Ints& stride, const Ints& padding, bool input_gradient, bool relu,
                     int64_t granules, int64_t cluster, int64_t depth, bool im2col, bool fused,
                     const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& shift, const std::optional<Tensor>& activated, double slope,
                     int64_t upsample, int64_t pool, int64_t residual_upsample) {
  const GatherFactors by{upsample, pool, residual_upsample};
  check_factors(kOp, fused, by);
  const GatherCall call = check_gather(kOp, input, values, bias, residual, weight_shape, input_size, stride, padding,
                                       input_gradient, false, by);
  const Prologues tables = check_fused(kOp, call, input, mean, scale, shift, activated);
  const int32_t device = call.device;
  if (granules != 1 && granules != 4) fail(kOp, "granules is ", granules, ", expected 1 or 4");
  if (cluster != 1 && cluster != 2) fail(kOp, "cluster is ", cluster, ", expected 1 or 2");
  if (depth != 1 && depth != 2) fail(kOp, "depth is ", depth, ", expected 1 or 2");
  if (values.size(0) == 0) fail(kOp, "values has no slots");
  const GatherForm form{static_cast<int>(granules), static_cast<int>(cluster), static_cast<int>(depth), im2col};
  const bool halved = (input_gradient ? pool : upsample) == 2, squares = (input_gradient ? upsample : pool) == 2;
  HopperGatherGeometry g;
  const auto why = hopper_gather_geometry(call.problem, input_gradient, form,
                                          static_cast<int>(shared_limit(kOp, device)), g, {fused, squares}, halved);
  if (!why.empty()) fail(kOp, why);
  const int64_t lines = int64_t{g.phases_y} * g.phases_x * g.groups;
  const int32_t* lists = check_index(kOp, "records", records, lines * g.in_blocks * g.record_ints, device);
  check_aligned(kOp, "records", records);
  const int32_t* heavy_first = check_index(kOp, "order", order, lines, device);

  const torch::stable::accelerator::DeviceGuard guard(device);
  int multiprocessors = 0;
  check_launch(kOp, ddst_cuda_multiprocessors(device, &multiprocessors));
  Tensor output = gather_output(kOp, call, input);
  ddst_cuda_hopper_gather_arrays arrays{};
  arrays.records = lists, arrays.order = heavy_first;
  arrays.bias = data_or_null(bias), arrays.residual = data_or_null(residual);
  arrays.output = output.data_ptr(), arrays.relu = relu;
  arrays.fused = fused, arrays.slope = static_cast<float>(slope), arrays.factor = pool == 2 ? 0.25f : 1.f;
  arrays.mean = tables.mean, arrays.scale = tables.scale, arrays.shift = tables.shift, arrays.norm = tables.norm;
  arrays.activated = data_or_null(activated);
  arrays.residual_halved = residual_upsample == 2, arrays.squares = squares;
  encode_map(kOp, hopper_input_map(g, input.data_ptr()), arrays.input);
  encode_map(kOp, hopper_weights_map(g, values.data_ptr(), values.size(0), input_gradient), arrays.values);
  check_launch(kOp, ddst_cuda_hopper_gather(call.problem.dtype, input_gradient, &form, &g, &arrays, multiprocessors,
                                            current_stream(kOp, device)));
  return output;
}

}  // namespace
}  // namespace ddst::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(ddst_cuda, m) {
  m.def(
      "hopper_gather(Tensor input, Tensor values, Tensor records, Tensor order, Tensor? bias, Tensor? residual, int[] "
      "weight_shape, int[] input_size, int[] stride, int[] padding, bool input_gradient, bool relu, int granules, int "
      "cluster, int depth, bool im2col, bool fused, Tensor? mean, Tensor? scale, Tensor? shift, Tensor? activated, "
      "float slope, int upsample, int pool, int residual_upsample) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ddst_cuda, CUDA, m) { m.impl("hopper_gather", TORCH_BOX(&ddst::cuda::hopper_gather)); }
