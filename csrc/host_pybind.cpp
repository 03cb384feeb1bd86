// ddst._lib._host: work on the host that touches numpy arrays and never a tensor, since pybind11 has no stable ABI and
// this file is built once per CPython. ddst/_host.py holds the same in Python, for a CPython that no file was built
// for.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

std::string text(const py::handle& object) { return py::str(object).cast<std::string>(); }

// The items by their keys 0 … keys - 1, those of equal key in the order they had: a counting sort.
std::vector<int32_t> sorted_by(const std::vector<int32_t>& items, int64_t keys, const int32_t* key) {
  std::vector<int64_t> next(keys + 1, 0);
  for (int32_t item : items) ++next[key[item] + 1];
  for (int64_t k = 0; k < keys; ++k) next[k + 1] += next[k];
  std::vector<int32_t> sorted(items.size());
  for (int32_t item : items) sorted[next[key[item]]++] = item;
  return sorted;
}

// [count + 1]: how many items have a key below 0, 1, … count.
void write_starts(const std::vector<int32_t>& items, int64_t count, const int32_t* key, int32_t* starts) {
  std::fill_n(starts, count + 1, 0);
  for (int32_t item : items) ++starts[key[item] + 1];
  for (int64_t k = 0; k < count; ++k) starts[k + 1] += starts[k];
}

// The topology vector of ddst/topology.py: row_ptr [R+1] | col_ptr [C+1] | block_row [slots] | block_col [slots] |
// block_tap [slots] | row_order [slots] | col_order [slots].
py::array_t<int32_t> topology_of_slots(const py::object& slot_blocks, int64_t rows, int64_t cols, int64_t taps) {
  if (!py::isinstance<py::array>(slot_blocks)) {
    throw py::type_error("slot_blocks must be an int32 array, got " + text(py::type::of(slot_blocks).attr("__name__")));
  }
  const auto any_ranks = py::reinterpret_borrow<py::array>(slot_blocks);
  if (!any_ranks.dtype().equal(py::dtype::of<int32_t>())) {
    throw py::type_error("slot_blocks must be an int32 array, got dtype " + text(any_ranks.dtype()));
  }
  if (any_ranks.ndim() != 1) {
    throw py::value_error("slot_blocks must have the shape [slots], got " + text(any_ranks.attr("shape")));
  }
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  const std::string grid = "(" + std::to_string(rows) + ", " + std::to_string(cols) + ", " + std::to_string(taps) + ")";
  if (rows < 1 || cols < 1 || taps < 1) {
    throw py::value_error("rows, cols and taps must be at least 1, got " + grid);
  }
  if (rows > most / cols || rows * cols > most / taps) {
    throw py::value_error("rows, cols and taps make more blocks than int32 can index, got " + grid);
  }
  const auto ranks = py::array_t<int32_t, py::array::c_style | py::array::forcecast>(any_ranks);
  const int32_t* const rank = ranks.data();
  const int64_t slots = ranks.size(), total = rows * cols * taps;
  if (slots > most)
    throw py::value_error("slot_blocks has more slots than int32 can index, got " + std::to_string(slots));

  py::array_t<int32_t> topology(rows + 1 + cols + 1 + 5 * slots);
  int32_t* const row_ptr = topology.mutable_data();
  int32_t* const col_ptr = row_ptr + rows + 1;
  int32_t* const block_row = col_ptr + cols + 1;
  int32_t* const block_col = block_row + slots;
  int32_t* const block_tap = block_col + slots;
  int32_t* const row_order = block_tap + slots;
  int32_t* const col_order = row_order + slots;

  std::vector<int32_t> active, free;
  active.reserve(slots);
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (rank[slot] < -1 || rank[slot] >= total) {
      throw py::value_error("slot_blocks must hold ranks below " + std::to_string(total) + ", or -1, got " +
                            std::to_string(rank[slot]) + " in slot " + std::to_string(slot));
    }
    const bool is_free = rank[slot] < 0;
    (is_free ? free : active).push_back(static_cast<int32_t>(slot));
    block_row[slot] = static_cast<int32_t>(is_free ? rows : rank[slot] / (cols * taps));
    block_col[slot] = static_cast<int32_t>(is_free ? cols : rank[slot] / taps % cols);
    block_tap[slot] = static_cast<int32_t>(is_free ? 0 : rank[slot] % taps);
  }
  // Sorts keep the order of equal keys: the last one decides first.
  const std::vector<int32_t> by_tap = sorted_by(active, taps, block_tap);
  const std::vector<int32_t> by_row = sorted_by(sorted_by(by_tap, cols, block_col), rows, block_row);
  const std::vector<int32_t> by_col = sorted_by(sorted_by(by_tap, rows, block_row), cols, block_col);
  for (size_t i = 1; i < by_row.size(); ++i) {
    if (rank[by_row[i]] == rank[by_row[i - 1]]) {
      throw py::value_error("slot_blocks must hold each block once, got " + std::to_string(rank[by_row[i]]) +
                            " in the slots " + std::to_string(by_row[i - 1]) + " and " + std::to_string(by_row[i]));
    }
  }
  write_starts(active, rows, block_row, row_ptr);
  write_starts(active, cols, block_col, col_ptr);
  std::copy(free.begin(), free.end(), std::copy(by_row.begin(), by_row.end(), row_order));
  std::copy(free.begin(), free.end(), std::copy(by_col.begin(), by_col.end(), col_order));
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
  m.def("topology_of_slots", &topology_of_slots, py::arg("slot_blocks"), py::arg("rows"), py::arg("cols"),
        py::arg("taps"), "Topology vector (int32) of the blocks in slots.");
  m.def("build_info", &build_info, "What this module was built with.");
}
