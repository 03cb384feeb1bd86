// ddst_cuda::hopper_gather, and what the gather kernel for sm_90a refuses. Its lists are made by
// ddst/ops/cuda/hopper_lists.py. Part of libraries only that hold code for sm_90a.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
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
                     int64_t granules, int64_t cluster) {
  const GatherCall call = check_gather(kOp, input, values, bias, residual, weight_shape, input_size, stride, padding,
                                       input_gradient, false);
  const int32_t device = call.device;
  if (granules != 1 && granules != 4) fail(kOp, "granules is ", granules, ", expected 1 or 4");
  if (cluster != 1 && cluster != 2) fail(kOp, "cluster is ", cluster, ", expected 1 or 2");
  if (values.size(0) == 0) fail(kOp, "values has no slots");
  const GatherForm form{static_cast<int>(granules), static_cast<int>(cluster)};
  HopperGatherGeometry g;
  const auto why =
      hopper_gather_geometry(call.problem, input_gradient, form, static_cast<int>(shared_limit(kOp, device)), g);
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
  encode_map(kOp, hopper_patch_map(g, input.data_ptr()), arrays.input);
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
      "cluster) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ddst_cuda, CUDA, m) { m.impl("hopper_gather", TORCH_BOX(&ddst::cuda::hopper_gather)); }

// How the kernel would cut a problem; ints only (ddst/ops/cuda/hopper.py).
struct ddst_cuda_hopper_gather_facts {
  int32_t tile_images, tile_rows, tile_columns, patch_rows, patch_columns;
  int32_t tiles, groups, slices, stages, record_ints, shared_bytes;
};

// Fills `plan` for a CTA with so much shared memory, or writes why it cannot into `message`, "" if it can.
extern "C" __attribute__((visibility("default"))) void ddst_cuda_hopper_gather_plan(
    const ddst_cuda_conv2d_problem* problem, bool input_gradient, int granules, int cluster, bool fused, bool squares,
    int shared_bytes, ddst_cuda_hopper_gather_facts* plan, char* message, int size) {
  ddst::cuda::HopperGatherGeometry g;
  const std::string why =
      hopper_gather_geometry(*problem, input_gradient, {granules, cluster}, shared_bytes, g, {fused, squares});
  std::snprintf(message, static_cast<size_t>(size), "%s", why.c_str());
  if (!why.empty()) return;
  *plan = {1 << g.log_tile_images,
           1 << g.log_tile_rows,
           1 << g.log_tile_cols,
           g.patch_rows * g.parts_y,
           g.patch_cols * g.parts_x,
           g.tiles * g.phases_y * g.phases_x,
           g.groups,
           g.slices,
           g.stages,
           g.record_ints,
           g.bytes};
}
