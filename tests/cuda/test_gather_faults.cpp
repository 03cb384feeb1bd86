// The gather kernel's barriers and waits are each needed; its shared memory is free of bank conflicts; tiles are shaped
// as meant; taps outside of the image are skipped; what it cannot run is refused.
#include "gather_problem.hpp"

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

template <class Traits>
void test_fault_injection(const char* name) {
  Rng rng(5);
  const GatherProblem<typename Traits::T> problem(square(1, 8, 112, 48, 16), Traits::kTransposed, 0.6, false, rng);
  const auto stats = run<Traits>(problem, {}, name);
  const int barriers = int(stats.barriers / stats.blocks), waits = int(stats.waits / stats.blocks / Traits::kThreads);
  expect(barriers == 1 + 7 - Traits::kTransposed * 4 && waits == barriers, std::string(name) + ": number of barriers");
  for (int i = 0; i < barriers; ++i) {
    emu::Options options;
    options.drop_barrier = i;
    expect_caught(std::string(name) + ", no barrier " + std::to_string(i), "race in shared memory",
                  [&] { run<Traits>(problem, options, "", false); });
    options.drop_barrier = -1;
    options.drop_wait = i;
    expect_caught(std::string(name) + ", no wait " + std::to_string(i), "in flight",
                  [&] { run<Traits>(problem, options, "", false); });
  }
}

template <class T, bool kLarge = true>
emu::Stats count(const ddst_cuda_conv2d_problem& p, const std::string& name) {
  Rng rng(6);
  const GatherProblem<T> problem(p, false, 1, false, rng);
  return run<Traits<T, false, kLarge>>(problem, {}, name);
}

void test_conflicts() {
  auto strided = square(1, 32, 16, 32, 16);
  strided.stride_y = strided.stride_x = 2;
  auto pointwise = square(3, 9, 32, 32, 32, 1);
  const std::pair<const char*, ddst_cuda_conv2d_problem> shapes[] = {
      {"16x16 pixels", square(1, 16, 32, 32, 32)},
      {"8x8", square(4, 8, 16, 32, 16)},
      {"4x4", square(16, 4, 16, 32, 16)},
      {"stride 2", strided},
      {"1x1", pointwise},
  };
  for (const auto& [name, shape] : shapes) {
    expect(count<dev::bf16>(shape, name).ldmatrix_conflicts == 0, std::string(name) + ": bank conflicts, bf16");
    expect(count<float, false>(shape, name).ldmatrix_conflicts == 0, std::string(name) + ": bank conflicts, tf32");
  }
}

// At 4x4, a 3x3 kernel has 100 of 144 (pixel, tap) pairs inside. Images are the fastest dimension of a tile, so that
// each m16 tile is one pixel of 16 images, and no other pair costs anything.
void test_skipped_taps() {
  const auto stats = count<dev::bf16>(square(16, 4, 16, 16, 16), "4x4 batch 16");
  expect(stats.blocks == 1 && stats.mma == 100 * 2, "products of 16 images of 4x4: " + std::to_string(stats.mma));
}

void test_tiles() {
  GatherGeometry g;
  const auto shape = [&](const ddst_cuda_conv2d_problem& p) {
    expect(gather_geometry(p, false, gather_tile(true, 2), kSharedLimit, g).empty(), "geometry");
    return std::to_string(1 << g.log_tile_images) + " images of " + std::to_string(1 << g.log_tile_rows) + " x " +
           std::to_string(1 << g.log_tile_cols);
  };
  const auto with_output = [](ddst_cuda_conv2d_problem p) { return p.out_height = p.out_width = p.height, p; };
  const std::pair<int, const char*> tiles[] = {
      {4, "16 images of 4 x 4"}, {8, "4 images of 8 x 8"}, {16, "1 images of 16 x 16"}, {32, "1 images of 16 x 16"}};
  for (const auto& [size, expected] : tiles) {
    const std::string got = shape(with_output(square(64, size, 256, 256, 16)));
    expect(got == expected, std::to_string(size) + " pixels wide: tile of " + got);
  }
  shape(with_output(square(64, 7, 256, 256, 16, 1)));
  expect(g.images == 1 && g.in_width == 64 * 49 && g.tiles == 13 && g.patch_slots == 256, "1x1: a row of pixels");
}

// Recorded: what a 3x3 kernel at 16x16 pixels takes. 1, 4, 1 and 2 blocks of threads fit a multiprocessor of an H100.
void test_shared_memory() {
  const auto bytes = [](bool large, int dtype) {
    auto p = square(64, 16, 256, 256, 16);
    p.out_height = p.out_width = 16, p.dtype = dtype;
    GatherGeometry g;
    const int element_bytes = dtype == DDST_CUDA_TFLOAT32 ? 4 : 2;
    const GatherTile tile = gather_tile(large, element_bytes);
    expect(gather_geometry(p, false, tile, kSharedLimit, g).empty(), "geometry");
    return gather_layout(g, tile, element_bytes).bytes;
  };
  const int found[] = {bytes(true, DDST_CUDA_BFLOAT16), bytes(false, DDST_CUDA_BFLOAT16),
                       bytes(true, DDST_CUDA_TFLOAT32), bytes(false, DDST_CUDA_TFLOAT32)};
  const int expected[] = {144788, 49764, 191316, 98148};
  for (int i = 0; i < 4; ++i)
    expect(found[i] == expected[i], "shared memory " + std::to_string(i) + ": " + std::to_string(found[i]) + " bytes");
}

void test_refusals() {
  auto p = square(1, 8, 16, 16, 16);
  p.out_height = p.out_width = 8;
  const auto refused = [&](const char* reason, auto change) {
    auto changed = p;
    change(changed);
    GatherGeometry g;
    const std::string why = gather_geometry(changed, false, gather_tile(true, 2), kSharedLimit, g);
    expect(why.find(reason) != std::string::npos, std::string("refusal: ") + reason + ", got " + why);
  };
  refused("block must", [](auto& q) { q.block_out = 8; });
  refused("stride must", [](auto& q) { q.stride_x = 3; });
  refused("taps", [](auto& q) { q.kernel_width = 6; });
  refused("channels must", [](auto& q) { q.in_channels = 12; });
  refused("must be positive", [](auto& q) { q.images = 0; });
  refused("dtype must", [](auto& q) { q.dtype = 7; });
  refused("2^31 pixels", [](auto& q) { q.images = 1 << 26; });
  refused("shared memory", [](auto& q) { q.kernel_height = q.kernel_width = 4; });
}

}  // namespace

int main() {
  test_fault_injection<Traits<dev::bf16, false, true>>("forward");
  test_fault_injection<Traits<dev::bf16, true, false>>("input gradient");
  test_conflicts();
  test_skipped_taps();
  test_tiles();
  test_shared_memory();
  test_refusals();
  return finish("gather faults");
}
