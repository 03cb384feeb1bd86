// The gather kernel on the emulator as a shared library, for tests/cuda/test_cuda_gather.py.
#include "conv2d_gather.cuh"
#include "emulator/memory.hpp"
#include "gather_problem.hpp"

using namespace ddst;
using namespace ddst::cuda;
using emu::Buffer;

namespace {

struct Arrays {
  const void *input, *values, *records, *bias, *residual;
  void* output;
  std::int64_t blocks, record_ints;  // of values, of records
  const void *mean, *scale, *shift, *activated;
  int relu, seed, fused, norm, halved, residual_halved, squares;
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
  const std::string why = gather_geometry(problem, Traits::kTransposed, Traits::kTile, test::kSharedLimit, p.g,
                                          {a.fused != 0, a.squares != 0});
  if (!why.empty()) throw emu::Failure(why);
  p.layout = gather_layout(p.g, Traits::kTile, sizeof(T));
  p.relu = a.relu;
  const auto pixels = [&](int height, int width, int halved) {
    return std::int64_t(p.g.images) * (height >> halved) * (width >> halved);
  };
  const std::int64_t read = pixels(p.g.in_height, p.g.in_width, a.halved) * p.g.in_channels;
  const int height = p.g.out_height >> a.squares, width = p.g.out_width >> a.squares;
  const std::int64_t written = pixels(height, width, 0) * p.g.out_channels;
  const std::int64_t added = pixels(height, width, a.residual_halved) * p.g.out_channels;
  const std::int64_t lines = std::int64_t(p.g.phases_y) * p.g.phases_x * p.g.groups * p.g.in_blocks;
  if (lines * p.g.record_ints != a.record_ints) throw emu::Failure("records have another size than the kernel's");
  Buffer x = input<T>("input", a.input, read), values = input<T>("values", a.values, a.blocks * p.g.block_elements);
  Buffer records = input<int>("records", a.records, a.record_ints);
  Buffer bias = input<T>("bias", a.bias, p.g.out_channels), residual = input<T>("residual", a.residual, added);
  Buffer output("output", std::size_t(written) * sizeof(T), Buffer::Role::output_once);
  p.input = dev::global_ptr<const T>(x), p.values = dev::global_ptr<const T>(values);
  p.records = dev::global_ptr<const int>(records), p.output = dev::global_ptr<T>(output);
  if (a.bias) p.bias = dev::global_ptr<const T>(bias);
  if (a.residual) p.residual = dev::global_ptr<const T>(residual);
  const int channels = Traits::kTransposed ? p.g.out_channels : p.g.in_channels;  // of the forward input
  const std::int64_t factors = std::int64_t(a.norm == 2 ? p.g.images : 1) * channels;
  Buffer mean = input<float>("mean", a.mean, channels), scale = input<float>("scale", a.scale, factors);
  Buffer shift = input<float>("shift", a.shift, factors), activated = input<T>("activated", a.activated, written);
  if constexpr (Traits::Source::kFused) {
    using Table = dev::global_ptr<const float>;
    p.prologue = {Table(mean), Table(scale), Table(shift), a.norm, a.slope};
    if (a.activated) p.activated = dev::global_ptr<const T>(activated);
    p.halved = a.halved, p.residual_halved = a.residual_halved, p.squares = a.squares, p.factor = a.factor;
  }
  static emu::Block block;  // keeps the stacks of its fibers
  block.options.seed = std::uint64_t(a.seed);
  block.launch({gather_blocks(p.g), 1, 1}, Traits::kThreads, std::size_t(p.layout.bytes),
               [&] { conv2d_gather<Traits>(p); });
  if (!output.fully_written()) throw emu::Failure("output was not fully written");
  std::memcpy(a.output, output.host<T>(), output.size());
}

template <class Number, bool kLarge>
void run_direction(const ddst_cuda_conv2d_problem& problem, bool input_gradient, const Arrays& a) {
  if (a.fused)
    input_gradient ? run<GatherTraits<Number, true, kLarge, FusedSource>>(problem, a)
                   : run<GatherTraits<Number, false, kLarge, FusedSource>>(problem, a);
  else
    input_gradient ? run<test::Traits<Number, true, kLarge>>(problem, a)
                   : run<test::Traits<Number, false, kLarge>>(problem, a);
}

template <class Number>
void run_tile(const ddst_cuda_conv2d_problem& problem, bool input_gradient, bool large, const Arrays& a) {
  large ? run_direction<Number, true>(problem, input_gradient, a)
        : run_direction<Number, false>(problem, input_gradient, a);
}

}  // namespace

extern "C" {

// Both write why they fail into `message`, "" if they do not.
void ddst_cuda_gather_refusal(const ddst_cuda_conv2d_problem* problem, bool input_gradient, bool large, bool fused,
                              bool squares, int shared_bytes, char* message, int size) {
  GatherGeometry g;
  const GatherTile tile = gather_tile(large, ddst_cuda_element_bytes(problem->dtype));
  std::snprintf(message, std::size_t(size), "%s",
                gather_geometry(*problem, input_gradient, tile, shared_bytes, g, {fused, squares}).c_str());
}

void gather(const ddst_cuda_conv2d_problem* problem, bool input_gradient, bool large, const Arrays* arrays,
            char* message, int size) {
  message[0] = 0;
  try {
    if (problem->dtype == DDST_CUDA_BFLOAT16)
      run_tile<dev::bf16>(*problem, input_gradient, large, *arrays);
    else if (problem->dtype == DDST_CUDA_FLOAT16)
      run_tile<dev::fp16>(*problem, input_gradient, large, *arrays);
    else if (problem->dtype == DDST_CUDA_TFLOAT32)
      run_tile<float>(*problem, input_gradient, large, *arrays);
    else if (large)
      throw emu::Failure("float32 has no large tile");
    else
      run_direction<tf32x3, false>(*problem, input_gradient, *arrays);
  } catch (const emu::Failure& failure) {
    std::snprintf(message, std::size_t(size), "%s", failure.what());
  }
}
}
