// A few problems that together reach every line of the gather kernel for sm_90a: what test_cuda_gather_mutants.py runs
// changed kernels on.
#include "hopper_gather_problem.hpp"

using namespace ddst;
using namespace ddst::test;

namespace {

template <class T, bool kTransposed, int kWidth, int kCluster, int kDepth = 1, bool kIm2col = false>
void check(const char* name, ddst_cuda_conv2d_problem p, double density) {
  Rng rng(3);
  const GatherProblem<T> problem(p, kTransposed, density, true, rng);
  emu::Options options;
  options.seed = 5;
  using Traits = HopperGatherTraits<T, kTransposed, kWidth, kCluster, HopperPlain, kDepth, kIm2col>;
  const auto run = run_hopper<Traits>(problem, options, name, 1);
  expect(run.stats.ldmatrix_conflicts == 0, std::string(name) + ": bank conflicts");
}

ddst_cuda_conv2d_problem problem(int images, int height, int width, int in, int out, int kernel_h, int kernel_w,
                                 int stride_y, int stride_x, int block_out, int block_in) {
  return {images, height, width, in, 0, 0, out, kernel_h, kernel_w, stride_y, stride_x, 1, 2, block_out, block_in, 0};
}

}  // namespace

int main() {
  check<dev::bf16, false, 1, 2>("forward", problem(3, 6, 17, 88, 152, 3, 2, 2, 2, 32, 32), 0.3);
  check<dev::fp16, true, 1, 2>("input gradient", problem(5, 9, 12, 152, 56, 2, 3, 2, 1, 32, 32), 0.3);
  check<dev::bf16, false, 4, 1>("forward, four granules", problem(1, 16, 16, 40, 88, 2, 2, 1, 1, 16, 16), 0.2);
  check<dev::fp16, true, 4, 1>("input gradient, four granules", problem(2, 5, 4, 88, 40, 2, 3, 1, 1, 16, 16), 0.3);
  check<dev::bf16, false, 1, 1, 2>("forward, 32 channels", problem(1, 9, 12, 96, 40, 2, 2, 1, 1, 16, 16), 0.2);
  check<dev::bf16, false, 1, 1, 2>("32 channels of a block", problem(1, 8, 9, 64, 40, 2, 2, 1, 1, 16, 32), 0.3);
  check<dev::fp16, true, 1, 1, 1, true>("input gradient, im2col", problem(3, 9, 12, 40, 56, 2, 3, 1, 1, 16, 16), 0.2);
  return finish("hopper gather");
}
