// The gather kernel in bfloat16 on random ragged problems, against float64.
#include "gather_random.hpp"

int main() {
  using namespace ddst;
  test::test_random<dev::bf16, false, true>("bf16 forward, large tile", 30, 160);
  test::test_random<dev::bf16, false, false>("bf16 forward, small tile", 70, 96);
  test::test_random<dev::bf16, true, true>("bf16 input gradient, large tile", 30, 160);
  test::test_random<dev::bf16, true, false>("bf16 input gradient, small tile", 70, 96);
  return finish("gather bf16");
}
