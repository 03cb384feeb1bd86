// The gather kernel for sm_90a: each of its waits and fences is needed; products and bytes are those that were meant;
// shared memory is free of bank conflicts; what it cannot run is refused.
#include "hopper_gather_problem.hpp"

using namespace ddst;
using namespace ddst::test;

namespace {

ddst_cuda_conv2d_problem square(int images, int size, int channels_in, int channels_out, int block, int kernel = 3) {
  ddst_cuda_conv2d_problem p{};
  p.images = images, p.height = p.width = size, p.in_channels = channels_in, p.out_channels = channels_out;
  p.kernel_height = p.kernel_width = kernel, p.padding_y = p.padding_x = kernel / 2, p.stride_y = p.stride_x = 1;
  p.block_out = p.block_in = block;
  return p;
}

// Some wait is left out, by all threads: the emulator must see a race, a copy or a product in flight, or a hang.
template <class Traits>
void test_fault_injection(const std::string& name) {
  Rng rng(5);
  const int even = Traits::kDepth > 1 ? 160 : 112;
  const GatherProblem<typename Traits::T> problem(square(Traits::kCluster, 16, even, even + 32, 16),
                                                  Traits::kTransposed, 0.2, false, rng);
  emu::Options options;
  options.list_waits = true;
  const auto places = run_hopper<Traits>(problem, options, name, 1).stats.wait_places;
  // Barriers, a fence, the waits for products, the warps that agree before an arrival; at the begin (and the end)
  // three.
  expect(places.size() == (Traits::kCluster > 1 ? 12 : 11), name + ": " + std::to_string(places.size()) + " waits");
  options.list_waits = false;
  for (const auto& [place, count] : places) {
    options.drop_at = place;
    expect_caught(name + ", without " + place, "", [&] { run_hopper<Traits>(problem, options, "", 1, false); });
  }
}

// 256 to 256 channels, 3x3 at 32 x 32 (one image of the batch): what is multiplied and what comes from the
// second-level cache, of which at least halo patches once a tile and active blocks once a cluster have to.
template <int kWidth, int kCluster, int kDepth = 1>
void test_counts(double density, double most) {
  Rng rng(6);
  const GatherProblem<dev::bf16> problem(square(1, 32, 256, 256, 16), false, density, false, rng);
  const std::string name = std::to_string(kWidth) + " granules, clusters of " + std::to_string(kCluster) + ", " +
                           std::to_string(kDepth * 16) + " channels";
  using Traits = HopperGatherTraits<dev::bf16, false, kWidth, kCluster, HopperPlain, kDepth>;
  const auto [stats, g, lists] = run_hopper<Traits>(problem, {}, name);
  const long blocks = long(problem.values.size()) / 256, sets = 4 / kCluster;
  expect(stats.wgmma[kWidth * 2] == lists.blocks / kWidth * 4 * 4 && (kWidth > 1 || lists.blocks == blocks),
         name + ": products " + std::to_string(stats.wgmma[kWidth * 2]));
  const long patches = 4L * 17 * 17 * 256 * 2 * g.groups;  // each tile is at a corner of its image
  const double ratio = double(stats.bulk_bytes) / double(patches + blocks * 512 * sets);
  std::printf("%s, density %.2f: %.3f of the bytes that must come\n", name.c_str(), density, ratio);
  expect(ratio <= most && ratio >= 1, name + ": bytes");
  expect(stats.ldmatrix_conflicts == 0, name + ": bank conflicts");
}

template <bool kTransposed, int kDepth = 1, bool kIm2col = false>
void test_layout(const char* name, const ddst_cuda_conv2d_problem& shape, const char* tile, int stages) {
  Rng rng(7);
  const GatherProblem<dev::bf16> problem(shape, kTransposed, 1, false, rng);
  using Traits = HopperGatherTraits<dev::bf16, kTransposed, 1, 1, HopperPlain, kDepth, kIm2col>;
  const auto [stats, g, lists] = run_hopper<Traits>(problem, {}, name);
  const auto text = [](int log) { return std::to_string(1 << log); };
  const std::string got = text(g.log_tile_images) + " x " + text(g.log_tile_rows) + " x " + text(g.log_tile_cols);
  expect(got == tile && g.stages == stages,
         std::string(name) + ": tile " + got + ", stages " + std::to_string(g.stages));
  expect(stats.ldmatrix_conflicts == 0, std::string(name) + ": bank conflicts");
}

void test_layouts() {
  auto strided = square(1, 32, 16, 32, 16), four = square(4, 16, 16, 16, 16, 4);
  strided.stride_y = strided.stride_x = 2;
  four.stride_y = four.stride_x = 2, four.padding_y = four.padding_x = 1;
  test_layout<false>("16x16 pixels", square(1, 16, 32, 32, 32), "1 x 16 x 16", 4);
  test_layout<false>("8x8", square(4, 8, 16, 32, 16), "4 x 8 x 8", 4);
  test_layout<false>("4x4", square(16, 4, 16, 32, 16), "16 x 4 x 4", 4);
  test_layout<false>("stride 2", strided, "1 x 16 x 16", 3);
  test_layout<true>("stride 2, input gradient", strided, "1 x 16 x 16", 4);
  test_layout<false>("4x4 kernel, stride 2", four, "4 x 8 x 8", 2);
  test_layout<false>("1x1", square(3, 9, 32, 32, 32, 1), "1 x 1 x 256", 8);
  test_layout<false, 2>("16x16, 32 channels", square(1, 16, 32, 32, 32), "1 x 16 x 16", 2);
  test_layout<true, 2>("4x4, 32 channels", square(16, 4, 32, 32, 16), "16 x 4 x 4", 2);
  test_layout<false, 2>("1x1, 32 channels", square(3, 9, 32, 32, 32, 1), "1 x 1 x 256", 8);
  test_layout<false, 1, true>("stride 2, im2col", strided, "1 x 1 x 256", 2);
  test_layout<true, 1, true>("6x6, im2col", square(8, 6, 16, 32, 16), "1 x 1 x 256", 2);
  test_layout<false, 1, true>("1x1, im2col", square(3, 9, 32, 32, 32, 1), "1 x 1 x 256", 8);
}

void test_refusals() {
  auto p = square(1, 8, 16, 16, 16);
  p.out_height = p.out_width = 8;
  GatherForm form{1, 2};
  struct Uses {
    bool fused = false, halved = false, input_gradient = false;
  };
  const auto refused = [&](const char* reason, auto change, const Uses& uses = {}) {
    auto changed = p;
    change(changed);
    HopperGatherGeometry g;
    const std::string why =
        hopper_gather_geometry(changed, uses.input_gradient, form, kSharedLimit, g, {uses.fused, false}, uses.halved);
    expect(why.find(reason) != std::string::npos, std::string("refusal: ") + reason + ", got " + why);
  };
  refused("takes bfloat16 and float16", [](auto& q) { q.dtype = DDST_CUDA_TFLOAT32; });
  refused("does not upsample", [](auto&) {}, {.fused = true, .halved = true});
  refused("block must", [](auto& q) { q.block_out = 8; });
  refused("taps", [](auto& q) { q.kernel_width = 6; });
  refused("channels must", [](auto& q) { q.in_channels = 12; });
  form.depth = 2;
  refused("even number of slices of 16, got 3", [](auto& q) { q.in_channels = 40; });
  refused("two stages", [](auto& q) { q.in_channels = 32, q.kernel_height = q.kernel_width = 4; });
  form.im2col = true;
  refused("im2col copies 16 channels", [](auto& q) { q.in_channels = 32; });
  form.depth = 1;
  refused("which im2col does not copy", [](auto&) {}, {.fused = true});
  refused("of a strided convolution", [](auto& q) { q.stride_y = 2, q.out_height = 4; }, {.input_gradient = true});
  refused("two stages", [](auto& q) { q.kernel_height = q.kernel_width = 4, q.out_height = q.out_width = 7; });
  refused("lower[1] is -130, expected -128", [](auto& q) { q.padding_y = 130, q.out_height = 266; });
  form.granules = 4;
  refused("products of four granules", [](auto&) {});
}

}  // namespace

int main() {
  test_counts<1, 2>(0.1, 1.15);
  test_counts<1, 2>(0.3, 1.15);
  test_counts<4, 1>(0.1, 1.15);
  test_counts<1, 2, 2>(0.1, 1.15);
  test_layouts();
  test_refusals();
  test_fault_injection<HopperGatherTraits<dev::bf16, false, 1, 1>>("forward");
  test_fault_injection<HopperGatherTraits<dev::bf16, true, 1, 2>>("input gradient, clusters");
  test_fault_injection<HopperGatherTraits<dev::bf16, false, 1, 2, HopperPlain, 2>>("32 channels, clusters");
  test_fault_injection<HopperGatherTraits<dev::bf16, true, 1, 1, HopperPlain, 1, true>>("im2col");
  return finish("hopper gather faults");
}
