// What the glue of the CPU kernels asks of torch's library where it gets no tensors: threads. A range is cut as it
// would be for so many of them, and computed piece by piece.
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>

int64_t threads_to_pretend = 1;

extern "C" {

AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = static_cast<uint32_t>(threads_to_pretend);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc f, void* context) {
  const int64_t pieces = threads_to_pretend;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t first = begin + (end - begin) * i / pieces, last = begin + (end - begin) * (i + 1) / pieces;
    if (first < last) f(first, last, context);
  }
  return AOTI_TORCH_SUCCESS;
}
}
