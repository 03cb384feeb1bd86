// The weight gradient's kernel for sm_90a on the emulator as a shared library, for
// tests/cuda/test_hopper_weight_grad.py.
#include <cstdio>

#include "hopper_weight_grad.cuh"
#include "weight_grad_arrays.hpp"

using namespace ddst;
using emulated::Arrays;

namespace {

template <class T, class U>
emu::Stats run(const cuda::WeightGradShape& s, const Arrays& arrays, const emu::Options& options) {
  const cuda::HopperWeightGradSizes sizes = cuda::hopper_weight_grad_sizes(s, arrays.fused);
  emulated::Buffers<T> on(s, arrays, sizes.partial_floats);
  cuda::WeightGradShape apart = s;
  apart.groups *= cuda::kHopperWarps / cuda::kWeightGradWarps;
  const cuda::WeightGradParams<T> reduced = on.params(apart, cuda::weight_grad_sizes(apart, sizeof(T)));
  cuda::HopperFusedWeightGradParams<T> p{};
  p.gy_map = cuda::hopper_grad_map(on.gy.template host<T>(), s, sizes);
  p.x_map = cuda::hopper_input_map(on.x.template host<T>(), s, sizes);
  p.block_row = reduced.block_row, p.block_col = reduced.block_col, p.block_tap = reduced.block_tap;
  p.units = reduced.units, p.partials = reduced.partials;
  p.shape = s, p.sizes = sizes, p.prologue = on.prologue();
  emu::Block block;  // not kept for the next run: libraries of mutants stay loaded, with all their stacks
  block.options = options;
  block.launch({s.groups, s.shares, 1}, cuda::kHopperGradThreads, std::size_t(sizes.shared_bytes), [&] {
    if (arrays.fused)
      cuda::hopper_fused_weight_grad<T, U>(p);
    else
      cuda::hopper_weight_grad<T, U>(p);
  });
  emu::Stats stats = block.stats;
  block.options = {};
  block.launch({apart.groups, cuda::kAccumulators / 4, 1}, cuda::kWeightGradThreads, 0,
               [&] { cuda::weight_grad_reduce<T, U>(reduced); });
  on.fetch();
  return stats;
}

template <class T>
emu::Stats run_unit(const cuda::WeightGradShape& s, const Arrays& arrays, const emu::Options& options) {
  if (cuda::weight_grad_unit_rows(s) == 16) return run<T, cuda::Unit<16, 16>>(s, arrays, options);
  if (cuda::weight_grad_unit_cols(s) == 16) return run<T, cuda::Unit<32, 16>>(s, arrays, options);
  return run<T, cuda::Unit<32, 32>>(s, arrays, options);
}

int told(const std::string& what, char* message, int size) {
  std::snprintf(message, std::size_t(size), "%s", what.c_str());
  return 1;
}

}  // namespace

extern "C" {

// Why the kernel does not take a shape; empty if it does.
void refusal(const cuda::WeightGradShape* shape, int element_bytes, int fused, char* message, int size) {
  told(cuda::hopper_weight_grad_error(*shape, element_bytes, fused), message, size);
}

// patch_w, stages, bytes of a stage's copies, shared bytes
void sizes(const cuda::WeightGradShape* shape, int fused, int* out) {
  const cuda::HopperWeightGradSizes z = cuda::hopper_weight_grad_sizes(*shape, fused);
  out[0] = z.patch_w, out[1] = z.stages, out[2] = z.copied_bytes, out[3] = z.shared_bytes;
}

// seed, delay: of the emulator; drop_at: a wait or fence that is left out. stats: mma, ldmatrix, bank conflicts, bulk
// copies, bytes that they read. places: waits that were come to, if asked for. 0 if nothing was found, else `message`
// says what.
int weight_grad(int dtype, const cuda::WeightGradShape* shape, const Arrays* arrays, int seed, int delay,
                const char* drop_at, long* stats, char* places, int places_size, char* message, int message_size) {
  emu::Options options;
  options.seed = std::uint64_t(seed), options.delay_copies = delay != 0, options.drop_at = drop_at;
  options.list_waits = places_size > 0;
  try {
    const std::string error = cuda::hopper_weight_grad_error(*shape, 2, arrays->fused);
    if (!error.empty()) return told(error, message, message_size);
#ifdef DDST_BFLOAT16_ONLY  // half of the compiler's time
    if (dtype != DDST_CUDA_BFLOAT16) throw emu::Failure("built for bfloat16");
    using Other = dev::bf16;
#else
    using Other = dev::fp16;
#endif
    const emu::Stats found = dtype == DDST_CUDA_BFLOAT16 ? run_unit<dev::bf16>(*shape, *arrays, options)
                                                         : run_unit<Other>(*shape, *arrays, options);
    const long counts[] = {found.mma, found.ldmatrix, found.ldmatrix_conflicts, found.bulk_copies, found.bulk_bytes};
    std::copy(std::begin(counts), std::end(counts), stats);
    std::string list;
    for (const auto& [place, count] : found.wait_places) list += place + " ";
    if (places_size > 0) std::snprintf(places, std::size_t(places_size), "%s", list.c_str());
    return 0;
  } catch (const emu::Failure& failure) {
    return told(failure.what(), message, message_size);
  }
}
}
