// The gather kernel for sm_90a in fused half blocks, against the gather kernel for all devices, which
// test_cuda_half_block.py compares with float64.
#include "hopper_gather_problem.hpp"

using namespace ddst;
using namespace ddst::test;

namespace {

// What a fused half block adds to a problem.
template <class T>
struct HalfBlock {
  int norm, squares, residual_halved;
  float slope;
  std::vector<float> mean, scale, shift;
  std::vector<T> bias, residual, activated;
  std::int64_t written;

  HalfBlock(const GatherProblem<T>& problem, const HopperGatherGeometry& g, int norm, bool squares, bool halved,
            float slope, Rng& rng)
      : norm(norm), squares(squares), residual_halved(halved), slope(slope) {
    std::uniform_real_distribution<float> value(-1, 1);
    const auto pixels = [&](int half) {
      return std::int64_t(g.images) * (g.out_height >> half) * (g.out_width >> half);
    };
    const auto fill = [&](auto& to, std::int64_t count) {
      using Number = std::decay_t<decltype(to[0])>;
      for (std::int64_t i = 0; i < count; ++i) to.push_back(narrow<Number>(value(rng)));
    };
    const int channels = problem.input_gradient ? problem.written_channels : problem.read_channels;
    fill(mean, channels), fill(scale, std::int64_t(norm == 2 ? g.images : 1) * channels), fill(shift, scale.size());
    written = pixels(squares) * problem.written_channels;
    if (problem.input_gradient) {
      fill(activated, written);
    } else {
      const int by = squares + halved;
      fill(bias, problem.written_channels), fill(residual, pixels(by) * problem.written_channels);
    }
  }
};

// Runs `launch(params)` of either kernel with the same tensors; returns the output.
template <class Params, class T, class Launch>
std::vector<T> run_fused(Params p, const GatherProblem<T>& problem, const HalfBlock<T>& half, Launch launch) {
  auto bias = input_buffer("bias", half.bias), residual = input_buffer("residual", half.residual);
  auto mean = input_buffer("mean", half.mean), scale = input_buffer("scale", half.scale);
  auto shift = input_buffer("shift", half.shift), activated = input_buffer("activated", half.activated);
  emu::Buffer output("output", std::size_t(half.written) * sizeof(T), emu::Buffer::Role::output_once);
  using Table = dev::global_ptr<const float>;
  p.prologue = {Table(mean), Table(scale), Table(shift), half.norm, half.slope};
  if (problem.input_gradient) p.activated = dev::global_ptr<const T>(activated);
  if (!problem.input_gradient) p.bias = dev::global_ptr<const T>(bias), p.residual = dev::global_ptr<const T>(residual);
  p.residual_halved = half.residual_halved, p.squares = half.squares, p.factor = 0.25f;
  p.output = dev::global_ptr<T>(output);
  launch(p);
  expect(output.fully_written(), "output not fully written");
  return std::vector<T>(output.template host<T>(), output.template host<T>() + half.written);
}

// Returns the places of waits.
template <class T, bool kTransposed, int kWidth, int kCluster, int kDepth = 1>
std::map<std::string, int> test_fused(const std::string& name, const ddst_cuda_conv2d_problem& shape, int norm,
                                      bool squares, bool halved, float slope, Rng& rng, const std::string& without = "",
                                      double density = 0.4) {
  using Traits = HopperGatherTraits<T, kTransposed, kWidth, kCluster, HopperFused, kDepth>;
  using Today = GatherTraits<T, kTransposed, false, FusedSource>;
  const GatherProblem<T> problem(shape, kTransposed, density, false, rng);
  const GatherShape fused{true, squares};
  FusedHopperGatherParams<T> p{};
  std::string why = hopper_gather_geometry(problem.p, kTransposed, Traits::kForm, kSharedLimit, p.g, fused);
  FusedGatherParams<T> today{};
  why += gather_geometry(problem.p, kTransposed, Today::kTile, kSharedLimit, today.g, fused);
  if (!why.empty()) throw emu::Failure(name + ": refused, " + why);
  today.layout = gather_layout(today.g, Today::kTile, sizeof(T));
  const HalfBlock<T> half(problem, p.g, norm, squares, halved, slope, rng);
  const auto lists = hopper_lists(problem, p.g, kWidth);
  auto input = input_buffer("input", problem.input), values = input_buffer("values", problem.values);
  auto records = input_buffer("records", lists.records), order = input_buffer("order", lists.order);
  auto todays_records = input_buffer("records", problem.records(today.g, Today::kTile.channels));
  const std::int64_t slots = std::int64_t(problem.values.size()) / p.g.block_elements;
  p.input = hopper_input_map(p.g, input.template host<T>());
  p.values = hopper_weights_map(p.g, values.template host<T>(), slots, kTransposed);
  p.records = dev::global_ptr<const int>(records), p.order = dev::global_ptr<const int>(order);
  p.clusters = std::min(2, p.g.items);
  today.input = dev::global_ptr<const T>(input), today.values = dev::global_ptr<const T>(values);
  today.records = dev::global_ptr<const int>(todays_records);
  static emu::Block block;
  block.options.seed = rng();
  block.options.drop_at = without, block.options.list_waits = true;
  block.stats = {};
  const auto got = run_fused(p, problem, half, [&](const auto& with) {
    block.launch(
        {with.clusters * kCluster, 1, 1}, kHopperThreads, std::size_t(with.g.bytes),
        [&] { hopper_gather<Traits>(with); }, kCluster);
  });
  const auto places = block.stats.wait_places;
  block.options.drop_at.clear();
  const auto expected = run_fused(today, problem, half, [&](const auto& with) {
    block.launch({gather_blocks(with.g), 1, 1}, Today::kThreads, std::size_t(with.layout.bytes),
                 [&] { conv2d_gather<Today>(with); });
  });
  double worst = 0;  // both are rounded once, of sums in another order
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double a = widen(got[i]), b = widen(expected[i]);
    const double off = std::abs(a - b) / (std::abs(b) * 2.1 * kRounding<T> + 0x1p-14);
    worst = std::max(worst, off == off ? off : 1e30);
  }
  expect(worst <= 1, name + ": differs by " + std::to_string(worst));
  return places;
}

