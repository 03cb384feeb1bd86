// Glue of the four conv2d ops: argument checks, output tensors, then the passes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "../topology.hpp"
#include "activation.hpp"
#include "gather_pass.hpp"
#include "weight_grad_pass.hpp"

namespace ddst::cpu {
namespace {

struct Window {
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

void check_pair(const char* op, const char* name, const Ints& pair, int64_t least) {
  if (pair.size() != 2 || pair[0] < least || pair[1] < least || pair[0] > INT32_MAX || pair[1] > INT32_MAX) {
    fail(op, name, " is ", shape_text(pair), ", expected two ints from ", least, " to 2^31 - 1");
  }
}

Window read_window(const char* op, const Ints& stride, const Ints& padding, const Ints& dilation) {
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  return {stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
}

void check_activation(const char* op, const char* name, const Tensor& t, const char* channels_name, int64_t channels) {
  check_cpu(op, name, t);
  if (t.dim() != 4) fail(op, name, " has shape ", shape_text(t), ", expected 4 dimensions [N, C, H, W]");
  if (t.size(1) != channels) {
    fail(op, name, " has ", t.size(1), " channels (shape ", shape_text(t), "), expected ", channels, " (",
         channels_name, " of weight_shape)");
  }
  for (int i = 2; i < 4; ++i) {
    if (t.size(i) > INT32_MAX)
      fail(op, name, " has shape ", shape_text(t), ", expected at most 2^31 - 1 rows and columns");
  }
}

// The geometry of a forward convolution over images of h x w; fails where the kernel does not fit.
ConvGeometry make_geometry(const char* op, const WeightGrid& grid, const Window& w, int64_t images, int64_t h,
                           int64_t wide) {
  const auto out_size = [&](int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    const int64_t room = in + 2 * pad - dilation * (kernel - 1) - 1;
    return room < 0 ? int64_t{0} : room / stride + 1;
  };
  ConvGeometry g{};
  g.images = images;
  g.in_h = h;
  g.in_w = wide;
  g.in_channels = grid.in_channels;
  g.out_channels = grid.out_channels;
  g.kernel_h = grid.kernel_h;
  g.kernel_w = grid.kernel_w;
  g.stride_h = w.stride_h;
  g.stride_w = w.stride_w;
  g.pad_h = w.pad_h;
  g.pad_w = w.pad_w;
  g.dilation_h = w.dilation_h;
  g.dilation_w = w.dilation_w;
  g.out_h = out_size(h, g.kernel_h, w.stride_h, w.pad_h, w.dilation_h);
  g.out_w = out_size(wide, g.kernel_w, w.stride_w, w.pad_w, w.dilation_w);
  if (h < 1 || wide < 1 || g.out_h < 1 || g.out_w < 1) {
    fail(op, "input of ", h, " x ", wide, " pixels with padding [", w.pad_h, ", ", w.pad_w,
         "] is smaller than the kernel of ", g.kernel_h, " x ", g.kernel_w, " with dilation [", w.dilation_h, ", ",
         w.dilation_w, "]");
  }
  if (g.out_h > INT32_MAX || g.out_w > INT32_MAX) {
    fail(op, "padding [", w.pad_h, ", ", w.pad_w, "] makes an output of ", g.out_h, " x ", g.out_w,
         " pixels, expected at most 2^31 - 1 rows and columns");
  }
  for (const Ints& sizes : {Ints{images, g.in_channels, h, wide}, Ints{images, g.out_channels, g.out_h, g.out_w}}) {
    if (!tensor_bytes(sizes, sizeof(double))) {
      fail(op, "stride [", w.stride_h, ", ", w.stride_w, "] and padding [", w.pad_h, ", ", w.pad_w,
           "] make a tensor of shape ", shape_text(sizes), ", expected less than 2^63 bytes");
    }
  }
  return g;
}

// A 1x1 convolution without stride and padding is a product per pixel: the image structure only costs time.
bool is_pointwise(const ConvGeometry& g) {
  return g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 0 && g.pad_w == 0;
}

ConvGeometry flattened(ConvGeometry g) {
  if (!is_pointwise(g)) return g;
  g.images = g.images * g.out_h * g.out_w;
  g.in_h = g.in_w = g.out_h = g.out_w = 1;
  return g;
}

ImageShape input_shape(const ConvGeometry& g) { return {g.images, g.in_channels, g.in_h, g.in_w}; }
ImageShape output_shape(const ConvGeometry& g) { return {g.images, g.out_channels, g.out_h, g.out_w}; }

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
  const ConvGeometry g = flattened(geometry);
  const AxisPlan rows = forward_axis(g.out_h, g.in_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h);
  const AxisPlan cols = forward_axis(g.out_w, g.in_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w);
  const GatherShape shape{input_shape(g), output_shape(g), g.kernel_w, grid.block_out, grid.block_in};
  const BlockLists lists{grid.rows,          topology.nnz,       topology.row_ptr,
                         topology.row_order, topology.block_col, topology.block_tap};
  gather_pass<T>(kernels, shape, lists, rows, cols, true, packed.const_data_ptr<T>(), bias, source.data(), out.data());
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
  const ConvGeometry g = flattened(geometry);
  const AxisPlan rows = input_grad_axis(g.in_h, g.out_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h);
  const AxisPlan cols = input_grad_axis(g.in_w, g.out_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w);
  const GatherShape shape{output_shape(g), input_shape(g), g.kernel_w, grid.block_in, grid.block_out};
  const BlockLists lists{grid.cols,          topology.nnz,       topology.col_ptr,
                         topology.col_order, topology.block_row, topology.block_tap};
  gather_pass<T>(kernels, shape, lists, rows, cols, false, packed.const_data_ptr<T>(), nullptr, source.data(),
                 out.data());
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
