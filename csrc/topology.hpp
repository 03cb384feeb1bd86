// The packed topology tensor as the kernels see it, and the checks of every argument that describes a sparse weight.
// The format itself is documented in ddst/topology.py.
#pragma once

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.hpp"

namespace ddst {

// Throws std::invalid_argument (ValueError in Python) with the op's name and the parts of the message.
template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "ddst::" << op << ": ";
  ((message << parts), ...);
  throw std::invalid_argument(message.str());
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A block-sparse weight: channels, taps and the grid of blocks. A linear weight has one tap.
struct WeightGrid {
  int64_t out_channels, in_channels, kernel_h, kernel_w;
  int64_t block_out, block_in;
  int64_t rows, cols, taps;  // block grid

  WeightGrid(const char* op, const Ints& weight_shape, int64_t dims, int64_t b_out, int64_t b_in) {
    if (static_cast<int64_t>(weight_shape.size()) != dims) {
      fail(op, "weight_shape has ", weight_shape.size(), " numbers, expected ", dims, " (",
           dims == 4 ? "[C_out, C_in, kH, kW]" : "[C_out, C_in]", "), got ", shape_text(weight_shape));
    }
    for (int64_t size : weight_shape) {
      if (size < 1 || size > INT32_MAX)
        fail(op, "weight_shape must hold positive int32 sizes, got ", shape_text(weight_shape));
    }
    if (b_out < 1 || b_in < 1 || b_out > 4096 || b_in > 4096) {
      fail(op, "block is [", b_out, ", ", b_in, "], expected both between 1 and 4096");
    }
    out_channels = weight_shape[0];
    in_channels = weight_shape[1];
    kernel_h = dims == 4 ? weight_shape[2] : 1;
    kernel_w = dims == 4 ? weight_shape[3] : 1;
    block_out = b_out;
    block_in = b_in;
    rows = ceil_div(out_channels, block_out);
    cols = ceil_div(in_channels, block_in);
    taps = kernel_h * kernel_w;
    if (rows > INT32_MAX / cols || rows * cols > INT32_MAX / taps) {
      fail(op, "weight_shape ", shape_text(weight_shape), " has more than 2^31 blocks of [", b_out, ", ", b_in, "]");
    }
  }
};

// Pointers into the topology tensor. Holds the tensor, which keeps them alive.
struct Topology {
  Tensor owner;
  int64_t slots, nnz;
  const int32_t *row_ptr, *col_ptr, *block_row, *block_col, *block_tap, *row_order, *col_order;
};

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
  if (!t.is_cpu()) fail(op, name, " is not on the CPU");
}

// The codes stand in ddst/backends.py: 0 is auto, 1 is cpu.
inline void check_backend(const char* op, int64_t backend) {
  if (backend != 0 && backend != 1) fail(op, "backend is ", backend, ", expected 0 (auto) or 1 (cpu) for CPU tensors");
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected, const char* like) {
  if (t.scalar_type() != expected) {
    fail(op, name, " has dtype ", torch::headeronly::toString(t.scalar_type()), ", expected ",
         torch::headeronly::toString(expected), " like ", like);
  }
}

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float && t.scalar_type() != ScalarType::Double) {
    fail(op, name, " has dtype ", torch::headeronly::toString(t.scalar_type()), ", expected Float or Double");
  }
}

// Whether every index lies inside the grid, the orders are those of ddst/topology.py and name each slot once. The
// kernels count on the orders, too: cut blocks come last.
inline bool describes_blocks(const Topology& t, const WeightGrid& grid) {
  const int64_t slots = t.slots, nnz = t.nnz;
  if (nnz < 0 || nnz > slots || t.col_ptr[grid.cols] != nnz || t.row_ptr[0] != 0 || t.col_ptr[0] != 0) return false;
  const auto is_slot = [&](int32_t slot) { return slot >= 0 && slot < slots; };
  for (int64_t r = 0; r < grid.rows; ++r) {
    if (t.row_ptr[r + 1] < t.row_ptr[r] || t.row_ptr[r + 1] > nnz) return false;
    int64_t last = -1;
    for (int64_t i = t.row_ptr[r]; i < t.row_ptr[r + 1]; ++i) {
      const int32_t slot = t.row_order[i];
      if (!is_slot(slot) || t.block_row[slot] != r) return false;
      const int64_t col = t.block_col[slot], tap = t.block_tap[slot], key = col * grid.taps + tap;
      if (col < 0 || col >= grid.cols || tap < 0 || tap >= grid.taps || key <= last) return false;
      last = key;
    }
  }
  for (int64_t c = 0; c < grid.cols; ++c) {
    if (t.col_ptr[c + 1] < t.col_ptr[c] || t.col_ptr[c + 1] > nnz) return false;
    int64_t last = -1;
    for (int64_t i = t.col_ptr[c]; i < t.col_ptr[c + 1]; ++i) {
      const int32_t slot = t.col_order[i];
      // Rows are checked above: a slot with a row of the grid has a tap of it, and there are nnz of them.
      if (!is_slot(slot) || t.block_col[slot] != c || t.block_row[slot] < 0 || t.block_row[slot] >= grid.rows)
        return false;
      const int64_t key = t.block_row[slot] * grid.taps + t.block_tap[slot];
      if (key <= last) return false;
      last = key;
    }
  }
  int32_t last = -1;
  for (int64_t i = nnz; i < slots; ++i) {  // free slots: each once, as they rise
    const int32_t slot = t.row_order[i];
    if (!is_slot(slot) || slot <= last || t.block_row[slot] != grid.rows || t.col_order[i] != slot) return false;
    last = slot;
  }
  return true;
}

