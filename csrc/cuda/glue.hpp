// What the glue of the CUDA ops shares: torch's current stream, launch errors, checks of tensors. Stable ABI only.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <optional>

#include "../topology.hpp"
#include "ddst_cuda.h"
#include "device.h"
#include "tensor_maps.h"

namespace ddst::cuda {

// aoti_torch_get_current_cuda_stream lives in libtorch_cuda.so only. It is looked up, not linked, so that this library
// can be linked on a machine without a CUDA torch, and also loads there.
inline void* current_stream(const char* op, int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (function == nullptr) fail(op, "this torch has no libtorch_cuda.so with aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  if (function(device, &stream) != AOTI_TORCH_SUCCESS) fail(op, "torch has no current stream on CUDA device ", device);
  return stream;
}

inline void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, "ddst_cuda::", op, ": CUDA error ", error, " (", ddst_cuda_error_text(error), ")");
}

// The current device is the one that will read the map.
inline void encode_map(const char* op, const TensorMap& map, EncodedTensorMap& encoded) {
  const std::string why = tensor_map_error(map);
  if (!why.empty()) fail(op, why);
  check_launch(op, ddst_cuda_tensor_map(&map, &encoded));
}

inline int64_t shared_limit(const char* op, int32_t device) {
  int bytes = 0;
  check_launch(op, ddst_cuda_shared_limit(device, &bytes));
  return bytes;
}

// DDST_CUDA_... of a tensor. allow_tf32: whether products of float32 may be TF32.
inline int dtype_code(const char* op, const Tensor& t, bool allow_tf32) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DDST_CUDA_BFLOAT16;
    case ScalarType::Half:
      return DDST_CUDA_FLOAT16;
    case ScalarType::Float:
      return allow_tf32 ? DDST_CUDA_TFLOAT32 : DDST_CUDA_FLOAT32;
    default:
      fail(op, "input has dtype ", torch::headeronly::toString(t.scalar_type()), ", expected BFloat16, Half or Float");
  }
}

inline void check_device(const char* op, const char* name, const Tensor& t, int32_t device) {
  if (!t.is_cuda() || t.get_device_index() != device) fail(op, name, " is not on CUDA device ", device);
}

inline void check_shape(const char* op, const char* name, const Tensor& t, const Ints& expected) {
  if (shape_text(t) != shape_text(expected)) {
    fail(op, name, " has shape ", shape_text(t), ", expected ", shape_text(expected));
  }
}

inline void check_aligned(const char* op, const char* name, const Tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 != 0) {
    fail(op, name, " begins at an address that is no multiple of 16");
  }
}

// [N, C, H, W] with dense NHWC memory, aligned to 16 bytes.
inline void check_channels_last(const char* op, const char* name, const Tensor& t, int32_t device) {
  check_device(op, name, t, device);
  if (t.dim() != 4) fail(op, name, " has shape ", shape_text(t), ", expected 4 dimensions [N, C, H, W]");
  const int64_t strides[4] = {t.size(1) * t.size(2) * t.size(3), 1, t.size(1) * t.size(3), t.size(1)};
  for (int i = 0; i < 4; ++i) {
    if (t.size(i) > INT32_MAX) fail(op, name, " has shape ", shape_text(t), ", expected int32 sizes");
    if (t.size(i) > 1 && t.stride(i) != strides[i] && t.numel() > 0)
      fail(op, name, " is not dense channels_last memory");
  }
  check_aligned(op, name, t);
}

// A contiguous int32 vector; returns its entries.
inline const int32_t* check_index(const char* op, const char* name, const Tensor& t, int64_t numel, int32_t device) {
  check_device(op, name, t, device);
  if (t.scalar_type() != ScalarType::Int || t.dim() != 1 || t.numel() != numel || !t.is_contiguous()) {
    fail(op, name, " has dtype ", torch::headeronly::toString(t.scalar_type()), " and shape ", shape_text(t),
         ", expected a contiguous int32 vector of ", numel);
  }
  return t.const_data_ptr<int32_t>();
}

// The tables of a fused half block's norm (prologue.cuh), null where there is none.
struct Prologues {
  const float *mean = nullptr, *scale = nullptr, *shift = nullptr;
  int norm = 0;
};
inline Prologues check_prologue(const char* op, const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
                                const std::optional<Tensor>& shift, int64_t images, int64_t channels, int32_t device) {
  if (!mean.has_value() || !scale.has_value() || !shift.has_value()) {
    if (mean.has_value() || scale.has_value() || shift.has_value())
      fail(op, "mean, scale and shift must all be there or all be None");
    return {};
  }
  const auto table = [&](const char* name, const Tensor& t, const Ints& shape) {
    check_device(op, name, t, device);
    check_shape(op, name, t, shape);
    if (t.scalar_type() != ScalarType::Float || !t.is_contiguous()) fail(op, name, " is not contiguous float32 memory");
    check_aligned(op, name, t);
    return t.const_data_ptr<float>();
  };
  const Ints shape = scale->dim() == 2 ? Ints{images, channels} : Ints{channels};
  return {table("mean", *mean, {channels}), table("scale", *scale, shape), table("shift", *shift, shape),
          static_cast<int>(shape.size())};
}

inline void check_ints(const char* op, const char* name, const Ints& ints, size_t count, int64_t least) {
  bool ok = ints.size() == count;
  for (int64_t i : ints) ok = ok && i >= least && i <= INT32_MAX;
  if (!ok) fail(op, name, " is ", shape_text(ints), ", expected ", count, " int32 numbers of at least ", least);
}

}  // namespace ddst::cuda
