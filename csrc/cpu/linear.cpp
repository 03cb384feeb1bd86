// Glue of the four linear ops. A linear layer is a 1x1 convolution over images of one pixel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../topology.hpp"
#include "activation.hpp"
#include "gather_pass.hpp"
#include "weight_grad_pass.hpp"

namespace ddst::cpu {
namespace {

void check_matrix(const char* op, const char* name, const Tensor& t, const char* features_name, int64_t features) {
  check_cpu(op, name, t);
  if (t.dim() != 2) fail(op, name, " has shape ", shape_text(t), ", expected 2 dimensions [batch, features]");
  if (t.size(1) != features) {
    fail(op, name, " has ", t.size(1), " features (shape ", shape_text(t), "), expected ", features, " (",
         features_name, " of weight_shape)");
  }
}

ConvGeometry linear_geometry(const WeightGrid& grid, int64_t batch) {
  ConvGeometry g{};
  g.images = batch;
  g.in_channels = grid.in_channels;
  g.out_channels = grid.out_channels;
  g.in_h = g.in_w = g.out_h = g.out_w = 1;
  g.kernel_h = g.kernel_w = g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = 1;
  return g;
}

// Forward (transposed) or input gradient of one matrix.
template <typename T>
Tensor product(const Tensor& source, const Tensor& values, const T* bias, const WeightGrid& grid,
               const BlockLists& lists, bool transposed) {
  const Kernels<T>& kernels = kernels_for<T>(active_kernels());
  const int64_t batch = source.size(0);
  const int64_t from = transposed ? grid.in_channels : grid.out_channels;
  const int64_t to = transposed ? grid.out_channels : grid.in_channels;
  Tensor out = empty_tensor("its output", {batch, to}, source);
  if (batch == 0) return out;
  const Tensor dense_source = as_contiguous(source);
  const Tensor packed = as_contiguous(values);
  const AxisPlan axis = forward_axis(1, 1, 1, 1, 0, 1);
  const GatherShape shape{{batch, from, 1, 1},
                          {batch, to, 1, 1},
                          1,
                          transposed ? grid.block_out : grid.block_in,
                          transposed ? grid.block_in : grid.block_out};
  const GatherPass<T> pass(kernels, shape, lists, axis, axis, transposed, packed.const_data_ptr<T>(), bias, 0, false);
  pass.run(dense_source.const_data_ptr<T>(), out.mutable_data_ptr<T>());
  return out;
}

template <typename T>
Tensor weight_grad(const Tensor& grad_output, const Tensor& input, const Topology& topology, const WeightGrid& grid) {
  const Kernels<T>& kernels = kernels_for<T>(active_kernels());
  Tensor grad = empty_tensor("its output", {topology.slots, grid.block_out, grid.block_in}, input);
  const Tensor x = as_contiguous(input);
  const Tensor gy = as_contiguous(grad_output);
  WeightGradPlan<T> plan =
      plan_weight_grad(kernels, linear_geometry(grid, input.size(0)), grid.block_out, grid.block_in, topology.slots,
                       topology.nnz, topology.row_order, topology.block_row, topology.block_col, topology.block_tap);
  T* const out = grad.mutable_data_ptr<T>();
  clear_free_slots(topology, grid, out);
  if (topology.nnz == 0) return grad;
  weight_grad_pass<T>(kernels, plan, x.const_data_ptr<T>(), gy.const_data_ptr<T>(), out);
  return grad;
}

template <typename T>
Tensor block_scores(const Tensor& grad_output, const Tensor& input, const WeightGrid& grid) {
  const Kernels<T>& kernels = kernels_for<T>(active_kernels());
  Tensor scores = empty_tensor("its output", {grid.rows, grid.cols}, input);
  const Tensor x = as_contiguous(input);
  const Tensor gy = as_contiguous(grad_output);
  block_scores_pass<T>(kernels, linear_geometry(grid, input.size(0)), grid, x.const_data_ptr<T>(),
                       gy.const_data_ptr<T>(), scores.mutable_data_ptr<T>());
  return scores;
}

Tensor linear(const Tensor& input, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& topology,
              const Ints& weight_shape, int64_t backend, int64_t /*record*/) {
  const char* op = "linear";
  check_backend(op, backend);
  const WeightGrid grid = grid_of_values(op, values, weight_shape, 2);
  check_matrix(op, "input", input, "C_in", grid.in_channels);
  check_dtype(op, "input", input, values.scalar_type(), "values");
  Tensor bias_copy = check_bias(op, bias, values, grid);
  const Topology topo = read_topology(op, topology, grid);
  check_slots(op, values, topo);
  const BlockLists lists{grid.rows, topo.nnz, topo.row_ptr, topo.row_order, topo.block_col, topo.block_tap};
  return in_dtype(op, values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    return product<T>(input, values, bias ? bias_copy.const_data_ptr<T>() : nullptr, grid, lists, true);
  });
}

Tensor linear_input_grad(const Tensor& grad_output, const Tensor& values, const Tensor& topology,
                         const Ints& weight_shape, int64_t backend, int64_t /*record*/) {
  const char* op = "linear_input_grad";
  check_backend(op, backend);
  const WeightGrid grid = grid_of_values(op, values, weight_shape, 2);
  check_matrix(op, "grad_output", grad_output, "C_out", grid.out_channels);
  check_dtype(op, "grad_output", grad_output, values.scalar_type(), "values");
  const Topology topo = read_topology(op, topology, grid);
  check_slots(op, values, topo);
  const BlockLists lists{grid.cols, topo.nnz, topo.col_ptr, topo.col_order, topo.block_row, topo.block_tap};
  return in_dtype(op, values.scalar_type(),
                  [&](auto zero) { return product<decltype(zero)>(grad_output, values, nullptr, grid, lists, false); });
}

void check_gradient_operands(const char* op, const Tensor& grad_output, const Tensor& input, const WeightGrid& grid) {
  check_floating(op, "input", input);
  check_dtype(op, "grad_output", grad_output, input.scalar_type(), "input");
  check_matrix(op, "input", input, "C_in", grid.in_channels);
  check_matrix(op, "grad_output", grad_output, "C_out", grid.out_channels);
  if (grad_output.size(0) != input.size(0)) {
    fail(op, "grad_output has batch ", grad_output.size(0), ", expected ", input.size(0), " as in input");
  }
}

Tensor linear_weight_grad(const Tensor& grad_output, const Tensor& input, const Tensor& topology,
                          const Ints& weight_shape, const Ints& block, int64_t backend) {
  const char* op = "linear_weight_grad";
  check_backend(op, backend);
  const WeightGrid grid = grid_of_block(op, block, weight_shape, 2);
  check_gradient_operands(op, grad_output, input, grid);
  const Topology topo = read_topology(op, topology, grid);
  return in_dtype(op, input.scalar_type(),
                  [&](auto zero) { return weight_grad<decltype(zero)>(grad_output, input, topo, grid); });
}

Tensor linear_block_scores(const Tensor& grad_output, const Tensor& input, const Ints& weight_shape,
                           const Ints& block) {
  const char* op = "linear_block_scores";
  const WeightGrid grid = grid_of_block(op, block, weight_shape, 2);
  check_gradient_operands(op, grad_output, input, grid);
  return in_dtype(op, input.scalar_type(),
                  [&](auto zero) { return block_scores<decltype(zero)>(grad_output, input, grid); });
}

}  // namespace
}  // namespace ddst::cpu

STABLE_TORCH_LIBRARY_IMPL(ddst, CPU, m) {
  m.impl("linear", TORCH_BOX(&ddst::cpu::linear));
  m.impl("linear_input_grad", TORCH_BOX(&ddst::cpu::linear_input_grad));
  m.impl("linear_weight_grad", TORCH_BOX(&ddst::cpu::linear_weight_grad));
  m.impl("linear_block_scores", TORCH_BOX(&ddst::cpu::linear_block_scores));
}
