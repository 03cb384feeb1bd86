// What the forms of the gather kernel have in common: weights and biases as they stream them, how they store.
#pragma once

#include "gather_plan.hpp"

namespace ddst::cpu {

// The blocks as a kernel streams them: [block][slice][k][slice width], or [block][channel][k] for a dot; lanes past the
// block are zero.
template <typename T>
struct BlockWeights {
  const Kernels<T>& kernels;
  const BlockLists& lists;
  const T* values;
  int b_out, b_in, width;
  bool transposed;                         // in packing
  int64_t slices, slice_size, block_size;  // sizes in elements
  bool direct;                             // values are in that order already, in their slots

  BlockWeights(const Kernels<T>& kernel_set, const GatherShape& shape, const BlockLists& block_lists,
               int64_t slice_width, bool dot, bool over_out, const T* block_values)
      : kernels(kernel_set),
        lists(block_lists),
        values(block_values),
        b_out(static_cast<int>(over_out ? shape.block_out : shape.block_k)),
        b_in(static_cast<int>(over_out ? shape.block_k : shape.block_out)),
        width(dot ? b_out : static_cast<int>(slice_width)),
        transposed(over_out || dot),
        slices(ceil_div(shape.block_out, slice_width)),
        slice_size(slice_width * shape.block_k),
        block_size(slices * slice_size),
        direct(dot ? over_out || shape.block_out == 1
                   : (!over_out || shape.block_k == 1) && slice_width == shape.block_out) {}

  // Packs positions [begin, end) of the lists; packed begins with position 0.
  void pack(int64_t begin, int64_t end, T* packed) const {
    for (int64_t i = begin; i < end; ++i) {
      kernels.pack_weights(values + lists.id(i) * b_out * b_in, b_out, b_in, width, transposed,
                           packed + i * block_size);
    }
  }

  // All positions, or nothing where values are direct.
  Buffer<T> pack_all() const {
    if (direct) return {};
    Buffer<T> packed(lists.nnz * block_size);
    const int64_t tasks = task_count(lists.nnz * block_size * 4);
    run_tasks(tasks,
              [&](int64_t task) { pack(lists.nnz * task / tasks, lists.nnz * (task + 1) / tasks, packed.get()); });
    return packed;
  }
};

// The bias, or zeros, as [out block][slice][slice width].
template <typename T>
Array<T> sliced_bias(const GatherShape& shape, int64_t out_blocks, int64_t width, const T* bias) {
  const int64_t block = ceil_div(shape.block_out, width) * width;
  Array<T> sliced(out_blocks * block, T(0));
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
