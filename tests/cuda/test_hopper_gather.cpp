// The gather kernel for sm_90a on random ragged problems, against float64: both passes, all forms, one CTA and two.
#include "hopper_gather_problem.hpp"

using namespace ddst;
using namespace ddst::test;

int main() {
  test_random_hopper<dev::bf16, false, 1, 1>("forward", 6, 152);
  test_random_hopper<dev::fp16, false, 1, 2>("forward, clusters", 6, 152);
  test_random_hopper<dev::bf16, true, 1, 2>("input gradient, clusters", 6, 152);
  test_random_hopper<dev::fp16, true, 1, 1>("input gradient", 4, 152);
  test_random_hopper<dev::fp16, false, 4, 2>("forward, four granules, clusters", 4, 152);
  test_random_hopper<dev::bf16, true, 4, 1>("input gradient, four granules", 4, 152);
  test_random_hopper<dev::bf16, false, 1, 2, 2>("forward, 32 channels, clusters", 6, 152);
  test_random_hopper<dev::fp16, true, 1, 1, 2>("input gradient, 32 channels", 4, 152);
  test_random_hopper<dev::bf16, false, 1, 1, 1, true>("forward, im2col", 8, 152);
  test_random_hopper<dev::fp16, true, 1, 2, 1, true>("input gradient, im2col, clusters", 6, 152);
  return finish("hopper gather");
}
