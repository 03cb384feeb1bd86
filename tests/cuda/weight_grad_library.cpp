// The weight gradient on the emulator as a shared library, for tests/cuda/test_cuda_weight_grad.py.
#include <cstdio>

#include "ddst_cuda.h"
#include "emulator/block.hpp"
#include "emulator/memory.hpp"
#include "weight_grad.cuh"

using namespace ddst;
using emu::Buffer;

namespace {

struct Arrays {
  const void *gy, *x, *block_row, *block_col, *block_tap, *units;
  void* values_grad;
  std::int64_t units_count;
  const void *mean, *scale, *shift;
  int fused, norm, x_halved, gy_halved;
  float slope;
};

template <class T>
Buffer input(const char* name, const void* from, std::int64_t count) {
  Buffer buffer(name, std::size_t(count) * sizeof(T), Buffer::Role::input);
  if (count && from) std::memcpy(buffer.host<T>(), from, std::size_t(count) * sizeof(T));
  return buffer;
}

template <class Number, class U>
emu::Stats run(const cuda::WeightGradShape& s, const Arrays& arrays, const emu::Options& options) {
  using T = cuda::stored_t<Number>;
  const cuda::WeightGradSizes sizes = cuda::weight_grad_sizes(s, sizeof(T));
  Buffer gy =
      input<T>("gy", arrays.gy,
               std::int64_t(s.images) * (s.out_h >> arrays.gy_halved) * (s.out_w >> arrays.gy_halved) * s.out_channels);
  Buffer x =
      input<T>("x", arrays.x,
               std::int64_t(s.images) * (s.in_h >> arrays.x_halved) * (s.in_w >> arrays.x_halved) * s.in_channels);
  Buffer row = input<int>("block_row", arrays.block_row, s.slots),
         col = input<int>("block_col", arrays.block_col, s.slots);
  Buffer tap = input<int>("block_tap", arrays.block_tap, s.slots);
  Buffer units = input<int>("units", arrays.units, arrays.units_count);
  Buffer partials("partials", std::size_t(sizes.partial_floats) * 4, Buffer::Role::output_once);
  const std::size_t bytes = std::size_t(s.slots) * s.block_out * s.block_in * sizeof(T);
  Buffer values_grad("values_grad", bytes, Buffer::Role::output_once);
  const cuda::WeightGradParams<T> p{dev::global_ptr<const T>(gy),
                                    dev::global_ptr<const T>(x),
                                    dev::global_ptr<const int>(row),
                                    dev::global_ptr<const int>(col),
                                    dev::global_ptr<const int>(tap),
                                    dev::global_ptr<const int>(units),
                                    dev::global_ptr<float>(partials),
                                    dev::global_ptr<T>(values_grad),
                                    s,
                                    sizes};
  static emu::Block block;  // keeps the fiber stacks
  block.options = options;
  block.stats = {};
  const std::int64_t factors = std::int64_t(arrays.norm == 2 ? s.images : 1) * s.in_channels;
  Buffer mean = input<float>("mean", arrays.mean, s.in_channels), scale = input<float>("scale", arrays.scale, factors);
  Buffer shift = input<float>("shift", arrays.shift, factors);
  using Table = dev::global_ptr<const float>;
  cuda::FusedWeightGradParams<T> fused{};
  static_cast<cuda::WeightGradParams<T>&>(fused) = p;
  fused.prologue = {Table(mean), Table(scale), Table(shift), arrays.norm, arrays.slope};
  fused.x_halved = arrays.x_halved, fused.gy_halved = arrays.gy_halved;
  block.launch({s.groups, s.shares, 1}, cuda::kWeightGradThreads, std::size_t(sizes.shared_bytes), [&] {
    if (arrays.fused)
      cuda::fused_weight_grad<Number, U>(fused);
    else
      cuda::weight_grad<Number, U>(p);
  });
  block.launch({s.groups, cuda::kAccumulators / 4, 1}, cuda::kWeightGradThreads, 0,
               [&] { cuda::weight_grad_reduce<T, U>(p); });
  if (!values_grad.fully_written()) throw emu::Failure("values_grad was not fully written");
  std::memcpy(arrays.values_grad, values_grad.host<char>(), bytes);
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
