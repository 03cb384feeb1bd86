// Random ragged problems for some instantiations of the gather kernel.
#pragma once
#include "gather_problem.hpp"

namespace ddst::test {

// The large tile is for kernels of up to 9 taps, in float32 of stride 1: its stages hold a patch and the weights of all
// taps.
inline ddst_cuda_conv2d_problem random_problem(Rng& rng, int vector, bool large, int most_channels) {
  static const int kBlocks[][2] = {{16, 16}, {32, 32}, {64, 64}, {32, 16}, {64, 16}, {16, 16}, {16, 64}};
  static const int kKernels[][2] = {{1, 1}, {3, 3}, {3, 3}, {2, 3}, {1, 5}, {4, 4}};
  ddst_cuda_conv2d_problem p{};
  const auto& block = kBlocks[pick(rng, 0, 6)];
  const auto& kernel = kKernels[pick(rng, 0, large ? 4 : 5)];
  p.block_out = block[0], p.block_in = block[1], p.kernel_height = kernel[0], p.kernel_width = kernel[1];
  const int most_stride = large && vector == 4 ? 1 : 2;
  p.stride_y = pick(rng, 1, most_stride), p.stride_x = pick(rng, 0, 3) ? p.stride_y : pick(rng, 1, most_stride);
  p.padding_y = pick(rng, 0, p.kernel_height), p.padding_x = pick(rng, 0, 3) ? p.padding_y : pick(rng, 0, 3);
  p.images = pick(rng, 0, 2) ? pick(rng, 1, 3) : pick(rng, 1, 17);
  const int size = p.images > 3 ? 6 : 19;
  p.height = pick(rng, 1, size), p.width = pick(rng, 1, size);
  p.height = std::max(p.height, p.kernel_height - 2 * p.padding_y);
  p.width = std::max(p.width, p.kernel_width - 2 * p.padding_x);
  p.in_channels = pick(rng, 1, most_channels / vector) * vector,
  p.out_channels = pick(rng, 1, most_channels / vector) * vector;
  return p;
}

template <class T, bool kTransposed, bool kLarge>
void test_random(const char* name, int count, int most_channels) {
  Rng rng(kTransposed * 2 + kLarge + 17);
  const double start = seconds();
  long products = 0, blocks = 0;
  for (int i = 0; i < count; ++i) {
    const double density = pick(rng, 0, 8) == 0 ? pick(rng, 0, 1) : pick(rng, 1, 6) / 10.0;
    const GatherProblem<T> problem(random_problem(rng, 16 / sizeof(T), kLarge, most_channels), kTransposed, density,
                                   rng() % 2, rng);
    emu::Options options;
    options.seed = rng(), options.delay_copies = rng() % 2;
    const auto stats =
        run<Traits<T, kTransposed, kLarge>>(problem, options, std::string(name) + " " + std::to_string(i));
    products += stats.mma, blocks += stats.blocks;
  }
  std::printf("%s: %d random problems, %ld blocks of threads, %ld products, %.1f s\n", name, count, blocks, products,
              seconds() - start);
}

}  // namespace ddst::test
