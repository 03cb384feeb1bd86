// The gather kernel for sm_90a on the emulator as a shared library, for tests/cuda/test_cuda_hopper_gather.py, and the
// plan that says how it cuts a problem. Of the instantiations those of bfloat16 with one granule, clusters and stages
// of 16 and 32 channels, and of float16 with four granules, or im2col, and single CTAs.
#include <cstring>

#include "check.hpp"
#include "hopper_gather.cuh"
#include "hopper_gather_plan.cpp"

using namespace ddst;
using namespace ddst::cuda;
using emu::Buffer;

namespace {

struct Arrays {
  const void *input, *values, *records, *order, *bias, *residual;
  void* output;
  std::int64_t slots, record_ints;
  const void *mean, *scale, *shift, *activated;
  int relu, seed, clusters, fused, norm, residual_halved, squares;
  float slope, factor;
};

template <class T>
Buffer input(const char* name, const void* from, std::int64_t count) {
  Buffer buffer(name, std::size_t(count) * sizeof(T), Buffer::Role::input);
  if (from) std::memcpy(buffer.host<T>(), from, std::size_t(count) * sizeof(T));
  return buffer;
}

template <class Traits>
void run(const ddst_cuda_conv2d_problem& problem, const Arrays& a) {
  using T = typename Traits::T;
  typename Traits::Params p{};
  const std::string why = hopper_gather_geometry(problem, Traits::kTransposed, Traits::kForm, 227 * 1024, p.g,
                                                 {a.fused != 0, a.squares != 0});
  if (!why.empty()) throw emu::Failure(why);
  const auto& g = p.g;
  p.relu = a.relu, p.clusters = std::min(a.clusters, g.items);
  const auto pixels = [&](int halvings) {
    return std::int64_t(g.images) * (g.out_height >> halvings) * (g.out_width >> halvings);
  };
  const std::int64_t read = std::int64_t(g.images) * g.in_height * g.in_width * g.in_channels;
  const std::int64_t written = pixels(a.squares) * g.out_channels;
  const int orders = g.phases_y * g.phases_x * g.groups;
  if (std::int64_t(orders) * g.in_blocks * g.record_ints != a.record_ints)
    throw emu::Failure("records have another size than the kernel's");
  Buffer x = input<T>("input", a.input, read), values = input<T>("values", a.values, a.slots * g.block_elements);
  Buffer records = input<int>("records", a.records, a.record_ints), order = input<int>("order", a.order, orders);
  Buffer bias = input<T>("bias", a.bias, g.out_channels);
  Buffer residual = input<T>("residual", a.residual, pixels(a.squares + a.residual_halved) * g.out_channels);
  Buffer output("output", std::size_t(written) * sizeof(T), Buffer::Role::output_once);
  p.input = hopper_input_map(g, x.host<T>());
  p.values = hopper_weights_map(g, values.host<T>(), a.slots, Traits::kTransposed);
  p.records = dev::global_ptr<const int>(records), p.order = dev::global_ptr<const int>(order);
  p.output = dev::global_ptr<T>(output);
  if (a.bias) p.bias = dev::global_ptr<const T>(bias);
  if (a.residual) p.residual = dev::global_ptr<const T>(residual);
  const int channels = Traits::kTransposed ? g.out_channels : g.in_channels;  // of the forward input
  const std::int64_t factors = std::int64_t(a.norm == 2 ? g.images : 1) * channels;
  Buffer mean = input<float>("mean", a.mean, channels), scale = input<float>("scale", a.scale, factors);
  Buffer shift = input<float>("shift", a.shift, factors), activated = input<T>("activated", a.activated, written);
  if constexpr (Traits::Source::kFused) {
    using Table = dev::global_ptr<const float>;
    p.prologue = {Table(mean), Table(scale), Table(shift), a.norm, a.slope};
    if (a.activated) p.activated = dev::global_ptr<const T>(activated);
    p.residual_halved = a.residual_halved, p.squares = a.squares, p.factor = a.factor;
  }
  static emu::Block block;  // keeps the stacks of its fibers
  block.options.seed = std::uint64_t(a.seed);
  block.launch(
      {p.clusters * Traits::kCluster, 1, 1}, kHopperThreads, std::size_t(g.bytes), [&] { hopper_gather<Traits>(p); },
      Traits::kCluster);
  if (!output.fully_written()) throw emu::Failure("output was not fully written");
  std::memcpy(a.output, output.host<T>(), output.size());
}

template <class T, class Source, int kWidth, int kCluster, int kDepth = 1, bool kIm2col = false>
void run_direction(const ddst_cuda_conv2d_problem& problem, bool input_gradient, const Arrays& a) {
  input_gradient ? run<HopperGatherTraits<T, true, kWidth, kCluster, Source, kDepth, kIm2col>>(problem, a)
                 : run<HopperGatherTraits<T, false, kWidth, kCluster, Source, kDepth, kIm2col>>(problem, a);
}

template <class T, int kWidth, int kCluster, int kDepth = 1>
void run_source(const ddst_cuda_conv2d_problem& problem, bool input_gradient, const Arrays& a) {
  a.fused ? run_direction<T, HopperFused, kWidth, kCluster, kDepth>(problem, input_gradient, a)
          : run_direction<T, HopperPlain, kWidth, kCluster, kDepth>(problem, input_gradient, a);
}

bool operator==(const GatherForm& a, const GatherForm& b) {
  return a.granules == b.granules && a.cluster == b.cluster && a.depth == b.depth && a.im2col == b.im2col;
}

}  // namespace

// Writes why it fails into `message`, "" if it does not.
extern "C" void hopper_gather(const ddst_cuda_conv2d_problem* problem, bool input_gradient, int granules, int cluster,
                              int depth, bool im2col, const Arrays* arrays, char* message, int size) {
  message[0] = 0;
  const GatherForm form{granules, cluster, depth, im2col};
  const bool bf16 = problem->dtype == DDST_CUDA_BFLOAT16, fp16 = problem->dtype == DDST_CUDA_FLOAT16;
  try {
    if (bf16 && form == GatherForm{1, 2})
      run_source<dev::bf16, 1, 2>(*problem, input_gradient, *arrays);
    else if (bf16 && form == GatherForm{1, 2, 2})
      run_source<dev::bf16, 1, 2, 2>(*problem, input_gradient, *arrays);
    else if (fp16 && form == GatherForm{4, 1})
      run_source<dev::fp16, 4, 1>(*problem, input_gradient, *arrays);
    else if (fp16 && form == GatherForm{1, 1, 1, true} && !arrays->fused)
      run_direction<dev::fp16, HopperPlain, 1, 1, 1, true>(*problem, input_gradient, *arrays);
    else
      throw emu::Failure("not instantiated");
  } catch (const emu::Failure& failure) {
    std::snprintf(message, std::size_t(size), "%s", failure.what());
  }
}
