// The weight gradient on the emulator as a shared library, for tests/cuda/test_cuda_weight_grad.py.
#include <cstdio>

#include "ddst_cuda.h"
#include "weight_grad_arrays.hpp"

using namespace ddst;
using emu::Buffer;
using emulated::Arrays;
using emulated::input;

namespace {

template <class Number, class U>
emu::Stats run(const cuda::WeightGradShape& s, const Arrays& arrays, const emu::Options& options) {
  using T = cuda::stored_t<Number>;
  const cuda::WeightGradSizes sizes = cuda::weight_grad_sizes(s, sizeof(T));
  emulated::Buffers<T> on(s, arrays, sizes.partial_floats);
  const cuda::WeightGradParams<T> p = on.params(s, sizes);
  static emu::Block block;  // keeps the fiber stacks
  block.options = options;
  block.stats = {};
  cuda::FusedWeightGradParams<T> fused{};
  static_cast<cuda::WeightGradParams<T>&>(fused) = p;
  fused.prologue = on.prologue();
  fused.x_halved = arrays.x_halved, fused.gy_halved = arrays.gy_halved;
  block.launch({s.groups, s.shares, 1}, cuda::kWeightGradThreads, std::size_t(sizes.shared_bytes), [&] {
    if (arrays.fused)
      cuda::fused_weight_grad<Number, U>(fused);
    else
      cuda::weight_grad<Number, U>(p);
  });
  block.launch({s.groups, cuda::kAccumulators / 4, 1}, cuda::kWeightGradThreads, 0,
               [&] { cuda::weight_grad_reduce<T, U>(p); });
  on.fetch();
  return block.stats;
}

template <class Number>
emu::Stats run_unit(const cuda::WeightGradShape& s, const Arrays& arrays, const emu::Options& options) {
  const std::string error = cuda::weight_grad_error(s, sizeof(cuda::stored_t<Number>), 227 * 1024);
  if (!error.empty()) throw emu::Failure(error);
  if (cuda::weight_grad_unit_rows(s) == 16) return run<Number, cuda::Unit<16, 16>>(s, arrays, options);
  if (cuda::weight_grad_unit_cols(s) == 16) return run<Number, cuda::Unit<32, 16>>(s, arrays, options);
  return run<Number, cuda::Unit<32, 32>>(s, arrays, options);
}

}  // namespace

extern "C" {

std::int64_t shared_bytes(const cuda::WeightGradShape* shape, int element_bytes) {
  return cuda::weight_grad_sizes(*shape, element_bytes).shared_bytes;
}

int group_units(const cuda::WeightGradShape* shape) { return cuda::weight_grad_group_units(*shape); }

// options: seed, delay_copies, drop_barrier, drop_wait. stats: mma, bank conflicts of ldmatrix, barriers. 0 if nothing
// was found, else `message` says what.
int weight_grad(int dtype, const cuda::WeightGradShape* shape, const Arrays* arrays, const int* options, long* stats,
                char* message, int message_size) {
  emu::Options chosen;
  chosen.seed = std::uint64_t(options[0]), chosen.delay_copies = options[1] != 0;
  chosen.drop_barrier = options[2], chosen.drop_wait = options[3];
  try {
    const emu::Stats found = dtype == DDST_CUDA_BFLOAT16   ? run_unit<dev::bf16>(*shape, *arrays, chosen)
                             : dtype == DDST_CUDA_FLOAT16  ? run_unit<dev::fp16>(*shape, *arrays, chosen)
                             : dtype == DDST_CUDA_TFLOAT32 ? run_unit<float>(*shape, *arrays, chosen)
                                                           : run_unit<cuda::tf32x3>(*shape, *arrays, chosen);
    stats[0] = found.mma, stats[1] = found.ldmatrix_conflicts, stats[2] = found.barriers;
    return 0;
  } catch (const emu::Failure& failure) {
    std::snprintf(message, std::size_t(message_size), "%s", failure.what());
    return 1;
  }
}
}
