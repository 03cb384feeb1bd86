// Chooses the kernel set at run time.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace ddst::cpu {
namespace {

#if defined(__x86_64__)
bool supports_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool supports_avx512() {
  return supports_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
#endif

const KernelSet& choose() {
  const char* forced = std::getenv("DDST_CPU_CAPABILITY");
  const std::string name = forced == nullptr ? "" : forced;
  if (name == "portable") return kernels_portable();
#if defined(__x86_64__)
  if (name == "avx512" && supports_avx512()) return kernels_avx512();
  if (name == "avx2" && supports_avx2()) return kernels_avx2();
  if (name.empty()) {
    if (supports_avx512()) return kernels_avx512();
    if (supports_avx2()) return kernels_avx2();
  }
#elif defined(__aarch64__)
  if (name == "neon" || name.empty()) return kernels_neon();  // part of the architecture
#endif
  if (name.empty()) return kernels_portable();
  const bool known = name == "avx2" || name == "avx512" || name == "neon";
  throw std::invalid_argument(
      "ddst: environment variable DDST_CPU_CAPABILITY is '" + name + "', " +
      (known ? "which this processor does not support" : "expected portable, avx2, avx512 or neon"));
}

int64_t read_shares() {
  const char* text = std::getenv("DDST_WEIGHT_GRAD_SHARES");
  if (text == nullptr || *text == '\0') return 0;
  char* end = nullptr;
  const long shares = std::strtol(text, &end, 10);
  if (*end != '\0' || shares < 1 || shares > 1024) {
    throw std::invalid_argument("ddst: environment variable DDST_WEIGHT_GRAD_SHARES is '" + std::string(text) +
                                "', expected a number from 1 to 1024");
  }
  return shares;
}

}  // namespace

int64_t weight_grad_shares() {
  static const int64_t shares = read_shares();
  return shares;
}

const KernelSet& active_kernels() {
  // Not cached when choose() throws: the error then comes with every call, not only with the first.
  static const KernelSet& set = choose();
  return set;
}

}  // namespace ddst::cpu
