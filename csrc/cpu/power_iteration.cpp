// Glue of ddst::power_iteration: all that spectral norm asks of one layer's packed matrix, in one call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../topology.hpp"
#include "activation.hpp"
#include "gather_plan.hpp"

namespace ddst::cpu {
namespace {

// The matrix W [M, N] of spectral norm and its two vectors, v in the order (block, tap, channel within the block).
// Packed is W, or its transpose.
template <typename T>
class SpectralMatrix {
 public:
  SpectralMatrix(const Topology& topology, const WeightGrid& grid, const T* values, bool transposed, int64_t taps,
                 int64_t channels)
      : topology_(topology), grid_(grid), values_(values), transposed_(transposed), taps_(taps), channels_(channels) {
    rows_ = transposed ? grid.in_channels : grid.out_channels;
    cols_ = transposed ? grid.out_channels : grid.in_channels;
    width_ = transposed ? grid.block_out : grid.block_in;
  }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }

  void times(const Array<T>& v, Array<T>& u) const { product(!transposed_, v, u); }
  void transposed_times(const Array<T>& u, Array<T>& v) const {
    product(transposed_, u, v);
    clear_beyond(v);
  }

  // Zeroes what stored parts of edge blocks beyond the last channel give: nn.init on values fills them.
  void clear_beyond(Array<T>& v) const {
    for_channels([&](int64_t at, int64_t channel, int64_t) {
      if (channel >= channels_) v[at] = 0;
    });
  }
  void from_dense(const T* dense, Array<T>& v) const {
    for_channels([&](int64_t at, int64_t channel, int64_t tap) {
      v[at] = channel < channels_ ? dense[channel * taps_ + tap] : T(0);
    });
  }
  void to_dense(const Array<T>& v, T* dense) const {
    for_channels([&](int64_t at, int64_t channel, int64_t tap) {
      if (channel < channels_) dense[channel * taps_ + tap] = v[at];
    });
  }

  // u vᵀ at the active blocks, zero outside of the weight and in free slots.
  void outer(const Array<T>& u, const Array<T>& v, T* out) const {
    const Array<T>& left = transposed_ ? v : u;
    const Array<T>& right = transposed_ ? u : v;
    std::fill_n(out, topology_.slots * grid_.block_out * grid_.block_in, T(0));
    for (int64_t at = 0; at < topology_.nnz; ++at) {
      const int64_t slot = topology_.row_order[at];
      const int64_t row = topology_.block_row[slot] * grid_.block_out, col = topology_.block_col[slot] * grid_.block_in;
      const int64_t n_rows = std::min(grid_.block_out, grid_.out_channels - row);
      const int64_t n_cols = std::min(grid_.block_in, grid_.in_channels - col);
      T* block = out + slot * grid_.block_out * grid_.block_in;
      for (int64_t r = 0; r < n_rows; ++r, block += grid_.block_in) {
        for (int64_t c = 0; c < n_cols; ++c) block[c] = left[row + r] * right[col + c];
      }
    }
  }

 private:
  // The packed matrix, or its transpose, times a vector.
  void product(bool straight, const Array<T>& source, Array<T>& out) const {
    const Topology& t = topology_;
    BlockVectorJob<T> job{};
    job.values = values_;
    job.source = source.data();
    job.out = out.data();
    job.source_size = static_cast<int64_t>(source.size());
    job.out_size = static_cast<int64_t>(out.size());
    job.ptr = straight ? t.row_ptr : t.col_ptr;
    job.ids = straight ? t.row_order : t.col_order;
    job.k_block = straight ? t.block_col : t.block_row;
    job.block_out = straight ? grid_.block_out : grid_.block_in;
    job.block_k = straight ? grid_.block_in : grid_.block_out;
    job.row_major = straight;
    const BlockLists lists{straight ? grid_.rows : grid_.cols, t.nnz, job.ptr, job.ids, job.k_block, t.block_tap};
    const int64_t tasks = std::min(task_count(t.nnz * grid_.block_out * grid_.block_in), lists.out_blocks);
    const Kernels<T>& kernels = kernels_for<T>(active_kernels());
    run_tasks(tasks, [&](int64_t task) {
      kernels.block_vector(job, lists.first_block(task, tasks), lists.first_block(task + 1, tasks));
    });
  }

  // f(position in v's order, channel, tap)
  template <typename F>
  void for_channels(const F& f) const {
    int64_t at = 0;
    for (int64_t first = 0; at < cols_; first += width_)
      for (int64_t tap = 0; tap < taps_; ++tap)
        for (int64_t c = 0; c < width_; ++c) f(at++, first + c, tap);
  }

