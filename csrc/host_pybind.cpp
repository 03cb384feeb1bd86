// ddst._lib._host: work on the host that touches numpy arrays and never a tensor, since pybind11 has no stable ABI and
// this file is built once per CPython. ddst/_host.py holds the same in Python, for a CPython that no file was built
// for.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

std::string shape_text(const py::array& array) { return py::str(array.attr("shape")).cast<std::string>(); }

// The topology vector of ddst/topology.py:
// row_ptr [R+1] | col_ptr [C+1] | block_row [nnz] | block_col [nnz] | block_tap [nnz] | row_order [nnz]
// | col_order [nnz], a mask's slots being row-major.
py::array_t<int32_t> build_topology(const py::object& mask_object) {
  if (!py::isinstance<py::array>(mask_object)) {
    throw py::type_error("mask must be a bool array, got " +
                         py::type::of(mask_object).attr("__name__").cast<std::string>());
  }
  const auto any_mask = py::reinterpret_borrow<py::array>(mask_object);
  if (!any_mask.dtype().equal(py::dtype::of<bool>())) {
    throw py::type_error("mask must be a bool array, got dtype " + py::str(any_mask.dtype()).cast<std::string>());
  }
  if (any_mask.ndim() != 2 && any_mask.ndim() != 4) {
    throw py::value_error("mask must have the shape [R, C] or [R, C, kH, kW], got " + shape_text(any_mask));
  }
  const auto mask = py::array_t<bool, py::array::c_style | py::array::forcecast>(any_mask);
  if (mask.size() > std::numeric_limits<int32_t>::max()) {
    throw py::value_error("mask has more blocks than int32 can index, got " + shape_text(any_mask));
  }
  const int64_t rows = mask.shape(0), cols = mask.shape(1);
  const int64_t taps = mask.ndim() == 4 ? mask.shape(2) * mask.shape(3) : 1;
  const bool* active = mask.data();

  std::vector<int64_t> row_count(rows, 0), col_count(cols, 0);
  for (int64_t block = 0; block < rows * cols * taps; ++block) {
    if (active[block]) {
      ++row_count[block / (cols * taps)];
      ++col_count[block / taps % cols];
    }
  }
  int64_t nnz = 0;
  for (int64_t count : row_count) nnz += count;

  py::array_t<int32_t> topology(rows + 1 + cols + 1 + 5 * nnz);
  int32_t* row_ptr = topology.mutable_data();
  int32_t* col_ptr = row_ptr + rows + 1;
  int32_t* block_row = col_ptr + cols + 1;
  int32_t* block_col = block_row + nnz;
  int32_t* block_tap = block_col + nnz;
  int32_t* row_order = block_tap + nnz;
  int32_t* col_order = row_order + nnz;
  row_ptr[0] = col_ptr[0] = 0;
  for (int64_t r = 0; r < rows; ++r) row_ptr[r + 1] = static_cast<int32_t>(row_ptr[r] + row_count[r]);
  for (int64_t c = 0; c < cols; ++c) col_ptr[c + 1] = static_cast<int32_t>(col_ptr[c] + col_count[c]);

  // Ids rise with the row, then the tap, within each column: appending keeps col_order sorted as documented.
  std::vector<int32_t> next(col_ptr, col_ptr + cols);
  int32_t id = 0;
  for (int64_t block = 0; block < rows * cols * taps; ++block) {
    if (!active[block]) continue;
    const int64_t col = block / taps % cols;
    block_row[id] = static_cast<int32_t>(block / (cols * taps));
    block_col[id] = static_cast<int32_t>(col);
    block_tap[id] = static_cast<int32_t>(block % taps);
    row_order[id] = id;
    col_order[next[col]++] = id;
    ++id;
  }
  return topology;
}

py::dict build_info() {
  py::dict facts;
#if defined(__clang__)
  facts["compiler"] = "clang " __clang_version__;
#else
  facts["compiler"] = "gcc " __VERSION__;
#endif
  facts["build_type"] = DDST_BUILD_TYPE;
  facts["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  return facts;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side helpers of ddst on numpy arrays.";
  m.def("build_topology", &build_topology, py::arg("mask"), "Topology vector (int32) of a bool block mask.");
  m.def("build_info", &build_info, "What this module was built with.");
}
