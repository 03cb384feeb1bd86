// The operators of the weight gradients' kernels: the same arguments, checks and memory, another kernel.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "glue.hpp"
#include "weight_grad.h"

namespace ddst::cuda {

// halved: a stored operand has half the sides that the convolution has, of which fused half blocks alone have any.
struct WeightGradUse {
  bool fused, halved;
};

// What an operator asks of its kernel.
struct WeightGradKernel {
  const char* op;
  int warps;  // of a group of units
  // Why it does not take a shape, or an empty string.
  std::string (*refusal)(const WeightGradShape& shape, int element_bytes, const WeightGradUse& use,
                         int64_t shared_limit);
  int64_t (*partial_floats)(const WeightGradShape& shape, int element_bytes, const WeightGradUse& use);
  int (*launch)(int dtype, const WeightGradShape* shape, const ddst_cuda_weight_grad_arrays* arrays, void* stream);
};

#define DDST_WEIGHT_GRAD_ARGUMENTS                                                                          \
  "(Tensor grad_output, Tensor input, Tensor block_row, Tensor block_col, Tensor block_tap, Tensor units, " \
  "int[] weight_shape, int[] block, int[] stride, int[] padding, int[] dilation, int[] band, int[] tile, "  \
  "int shares, bool allow_tf32, bool fused, Tensor? mean, Tensor? scale, Tensor? shift, float slope, int "  \
  "upsample, int pool) -> Tensor"

// The entries of block_row, block_col, block_tap and units are trusted: reading them would wait for the device.
template <const WeightGradKernel& kKernel>
Tensor weight_grad_operator(const Tensor& grad_output, const Tensor& input, const Tensor& block_row,
                            const Tensor& block_col, const Tensor& block_tap, const Tensor& units,
                            const Ints& weight_shape, const Ints& block, const Ints& stride, const Ints& padding,
                            const Ints& dilation, const Ints& band, const Ints& tile, int64_t shares, bool allow_tf32,
                            bool fused, const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
                            const std::optional<Tensor>& shift, double slope, int64_t upsample, int64_t pool) {
  constexpr const char* kOp = kKernel.op;
  const WeightGrid grid = grid_of_block(kOp, block, weight_shape, 4);
  check_ints(kOp, "stride", stride, 2, 1);
  check_ints(kOp, "padding", padding, 2, 0);
  check_ints(kOp, "dilation", dilation, 2, 1);
  check_ints(kOp, "band", band, 2, 1);
  check_ints(kOp, "tile", tile, 3, 1);
  check_ints(kOp, "shares", {shares}, 1, 1);

  const int dtype = dtype_code(kOp, input, allow_tf32);
  const int32_t device = input.get_device_index();
  check_channels_last(kOp, "input", input, device);
  check_channels_last(kOp, "grad_output", grad_output, device);
  check_dtype(kOp, "grad_output", grad_output, input.scalar_type(), "input");
  check_shape(kOp, "input", input, {input.size(0), grid.in_channels, input.size(2), input.size(3)});
  for (const int64_t factor : {upsample, pool})
    if (factor < 1 || factor > (fused ? 2 : 1)) fail(kOp, "a factor is ", factor, ", expected 1, or 2 where fused");
  const auto out_size = [&](int i) {
    const int64_t room = input.size(2 + i) * upsample + 2 * padding[i] - dilation[i] * (weight_shape[2 + i] - 1) - 1;
    return room < 0 ? int64_t{0} : room / stride[i] + 1;
  };
  check_shape(kOp, "grad_output", grad_output,
              {input.size(0), grid.out_channels, out_size(0) / pool, out_size(1) / pool});
  const Prologues tables = check_prologue(kOp, mean, scale, shift, input.size(0), grid.in_channels, device);
  const int64_t vector = 16 / ddst_cuda_element_bytes(dtype);
  if (fused && (grid.in_channels % vector || grid.out_channels % vector))
    fail(kOp, "channels must be multiples of ", vector, " in a fused half block");
  const int64_t slots = block_row.numel();
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  WeightGradShape s{};
  s.images = narrow(input.size(0)), s.in_h = narrow(input.size(2) * upsample),
  s.in_w = narrow(input.size(3) * upsample);
  s.in_channels = narrow(grid.in_channels), s.out_channels = narrow(grid.out_channels);
  s.out_h = narrow(out_size(0)), s.out_w = narrow(out_size(1));
  s.kernel_h = narrow(grid.kernel_h), s.kernel_w = narrow(grid.kernel_w);
  s.stride_h = narrow(stride[0]), s.stride_w = narrow(stride[1]);
  s.pad_h = narrow(padding[0]), s.pad_w = narrow(padding[1]);
  s.dilation_h = narrow(dilation[0]), s.dilation_w = narrow(dilation[1]);
  s.block_out = narrow(grid.block_out), s.block_in = narrow(grid.block_in), s.slots = narrow(slots);
  s.band_rows = narrow(band[0]), s.band_cols = narrow(band[1]);
  s.tile_images = narrow(tile[0]), s.tile_h = narrow(tile[1]), s.tile_w = narrow(tile[2]);
  s.shares = narrow(shares);

  const int element_bytes = ddst_cuda_element_bytes(dtype);
  const int64_t group_units = weight_grad_group_units(s) / kWeightGradWarps * kKernel.warps;
  const WeightGradUse use{fused, upsample * pool > 1};
  const std::string error = kKernel.refusal(s, element_bytes, use, shared_limit(kOp, device));
  if (!error.empty()) fail(kOp, error);
  if (units.numel() % group_units != 0) {
    fail(kOp, "units has ", units.numel(), " numbers, expected a multiple of ", group_units);
  }
  s.groups = narrow(units.numel() / group_units);

  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor values_grad =
      naming_operator(kOp, [&] { return empty_tensor("its output", {slots, grid.block_out, grid.block_in}, input); });
  const int64_t floats = kKernel.partial_floats(s, element_bytes, use);
  const Tensor partials = naming_operator(kOp, [&] {
    return allocated("its partial sums", {floats}, sizeof(float), input,
                     [&] { return torch::stable::new_empty(input, {floats}, ScalarType::Float); });
  });
  const ddst_cuda_weight_grad_arrays arrays{
      grad_output.data_ptr(),
      input.data_ptr(),
      check_index(kOp, "block_row", block_row, slots, device),
      check_index(kOp, "block_col", block_col, slots, device),
      check_index(kOp, "block_tap", block_tap, slots, device),
      check_index(kOp, "units", units, units.numel(), device),
      partials.mutable_data_ptr<float>(),
      values_grad.data_ptr(),
      fused,
      tables.mean,
      tables.scale,
      tables.shift,
      tables.norm,
      upsample == 2,
      pool == 2,
      static_cast<float>(slope),
  };
  check_launch(kOp, kKernel.launch(dtype, &s, &arrays, current_stream(kOp, device)));
  return values_grad;
}

}  // namespace ddst::cuda
