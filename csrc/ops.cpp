// Schemas of every registered op. The tensor ops' CPU kernels are registered in
// cpu/{conv2d,linear,power_iteration}.cpp, those for CUDA devices in ddst/ops/cuda; fake kernels and autograd are in
// ddst/ops. The argument backend, a code of ddst/backends.py, is the one asked for, so that derivatives run on it too;
// record is the key of a recorder of ddst/ops/gradient_record.py, which only derivatives look at. No schema has a
// string: torch 2.11 to 2.13 keep the memory of every string that passes the stable ABI.
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

// The names stand in ddst/_extension.py.
int64_t cpu_capability() { return ddst::cpu::active_kernels().code; }

}  // namespace

STABLE_TORCH_LIBRARY(ddst, m) {
  m.def(
      "conv2d(Tensor input, Tensor values, Tensor? bias, Tensor topology, int[] weight_shape, int[] stride, "
      "int[] padding, int[] dilation, bool channels_last, int backend=0, int record=0) -> Tensor");
  m.def(
      "conv2d_input_grad(Tensor grad_output, Tensor values, Tensor topology, int[] weight_shape, "
      "SymInt[] input_size, int[] stride, int[] padding, int[] dilation, bool channels_last, int backend=0, int "
      "record=0) "
      "-> Tensor");
  m.def(
      "conv2d_weight_grad(Tensor grad_output, Tensor input, Tensor topology, int[] weight_shape, int[] block, "
      "int[] stride, int[] padding, int[] dilation, int backend=0) -> Tensor");
  m.def(
      "conv2d_block_scores(Tensor grad_output, Tensor input, int[] weight_shape, int[] block, int[] stride, "
      "int[] padding, int[] dilation) -> Tensor");
  m.def(
      "linear(Tensor input, Tensor values, Tensor? bias, Tensor topology, int[] weight_shape, int backend=0, int "
      "record=0) "
      "-> Tensor");
  m.def(
      "linear_input_grad(Tensor grad_output, Tensor values, Tensor topology, int[] weight_shape, int backend=0, int "
      "record=0) "
      "-> Tensor");
  m.def(
      "linear_weight_grad(Tensor grad_output, Tensor input, Tensor topology, int[] weight_shape, int[] block, "
      "int backend=0) -> Tensor");
  m.def("linear_block_scores(Tensor grad_output, Tensor input, int[] weight_shape, int[] block) -> Tensor");
  m.def("channel_moments(Tensor input) -> Tensor");
  m.def(
      "norm_act_conv2d(Tensor input, Tensor values, Tensor? bias, Tensor? residual, Tensor? mean, Tensor? var, "
      "Tensor? gamma, Tensor? beta, Tensor topology, int[] weight_shape, int[] stride, int[] padding, int[] dilation, "
      "float eps, float negative_slope, int upsample, int pool, int residual_upsample, bool batch_stats, bool moments, "
      "bool channels_last, int backend=0, int record=0) -> (Tensor, Tensor)");
  m.def(
      "norm_act_conv2d_input_grad(Tensor grad_output, Tensor input, Tensor values, Tensor? mean, Tensor? var, "
      "Tensor? gamma, Tensor? beta, Tensor topology, int[] weight_shape, int[] stride, int[] padding, int[] dilation, "
      "float eps, float negative_slope, int upsample, int pool, bool batch_stats, bool channels_last, int backend=0) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "norm_act_conv2d_weight_grad(Tensor grad_output, Tensor input, Tensor? mean, Tensor? var, Tensor? gamma, "
      "Tensor? beta, Tensor topology, int[] weight_shape, int[] block, int[] stride, int[] padding, int[] dilation, "
      "float eps, float negative_slope, int upsample, int pool, int backend=0) -> (Tensor, Tensor)");
  // u and v are written; returns u vᵀ at the active blocks.
  m.def(
      "power_iteration(Tensor values, Tensor topology, Tensor(a!) u, Tensor(b!) v, int[] matrix_shape, int channels, "
      "int taps, int iterations, int transposed, int parametrization, float eps, float noise) -> Tensor");
  m.def("cpu_capability() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ddst, CompositeExplicitAutograd, m) { m.impl("cpu_capability", TORCH_BOX(&cpu_capability)); }

// "key=value" lines, which ddst/_extension.py makes into a dict.
extern "C" __attribute__((visibility("default"))) const char* ddst_build_info() {
  static const std::string facts = std::string("compiler=") + kCompiler +
                                   "\nbuild_type=" DDST_BUILD_TYPE "\ntorch_headers=" TORCH_VERSION
                                   "\ntorch_abi_target=" DDST_TORCH_TARGET "\ncuda_architectures=" DDST_CUDA_FACT;
  return facts.c_str();
}
