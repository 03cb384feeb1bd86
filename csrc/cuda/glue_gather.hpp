// What the gather kernels' operators check alike: the problem that their arguments describe, and their tensors.
#pragma once

#include <optional>

#include "glue.hpp"

namespace ddst::cuda {

// The whole sizes of a fused half block's tensors are 2 where they are halved; 1 otherwise.
struct GatherFactors {
  int64_t upsample = 1, pool = 1, residual_upsample = 1;
};

struct GatherCall {
  ddst_cuda_conv2d_problem problem;
  Ints forward_shape, result_shape;  // of the forward input and output, as they are stored
  Ints written;                      // of what this pass writes
  int32_t device;
};

inline int gather_out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  const int64_t room = size + 2 * padding - kernel;
  return room < 0 ? 0 : static_cast<int>(room / stride + 1);
}

// input_size: height and width of the forward input.
inline ddst_cuda_conv2d_problem describe_gather(const char* op, const WeightGrid& grid, int64_t images,
                                                const Ints& input_size, const Ints& stride, const Ints& padding,
                                                int dtype) {
  check_ints(op, "input_size", input_size, 2, 1);
  check_ints(op, "stride", stride, 2, 1);
  check_ints(op, "padding", padding, 2, 0);
  check_ints(op, "images", {images}, 1, 1);
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  ddst_cuda_conv2d_problem p{};
  p.images = narrow(images), p.height = narrow(input_size[0]), p.width = narrow(input_size[1]);
  p.in_channels = narrow(grid.in_channels), p.out_channels = narrow(grid.out_channels);
  p.kernel_height = narrow(grid.kernel_h), p.kernel_width = narrow(grid.kernel_w);
  p.stride_y = narrow(stride[0]), p.stride_x = narrow(stride[1]);
  p.padding_y = narrow(padding[0]), p.padding_x = narrow(padding[1]);
  p.out_height = gather_out_size(p.height, p.kernel_height, p.stride_y, p.padding_y);
  p.out_width = gather_out_size(p.width, p.kernel_width, p.stride_x, p.padding_x);
  p.block_out = narrow(grid.block_out), p.block_in = narrow(grid.block_in), p.dtype = dtype;
  return p;
}

// Checks input, values, bias and residual of one pass.
inline GatherCall check_gather(const char* op, const Tensor& input, const Tensor& values,
                               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                               const Ints& weight_shape, const Ints& input_size, const Ints& stride,
                               const Ints& padding, bool input_gradient, bool allow_tf32,
                               const GatherFactors& by = {}) {
  if (values.dim() != 3) fail(op, "values has shape ", shape_text(values), ", expected [slots, b_out, b_in]");
  const WeightGrid grid = grid_of_block(op, {values.size(1), values.size(2)}, weight_shape, 4);
  GatherCall call{};
  const int32_t device = call.device = input.get_device_index();
  check_channels_last(op, "input", input, device);
  const auto& p = call.problem =
      describe_gather(op, grid, input.size(0), input_size, stride, padding, dtype_code(op, input, allow_tf32));
  call.forward_shape = {p.images, p.in_channels, p.height / by.upsample, p.width / by.upsample};
  call.result_shape = {p.images, p.out_channels, p.out_height / by.pool, p.out_width / by.pool};
  call.written = input_gradient ? call.forward_shape : call.result_shape;
  check_shape(op, "input", input, input_gradient ? call.result_shape : call.forward_shape);
  check_device(op, "values", values, device);
  check_dtype(op, "values", values, input.scalar_type(), "input");
  if (!values.is_contiguous()) fail(op, "values is not contiguous");
  check_aligned(op, "values", values);
  if (bias.has_value()) {
    check_device(op, "bias", *bias, device);
    check_dtype(op, "bias", *bias, input.scalar_type(), "input");
    check_shape(op, "bias", *bias, {call.written[1]});
    if (!bias->is_contiguous()) fail(op, "bias is not contiguous");
    check_aligned(op, "bias", *bias);
  }
  if (residual.has_value()) {
    check_channels_last(op, "residual", *residual, device);
    check_dtype(op, "residual", *residual, input.scalar_type(), "input");
    check_shape(op, "residual", *residual,
                {call.written[0], call.written[1], call.written[2] / by.residual_upsample,
                 call.written[3] / by.residual_upsample});
  }
  return call;
}

// Of a fused half block: the factors by which tensors are halved, before anything else is checked.
inline void check_factors(const char* op, bool fused, const GatherFactors& by) {
  for (const int64_t factor : {by.upsample, by.pool, by.residual_upsample})
    if (factor < 1 || factor > (fused ? 2 : 1)) fail(op, "a factor is ", factor, ", expected 1, or 2 where fused");
}

// Its norm's tables, and the forward input that the gradient of what was activated needs.
inline Prologues check_fused(const char* op, const GatherCall& call, const Tensor& input,
                             const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
                             const std::optional<Tensor>& shift, const std::optional<Tensor>& activated) {
  if (activated.has_value()) {
    check_channels_last(op, "activated", *activated, call.device);
    check_dtype(op, "activated", *activated, input.scalar_type(), "input");
    check_shape(op, "activated", *activated, call.forward_shape);
  }
  return check_prologue(op, mean, scale, shift, call.problem.images, call.problem.in_channels, call.device);
}

// The result in channels_last order: [images, height, width, channels].
inline Tensor gather_output(const char* op, const GatherCall& call, const Tensor& like) {
  const Ints& w = call.written;
  return naming_operator(op, [&] { return empty_tensor("its output", {w[0], w[2], w[3], w[1]}, like); });
}

inline const void* data_or_null(const std::optional<Tensor>& t) { return t.has_value() ? t->data_ptr() : nullptr; }

}  // namespace ddst::cuda