ddst_cuda_conv2d_problem shape(int images, int height, int width, int in, int out, int kernel, int stride, int block) {
  ddst_cuda_conv2d_problem p{};
  p.images = images, p.height = height, p.width = width, p.in_channels = in, p.out_channels = out;
  p.kernel_height = p.kernel_width = kernel, p.padding_y = p.padding_x = kernel / 2;
  p.stride_y = p.stride_x = stride, p.block_out = p.block_in = block;
  return p;
}

}  // namespace

int main() {
  Rng rng(8);
  using dev::bf16;
  using dev::fp16;
  test_fused<fp16, false, 1, 1>("norm, pooled", shape(2, 10, 14, 40, 72, 3, 1, 16), 1, true, false, 0, rng);
  test_fused<bf16, false, 1, 2>("norm of images", shape(5, 7, 6, 40, 136, 3, 1, 16), 2, false, false, 0.1f, rng);
  test_fused<fp16, false, 4, 1>("residual upsampled", shape(2, 8, 12, 24, 72, 3, 1, 16), 1, false, true, 0.2f, rng);
  test_fused<bf16, false, 1, 1>("activation, stride 2", shape(2, 11, 12, 24, 40, 3, 2, 32), 0, false, false, 0.1f, rng);
  test_fused<fp16, false, 1, 2>("1x1 without prologue, pooled", shape(3, 9, 8, 56, 40, 1, 1, 16), 0, true, false, 1,
                                rng);
  test_fused<fp16, true, 1, 1>("input gradient", shape(2, 9, 12, 72, 40, 3, 1, 16), 1, false, false, 0.1f, rng);
  test_fused<bf16, true, 4, 2>("input gradient, squares", shape(3, 10, 8, 136, 40, 3, 1, 16), 2, true, false, 0, rng);
  test_fused<fp16, true, 1, 1>("input gradient, stride 2", shape(2, 9, 12, 72, 40, 3, 2, 16), 1, false, false, 0, rng);
  test_fused<bf16, false, 1, 1, 2>("32 channels, norm of images", shape(5, 7, 6, 56, 40, 3, 1, 16), 2, false, false,
                                   0.1f, rng);
  // Stages whose first or second slice alone has blocks.
  test_fused<bf16, false, 1, 1, 2>("32 channels, few blocks", shape(1, 7, 6, 512, 16, 3, 1, 16), 1, false, false, 0,
                                   rng, "", 0.04);
  test_fused<fp16, false, 1, 2, 2>("32 channels, stride 2", shape(2, 11, 12, 64, 40, 2, 2, 32), 1, false, false, 0,
                                   rng);
  test_fused<bf16, true, 1, 1, 2>("input gradient, 32 channels", shape(2, 9, 12, 72, 56, 3, 1, 16), 1, false, false, 0,
                                  rng);
  const auto again = [&](const std::string& without) {
    return test_fused<fp16, false, 1, 1>("faults", shape(1, 8, 8, 96, 16, 3, 1, 16), 1, false, false, 0, rng, without);
  };
  int waits = 0;
  for (const auto& [place, count] : again("")) {
    if (place.rfind("hopper_gather_fused.cuh", 0) != 0) continue;
    ++waits;
    expect_caught("without " + place, "hopper_gather", [&] { again(place); });
  }
  expect(waits == 2, "waits of the patch's change: " + std::to_string(waits));
  return finish("hopper gather fused");
}
