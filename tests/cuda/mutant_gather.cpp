// A few problems that together reach every line of the gather kernel: what test_cuda_gather.py runs changed kernels on.
#include "gather_problem.hpp"

using namespace ddst;
using namespace ddst::test;

namespace {

template <class Traits>
void check(const char* name, ddst_cuda_conv2d_problem p, double density) {
  Rng rng(3);
  const GatherProblem<typename Traits::T> problem(p, Traits::kTransposed, density, true, rng);
  for (const bool delay : {false, true}) {
    emu::Options options;
    options.seed = 5, options.delay_copies = delay;
    expect(run<Traits>(problem, options, name).ldmatrix_conflicts == 0, std::string(name) + ": bank conflicts");
  }
}

ddst_cuda_conv2d_problem problem(int images, int height, int width, int in, int out, int kernel_h, int kernel_w,
                                 int stride_y, int stride_x, int block_out, int block_in) {
  return {images, height, width, in, 0, 0, out, kernel_h, kernel_w, stride_y, stride_x, 1, 2, block_out, block_in, 0};
}

}  // namespace

int main() {
  check<Traits<dev::bf16, false, false>>("forward", problem(3, 6, 17, 56, 88, 3, 2, 1, 2, 32, 32), 0.6);
  check<Traits<dev::bf16, true, false>>("input gradient", problem(9, 4, 5, 88, 56, 3, 2, 2, 2, 32, 32), 0.6);
  check<Traits<float, true, false>>("tf32 input gradient", problem(1, 4, 8, 20, 36, 2, 3, 1, 1, 16, 16), 0.7);
  return finish("gather");
}
