// Glue of the four conv2d ops: argument checks, output tensors, then the passes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "../topology.hpp"
#include "activation.hpp"
#include "conv_passes.hpp"
#include "weight_grad_pass.hpp"

namespace ddst::cpu {
namespace {

void check_grad_output(const char* op, const Tensor& grad_output, const ConvGeometry& g) {
  const Ints expected{g.images, g.out_channels, g.out_h, g.out_w};
  if (!std::equal(expected.begin(), expected.end(), grad_output.sizes().begin())) {
    fail(op, "grad_output has shape ", shape_text(grad_output), ", expected ", shape_text(expected));
  }
}

template <typename T>
Tensor forward(const Tensor& input, const Tensor& values, const T* bias, const Topology& topology,
               const WeightGrid& grid, const ConvGeometry& geometry, bool channels_last) {
  const Kernels<T>& kernels = kernels_for<T>(active_kernels());
  NhwcOutput<T> out(input, output_shape(geometry), channels_last);
  if (geometry.images == 0) return out.finish(kernels);
  const NhwcInput<T> source(input, input_shape(geometry), kernels);
  const Tensor packed = as_contiguous(values);
  forward_pass<T>(kernels, topology, grid, geometry, packed.const_data_ptr<T>(), bias).run(source.data(), out.data());
  return out.finish(kernels);
}

template <typename T>
Tensor input_grad(const Tensor& grad_output, const Tensor& values, const Topology& topology, const WeightGrid& grid,
                  const ConvGeometry& geometry, bool channels_last) {
  const Kernels<T>& kernels = kernels_for<T>(active_kernels());
  NhwcOutput<T> out(grad_output, input_shape(geometry), channels_last);
  if (geometry.images == 0) return out.finish(kernels);
  const NhwcInput<T> source(grad_output, output_shape(geometry), kernels);
  const Tensor packed = as_contiguous(values);
  input_grad_pass<T>(kernels, topology, grid, geometry, packed.const_data_ptr<T>()).run(source.data(), out.data());
  return out.finish(kernels);
}

template <typename T>
Tensor weight_grad(const Tensor& grad_output, const Tensor& input, const Topology& topology, const WeightGrid& grid,
                   const ConvGeometry& geometry) {
  const Kernels<T>& kernels = kernels_for<T>(active_kernels());
  Tensor grad = empty_tensor("its output", {topology.slots, grid.block_out, grid.block_in}, input);
  const NhwcInput<T> x(input, input_shape(geometry), kernels);
  const NhwcInput<T> gy(grad_output, output_shape(geometry), kernels);
  WeightGradPlan<T> plan =
      plan_weight_grad(kernels, flattened(geometry), grid.block_out, grid.block_in, topology.slots, topology.nnz,
                       topology.row_order, topology.block_row, topology.block_col, topology.block_tap);
  T* const out = grad.mutable_data_ptr<T>();
  clear_free_slots(topology, grid, out);
  if (topology.nnz == 0) return grad;
  weight_grad_pass<T>(kernels, plan, x.data(), gy.data(), out);
  return grad;
}

template <typename T>
Tensor block_scores(const Tensor& grad_output, const Tensor& input, const WeightGrid& grid,
                    const ConvGeometry& geometry) {
  const Kernels<T>& kernels = kernels_for<T>(active_kernels());
  Tensor scores = empty_tensor("its output", {grid.rows, grid.cols, grid.kernel_h, grid.kernel_w}, input);
  const NhwcInput<T> x(input, input_shape(geometry), kernels);
  const NhwcInput<T> gy(grad_output, output_shape(geometry), kernels);
  block_scores_pass<T>(kernels, flattened(geometry), grid, x.data(), gy.data(), scores.mutable_data_ptr<T>());
  return scores;
}

Tensor conv2d(const Tensor& input, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& topology,
              const Ints& weight_shape, const Ints& stride, const Ints& padding, const Ints& dilation,
              bool channels_last, int64_t backend, int64_t /*record*/) {
  const char* op = "conv2d";
  check_backend(op, backend);
  const WeightGrid grid = grid_of_values(op, values, weight_shape, 4);
  const Window window = read_window(op, stride, padding, dilation);
  check_activation(op, "input", input, "C_in", grid.in_channels);
  check_dtype(op, "input", input, values.scalar_type(), "values");
  Tensor bias_copy = check_bias(op, bias, values, grid);
  const Topology topo = read_topology(op, topology, grid);
  check_slots(op, values, topo);
  const ConvGeometry g = make_geometry(op, grid, window, input.size(0), input.size(2), input.size(3));
  return in_dtype(op, values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    return forward<T>(input, values, bias ? bias_copy.const_data_ptr<T>() : nullptr, topo, grid, g, channels_last);
  });
}

Tensor conv2d_input_grad(const Tensor& grad_output, const Tensor& values, const Tensor& topology,
                         const Ints& weight_shape, const Ints& input_size, const Ints& stride, const Ints& padding,
                         const Ints& dilation, bool channels_last, int64_t backend, int64_t /*record*/) {
  const char* op = "conv2d_input_grad";
  check_backend(op, backend);
  const WeightGrid grid = grid_of_values(op, values, weight_shape, 4);
  const Window window = read_window(op, stride, padding, dilation);
  check_pair(op, "input_size", input_size, 1);
  check_activation(op, "grad_output", grad_output, "C_out", grid.out_channels);
  check_dtype(op, "grad_output", grad_output, values.scalar_type(), "values");
  const Topology topo = read_topology(op, topology, grid);
  check_slots(op, values, topo);
  const ConvGeometry g = make_geometry(op, grid, window, grad_output.size(0), input_size[0], input_size[1]);
  check_grad_output(op, grad_output, g);
  return in_dtype(op, values.scalar_type(), [&](auto zero) {
    return input_grad<decltype(zero)>(grad_output, values, topo, grid, g, channels_last);
  });
}

ConvGeometry check_gradient_operands(const char* op, const Tensor& grad_output, const Tensor& input,
                                     const WeightGrid& grid, const Window& window) {
  check_floating(op, "input", input);
  check_dtype(op, "grad_output", grad_output, input.scalar_type(), "input");
  check_activation(op, "input", input, "C_in", grid.in_channels);
  check_activation(op, "grad_output", grad_output, "C_out", grid.out_channels);
  const ConvGeometry g = make_geometry(op, grid, window, input.size(0), input.size(2), input.size(3));
  check_grad_output(op, grad_output, g);
  return g;
}

Tensor conv2d_weight_grad(const Tensor& grad_output, const Tensor& input, const Tensor& topology,
                          const Ints& weight_shape, const Ints& block, const Ints& stride, const Ints& padding,
                          const Ints& dilation, int64_t backend) {
  const char* op = "conv2d_weight_grad";
  check_backend(op, backend);
  const WeightGrid grid = grid_of_block(op, block, weight_shape, 4);
  const Window window = read_window(op, stride, padding, dilation);
  const ConvGeometry g = check_gradient_operands(op, grad_output, input, grid, window);
  const Topology topo = read_topology(op, topology, grid);
  return in_dtype(op, input.scalar_type(),
                  [&](auto zero) { return weight_grad<decltype(zero)>(grad_output, input, topo, grid, g); });
}

Tensor conv2d_block_scores(const Tensor& grad_output, const Tensor& input, const Ints& weight_shape, const Ints& block,
                           const Ints& stride, const Ints& padding, const Ints& dilation) {
  const char* op = "conv2d_block_scores";
  const WeightGrid grid = grid_of_block(op, block, weight_shape, 4);
  const Window window = read_window(op, stride, padding, dilation);
  const ConvGeometry g = check_gradient_operands(op, grad_output, input, grid, window);
  return in_dtype(op, input.scalar_type(),
                  [&](auto zero) { return block_scores<decltype(zero)>(grad_output, input, grid, g); });
}

}  // namespace
}  // namespace ddst::cpu

STABLE_TORCH_LIBRARY_IMPL(ddst, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&ddst::cpu::conv2d));
  m.impl("conv2d_input_grad", TORCH_BOX(&ddst::cpu::conv2d_input_grad));
  m.impl("conv2d_weight_grad", TORCH_BOX(&ddst::cpu::conv2d_weight_grad));
  m.impl("conv2d_block_scores", TORCH_BOX(&ddst::cpu::conv2d_block_scores));
}