// Reads the topology and checks that every index in it lies inside the grid: the kernels trust it from here on.
inline Topology read_topology(const char* op, const Tensor& topology, const WeightGrid& grid) {
  check_cpu(op, "topology", topology);
  if (topology.scalar_type() != ScalarType::Int) {
    fail(op, "topology has dtype ", torch::headeronly::toString(topology.scalar_type()), ", expected Int (int32)");
  }
  if (topology.dim() != 1 || !topology.is_contiguous()) {
    fail(op, "topology has shape ", shape_text(topology), ", expected one contiguous dimension");
  }
  const int64_t index_count = topology.numel() - grid.rows - grid.cols - 2;
  if (index_count < 0 || index_count % 5 != 0) {
    fail(op, "topology has ", topology.numel(), " numbers, expected ", grid.rows, " + 1 + ", grid.cols,
         " + 1 + 5 * slots for ", grid.rows, " block rows and ", grid.cols, " block columns");
  }
  Topology view{topology, index_count / 5, 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  view.row_ptr = topology.const_data_ptr<int32_t>();
  view.col_ptr = view.row_ptr + grid.rows + 1;
  view.block_row = view.col_ptr + grid.cols + 1;
  view.block_col = view.block_row + view.slots;
  view.block_tap = view.block_col + view.slots;
  view.row_order = view.block_tap + view.slots;
  view.col_order = view.row_order + view.slots;
  view.nnz = view.row_ptr[grid.rows];
  if (!describes_blocks(view, grid)) {
    fail(op, "topology does not describe ", view.slots, " slots of a grid of ", grid.rows, " x ", grid.cols, " x ",
         grid.taps, " blocks; build it with ddst.topology");
  }
  return view;
}

// Checks values [slots, b_out, b_in] and returns the grid that it and weight_shape describe.
inline WeightGrid grid_of_values(const char* op, const Tensor& values, const Ints& weight_shape, int64_t dims) {
  check_cpu(op, "values", values);
  check_floating(op, "values", values);
  if (values.dim() != 3) fail(op, "values has shape ", shape_text(values), ", expected [slots, b_out, b_in]");
  return WeightGrid(op, weight_shape, dims, values.size(1), values.size(2));
}

inline void check_slots(const char* op, const Tensor& values, const Topology& topology) {
  if (values.size(0) != topology.slots) {
    fail(op, "values has ", values.size(0), " slots, expected ", topology.slots, " as in topology");
  }
}

// Checks the bias and returns it contiguous (values where there is none: the caller then does not read it).
inline Tensor check_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& values,
                         const WeightGrid& grid) {
  if (!bias) return values;
  check_cpu(op, "bias", *bias);
  check_dtype(op, "bias", *bias, values.scalar_type(), "values");
  if (bias->dim() != 1 || bias->size(0) != grid.out_channels) {
    fail(op, "bias has shape ", shape_text(*bias), ", expected [", grid.out_channels, "]");
  }
  return naming_operator(op, [&] { return as_contiguous(*bias); });
}

inline WeightGrid grid_of_block(const char* op, const Ints& block, const Ints& weight_shape, int64_t dims) {
  if (block.size() != 2) fail(op, "block has ", block.size(), " numbers, expected 2 ([b_out, b_in])");
  return WeightGrid(op, weight_shape, dims, block[0], block[1]);
}

}  // namespace ddst
