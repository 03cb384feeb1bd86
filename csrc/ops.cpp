// Schemas of every registered op, and the two ops that describe this build. The tensor ops' CPU kernels are
// registered in cpu/conv2d.cpp and cpu/linear.cpp, those for CUDA devices in ddst/ops/device.py; fake kernels and
// autograd are in ddst/ops. The argument backend is the one asked for, so that derivatives run on it too.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "cpu/kernels.hpp"

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

// "key=value" lines, which ddst/_extension.py makes into a dict.
std::string build_info() {
  return std::string("compiler=") + kCompiler +
         "\nbuild_type=" DDST_BUILD_TYPE "\ntorch_headers=" TORCH_VERSION "\ntorch_abi_target=" DDST_TORCH_TARGET
         "\ncuda_architectures=" DDST_CUDA_FACT;
}

std::string cpu_capability() { return ddst::cpu::active_kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY(ddst, m) {
  m.def(
      "conv2d(Tensor input, Tensor values, Tensor? bias, Tensor topology, int[] weight_shape, int[] stride, "
      "int[] padding, int[] dilation, bool channels_last, int backend=0) -> Tensor");
  m.def(
      "conv2d_input_grad(Tensor grad_output, Tensor values, Tensor topology, int[] weight_shape, "
      "SymInt[] input_size, int[] stride, int[] padding, int[] dilation, bool channels_last, int backend=0) "
      "-> Tensor");
  m.def(
      "conv2d_weight_grad(Tensor grad_output, Tensor input, Tensor topology, int[] weight_shape, int[] block, "
      "int[] stride, int[] padding, int[] dilation, int backend=0) -> Tensor");
  m.def(
      "conv2d_block_scores(Tensor grad_output, Tensor input, int[] weight_shape, int[] block, int[] stride, "
      "int[] padding, int[] dilation) -> Tensor");
  m.def(
      "linear(Tensor input, Tensor values, Tensor? bias, Tensor topology, int[] weight_shape, int backend=0) "
      "-> Tensor");
  m.def(
      "linear_input_grad(Tensor grad_output, Tensor values, Tensor topology, int[] weight_shape, int backend=0) "
      "-> Tensor");
  m.def(
      "linear_weight_grad(Tensor grad_output, Tensor input, Tensor topology, int[] weight_shape, int[] block, "
      "int backend=0) -> Tensor");
  m.def("linear_block_scores(Tensor grad_output, Tensor input, int[] weight_shape, int[] block) -> Tensor");
  m.def("build_info() -> str");
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ddst, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
