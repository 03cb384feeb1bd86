// What the forms of the gather kernel have in common: weights and biases as they stream them, how they store.
#pragma once

#include <vector>

#include "gather_plan.hpp"

namespace ddst::cpu {

// values as [block][slice][k][slice width], or [block][channel][k] for a dot; lanes past the block are zero. Values in
// that order already are not copied.
template <typename T>
class PackedWeights {
 public:
  const int64_t slices, slice_size, block_size;  // sizes in elements

  PackedWeights(const Kernels<T>& kernels, const GatherShape& shape, int64_t nnz, int64_t width, bool dot,
                bool transposed, const T* values)
      : slices(ceil_div(shape.block_out, width)),
        slice_size(width * shape.block_k),
        block_size(slices * slice_size),
        data_(values) {
    if (dot ? transposed || shape.block_out == 1 : !transposed && width == shape.block_out) return;
    copy_ = Buffer<T>(nnz * block_size);
    data_ = copy_.get();
    const int b_out = static_cast<int>(transposed ? shape.block_out : shape.block_k);
    const int b_in = static_cast<int>(transposed ? shape.block_k : shape.block_out);
    const int64_t tasks = task_count(nnz * block_size * 4);
    run_tasks(tasks, [&](int64_t task) {
      kernels.pack_weights(values, b_out, b_in, dot ? b_out : static_cast<int>(width), transposed || dot,
                           nnz * task / tasks, nnz * (task + 1) / tasks, copy_.get());
    });
  }
  const T* data() const { return data_; }

 private:
  Buffer<T> copy_;
  const T* data_;
};

// The bias, or zeros, as [out block][slice][slice width].
template <typename T>
std::vector<T> sliced_bias(const GatherShape& shape, int64_t out_blocks, int64_t width, const T* bias) {
  const int64_t block = ceil_div(shape.block_out, width) * width;
  std::vector<T> sliced(out_blocks * block, T(0));
  for (int64_t c = 0; bias != nullptr && c < shape.out.channels; ++c) {
    sliced[c / shape.block_out * block + c % shape.block_out] = bias[c];
  }
  return sliced;
}

// Whether an output is stored past the caches: lines that are overwritten whole need not be fetched first. Smaller
// outputs are better found in the caches by what comes next.
template <typename T>
bool streams(const T* out, int64_t slice, const ImageShape& shape) {
  constexpr int64_t kLeastBytes = 4 * 1024 * 1024, kLine = 64, kElement = sizeof(T);
  return slice * kElement % kLine == 0 && shape.channels * kElement % kLine == 0 &&
         reinterpret_cast<intptr_t>(out) % kLine == 0 && shape.pixels() * shape.channels * kElement >= kLeastBytes;
}

}  // namespace ddst::cpu
