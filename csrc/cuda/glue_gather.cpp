// ddst_cuda::conv2d_gather, and what the kernel refuses. The records are made by ddst/ops/cuda/gather.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <optional>

#include "conv2d_gather.h"
#include "glue.hpp"

namespace ddst::cuda {
namespace {

constexpr const char* kOp = "conv2d_gather";

int out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  const int64_t room = size + 2 * padding - kernel;
  return room < 0 ? 0 : static_cast<int>(room / stride + 1);
}

// input_size: height and width of the forward input.
ddst_cuda_conv2d_problem describe(const WeightGrid& grid, int64_t images, const Ints& input_size, const Ints& stride,
                                  const Ints& padding, int dtype) {
  check_ints(kOp, "input_size", input_size, 2, 1);
  check_ints(kOp, "stride", stride, 2, 1);
  check_ints(kOp, "padding", padding, 2, 0);
  check_ints(kOp, "images", {images}, 1, 1);
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  ddst_cuda_conv2d_problem p{};
  p.images = narrow(images), p.height = narrow(input_size[0]), p.width = narrow(input_size[1]);
  p.in_channels = narrow(grid.in_channels), p.out_channels = narrow(grid.out_channels);
  p.kernel_height = narrow(grid.kernel_h), p.kernel_width = narrow(grid.kernel_w);
  p.stride_y = narrow(stride[0]), p.stride_x = narrow(stride[1]);
  p.padding_y = narrow(padding[0]), p.padding_x = narrow(padding[1]);
  p.out_height = out_size(p.height, p.kernel_height, p.stride_y, p.padding_y);
  p.out_width = out_size(p.width, p.kernel_width, p.stride_x, p.padding_x);
  p.block_out = narrow(grid.block_out), p.block_in = narrow(grid.block_in), p.dtype = dtype;
  return p;
}

// The entries of `records` are trusted: reading them would wait for the device.
Tensor conv2d_gather(const Tensor& input, const Tensor& values, const Tensor& records,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, const Ints& weight_shape,
                     const Ints& input_size, const Ints& stride, const Ints& padding, bool input_gradient, bool relu,
                     bool large_tile, bool allow_tf32, bool fused, const std::optional<Tensor>& mean,
                     const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                     const std::optional<Tensor>& activated, double slope, int64_t upsample, int64_t pool,
                     int64_t residual_upsample) {
  if (values.dim() != 3) fail(kOp, "values has shape ", shape_text(values), ", expected [slots, b_out, b_in]");
  const WeightGrid grid = grid_of_block(kOp, {values.size(1), values.size(2)}, weight_shape, 4);
  const int32_t device = input.get_device_index();
  check_channels_last(kOp, "input", input, device);
  const auto problem = describe(grid, input.size(0), input_size, stride, padding, dtype_code(kOp, input, allow_tf32));
  for (const int64_t factor : {upsample, pool, residual_upsample})
    if (factor < 1 || factor > (fused ? 2 : 1)) fail(kOp, "a factor is ", factor, ", expected 1, or 2 where fused");
  const Ints forward_shape{problem.images, problem.in_channels, problem.height / upsample, problem.width / upsample};
  const Ints result_shape{problem.images, problem.out_channels, problem.out_height / pool, problem.out_width / pool};
  const Ints& written = input_gradient ? forward_shape : result_shape;
  check_shape(kOp, "input", input, input_gradient ? result_shape : forward_shape);
  check_device(kOp, "values", values, device);
  check_dtype(kOp, "values", values, input.scalar_type(), "input");
  if (!values.is_contiguous()) fail(kOp, "values is not contiguous");
  check_aligned(kOp, "values", values);
  if (bias.has_value()) {
    check_device(kOp, "bias", *bias, device);
    check_dtype(kOp, "bias", *bias, input.scalar_type(), "input");
    check_shape(kOp, "bias", *bias, {written[1]});
    if (!bias->is_contiguous()) fail(kOp, "bias is not contiguous");
    check_aligned(kOp, "bias", *bias);
  }
  if (residual.has_value()) {
    check_channels_last(kOp, "residual", *residual, device);
    check_dtype(kOp, "residual", *residual, input.scalar_type(), "input");
    check_shape(kOp, "residual", *residual,
                {written[0], written[1], written[2] / residual_upsample, written[3] / residual_upsample});
  }
  const Prologues tables = check_prologue(kOp, mean, scale, shift, problem.images, problem.in_channels, device);
  if (activated.has_value()) {
    check_channels_last(kOp, "activated", *activated, device);
    check_dtype(kOp, "activated", *activated, input.scalar_type(), "input");
    check_shape(kOp, "activated", *activated, forward_shape);
  }

  GatherGeometry g;
  const GatherTile tile = gather_tile(large_tile, ddst_cuda_element_bytes(problem.dtype));
  const auto why = gather_geometry(problem, input_gradient, tile, static_cast<int>(shared_limit(kOp, device)), g,
                                   {fused, (input_gradient ? upsample : pool) == 2});
  if (!why.empty()) fail(kOp, why);
  const int64_t lines = int64_t{g.phases_y} * g.phases_x * g.groups * g.in_blocks;
  const int32_t* lists = check_index(kOp, "records", records, lines * g.record_ints, device);
  check_aligned(kOp, "records", records);

  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor output = naming_operator(
      kOp, [&] { return empty_tensor("its output", {written[0], written[2], written[3], written[1]}, input); });
  const ddst_cuda_gather_arrays arrays{input.data_ptr(),
                                       values.data_ptr(),
                                       lists,
                                       bias.has_value() ? bias->data_ptr() : nullptr,
                                       residual.has_value() ? residual->data_ptr() : nullptr,
                                       output.data_ptr(),
                                       relu,
                                       fused,
                                       tables.mean,
                                       tables.scale,
                                       tables.shift,
                                       activated.has_value() ? activated->data_ptr() : nullptr,
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
