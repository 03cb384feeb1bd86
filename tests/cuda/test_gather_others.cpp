// The gather kernel in TF32 and float16 on random ragged problems, against float64.
#include "gather_random.hpp"

int main() {
  using namespace ddst;
  test::test_random<float, false, true>("tf32 forward, large tile", 20, 140);
  test::test_random<float, false, false>("tf32 forward, small tile", 60, 84);
  test::test_random<float, true, true>("tf32 input gradient, large tile", 20, 140);
  test::test_random<float, true, false>("tf32 input gradient, small tile", 60, 84);
  test::test_random<dev::fp16, false, false>("fp16 forward, small tile", 20, 96);
  test::test_random<dev::fp16, true, true>("fp16 input gradient, large tile", 20, 160);
  return finish("gather tf32, fp16");
}
