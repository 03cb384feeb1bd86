// The two passes of a convolution that gather: forward and input gradient, over images of given sizes.
#pragma once

#include "conv_geometry.hpp"
#include "gather_pass.hpp"

namespace ddst::cpu {

// most_tasks: threads to use, 0 for all of torch's. reused: it runs more than once.
template <typename T>
GatherPass<T> forward_pass(const Kernels<T>& kernels, const Topology& topology, const WeightGrid& grid,
                           const ConvGeometry& geometry, const T* values, const T* bias, int64_t most_tasks = 0,
                           bool reused = false) {
  const ConvGeometry g = flattened(geometry);
  return GatherPass<T>(
      kernels, GatherShape{input_shape(g), output_shape(g), g.kernel_w, grid.block_out, grid.block_in},
      BlockLists{grid.rows, topology.nnz, topology.row_ptr, topology.row_order, topology.block_col, topology.block_tap},
      forward_axis(g.out_h, g.in_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h),
      forward_axis(g.out_w, g.in_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w), true, values, bias, most_tasks,
      reused);
}

template <typename T>
GatherPass<T> input_grad_pass(const Kernels<T>& kernels, const Topology& topology, const WeightGrid& grid,
                              const ConvGeometry& geometry, const T* values, int64_t most_tasks = 0,
                              bool reused = false) {
  const ConvGeometry g = flattened(geometry);
  return GatherPass<T>(
      kernels, GatherShape{output_shape(g), input_shape(g), g.kernel_w, grid.block_in, grid.block_out},
      BlockLists{grid.cols, topology.nnz, topology.col_ptr, topology.col_order, topology.block_row, topology.block_tap},
      input_grad_axis(g.in_h, g.out_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h),
      input_grad_axis(g.in_w, g.out_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w), false, values, nullptr,
      most_tasks, reused);
}

}  // namespace ddst::cpu