  const Topology& topology_;
  const WeightGrid& grid_;
  const T* values_;
  bool transposed_;
  int64_t taps_, channels_, rows_, cols_, width_;
};

// x / max(‖x‖, eps); returns ‖x‖.
template <typename T>
T make_unit(Array<T>& x, double eps) {
  double squares = 0;
  for (T entry : x) squares += static_cast<double>(entry) * static_cast<double>(entry);
  const T norm = static_cast<T>(std::sqrt(squares));
  const T length = std::isnan(norm) ? norm : std::max(norm, static_cast<T>(eps));
  for (T& entry : x) entry /= length;
  return norm;
}

// x + noise · g / √n: the numbers of _noise_like in ddst/nn/spectral_norm.py, a hash of each entry's place.
template <typename T>
Array<T> with_noise(const Array<T>& x, double noise) {
  Array<T> noisy = x;
  if (noise == 0) return noisy;
  const T share = static_cast<T>(noise / std::sqrt(static_cast<double>(x.size())));
  for (size_t i = 0; i < noisy.size(); ++i) {
    uint32_t bits = static_cast<uint32_t>(i + 1) * 0x9E3779B1u;
    for (int round = 0; round < 2; ++round) bits = (bits ^ (bits >> 16)) * 0x045D9F3Bu;
    bits ^= bits >> 16;
    noisy[i] += share * ((static_cast<T>(bits) / T(2147483648.0) - T(1)) * static_cast<T>(std::sqrt(3.0)));
  }
  return noisy;
}

struct Iteration {
  int64_t taps, iterations;
  bool transposed, parametrization;
  double eps, noise;
};

template <typename T>
Tensor iterate(const Tensor& values, const Topology& topology, const WeightGrid& grid, Tensor& u_buffer,
               Tensor& v_buffer, const Iteration& how) {
  Tensor direction = empty_tensor("its output", {topology.slots, grid.block_out, grid.block_in}, values);
  const Tensor packed = as_contiguous(values);
  const SpectralMatrix<T> matrix(topology, grid, packed.const_data_ptr<T>(), how.transposed, how.taps,
                                 v_buffer.numel() / how.taps);
  Array<T> u(matrix.rows()), v(matrix.cols());
  T* const u_dense = u_buffer.mutable_data_ptr<T>();
  T* const v_dense = v_buffer.mutable_data_ptr<T>();
  std::copy_n(u_dense, matrix.rows(), u.data());
  matrix.from_dense(v_dense, v);
  const Array<T> old_u = u, old_v = v;
  T norm = 1;
  for (int64_t i = 0; i < how.iterations; ++i) {
    if (how.parametrization) {
      Array<T> start = with_noise(v, how.noise);
      matrix.clear_beyond(start);
      matrix.times(start, u);
      norm = make_unit(u, how.eps);
      matrix.transposed_times(u, v);
      make_unit(v, how.eps);
    } else {
      matrix.transposed_times(with_noise(u, how.noise), v);
      norm = make_unit(v, how.eps);
      matrix.times(v, u);
      make_unit(u, how.eps);
    }
  }
  // A zero weight has no directions, and zero vectors would stay zero for ever: the old ones are kept.
  if (how.noise == 0 && !(norm > 0)) u = old_u, v = old_v;
  if (how.iterations > 0) {
    std::copy_n(u.data(), matrix.rows(), u_dense);
    matrix.to_dense(v, v_dense);
  }
  matrix.outer(u, v, direction.mutable_data_ptr<T>());
  return direction;
}

void check_vector(const char* op, const char* name, const Tensor& vector, const Tensor& values, int64_t size) {
  check_cpu(op, name, vector);
  check_dtype(op, name, vector, values.scalar_type(), "values");
  if (vector.dim() != 1 || vector.size(0) != size || !vector.is_contiguous()) {
    fail(op, name, " has shape ", shape_text(vector), ", expected [", size, "], contiguous");
  }
}

Tensor power_iteration(const Tensor& values, const Tensor& topology, Tensor u, Tensor v, const Ints& matrix_shape,
                       int64_t channels, int64_t taps, int64_t iterations, int64_t transposed, int64_t parametrization,
                       double eps, double noise) {
  const char* op = "power_iteration";
  const WeightGrid grid = grid_of_values(op, values, matrix_shape, 2);
  const Topology topo = read_topology(op, topology, grid);
  check_slots(op, values, topo);
  const int64_t cols = transposed ? grid.out_channels : grid.in_channels;
  const int64_t width = transposed ? grid.block_out : grid.block_in;
  if (taps < 1 || channels < 1 || ceil_div(channels, width) * width * taps != cols) {
    fail(op, "channels is ", channels, " and taps is ", taps, ", expected such that ", cols, " columns are blocks of ",
         width, " of them");
  }
  check_vector(op, "u", u, values, transposed ? grid.in_channels : grid.out_channels);
  check_vector(op, "v", v, values, channels * taps);
  const Iteration how{taps, iterations, transposed != 0, parametrization != 0, eps, noise};
  return in_dtype(op, values.scalar_type(),
                  [&](auto zero) { return iterate<decltype(zero)>(values, topo, grid, u, v, how); });
}

}  // namespace
}  // namespace ddst::cpu

STABLE_TORCH_LIBRARY_IMPL(ddst, CPU, m) { m.impl("power_iteration", TORCH_BOX(&ddst::cpu::power_iteration)); }
