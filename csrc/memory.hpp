// Memory of the operators, tensors and workspaces: where it cannot be had, the error says what torch's own says.
//
// The library is built for a stable ABI under which torch hands over only that a call failed. Newer ones also export
// the text, which is therefore asked for at run time; where it is missing, the words that programs look for (to try a
// smaller batch) are said here.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// Null where torch does not have it (before 2.13).
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace ddst {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

inline std::string shape_text(const int64_t* sizes, int64_t n) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < n; ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  text << "]";
  return text.str();
}
inline std::string shape_text(const Ints& sizes) {
  return shape_text(sizes.data(), static_cast<int64_t>(sizes.size()));
}
inline std::string shape_text(const Tensor& t) { return shape_text(t.sizes().data(), t.dim()); }

// RuntimeError in Python, as from torch's allocators. naming_operator() puts the operator's name before the text.
class OutOfMemory : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline std::string out_of_memory_text(bool cpu, const std::string& bytes) {
  return (cpu ? "DefaultCPUAllocator: can't allocate memory: you tried to allocate "
              : "CUDA out of memory. Tried to allocate ") +
         bytes + " bytes.";
}

[[noreturn]] inline void fail_workspace(size_t count, size_t element) {
  const std::string bytes = std::to_string(count * element);
  throw OutOfMemory("no memory for a workspace of " + bytes + " bytes: " + out_of_memory_text(true, bytes));
}

// std::vector for workspaces: one that cannot be had is told with its bytes.
template <typename T>
struct Allocator : std::allocator<T> {
  template <typename U>
  struct rebind {
    using other = Allocator<U>;
  };
  Allocator() = default;
  template <typename U>
  Allocator(const Allocator<U>&) {}

  T* allocate(size_t count) {
    try {
      return std::allocator<T>::allocate(count);
    } catch (const std::bad_alloc&) {
      fail_workspace(count, sizeof(T));
    }
  }
};
template <typename T>
using Array = std::vector<T, Allocator<T>>;

// Bytes of a tensor, none where an int64 does not hold them.
inline std::optional<int64_t> tensor_bytes(const Ints& sizes, size_t element) {
  int64_t bytes = static_cast<int64_t>(element);
  for (int64_t size : sizes) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) return std::nullopt;
  }
  return bytes;
}

// make(), a call of torch that allocates a tensor of this shape on the device of `like`.
template <typename Make>
Tensor allocated(const char* what, const Ints& sizes, size_t element, const Tensor& like, const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    const std::optional<int64_t> count = tensor_bytes(sizes, element);
    const std::string bytes = count ? std::to_string(*count) : "more than 2^63";
    const bool asked = torch_exception_get_what_without_backtrace != nullptr;
    throw OutOfMemory(
        "no memory for " + std::string(what) + " of shape " + shape_text(sizes) + " (" + bytes + " bytes): " +
        (asked ? torch_exception_get_what_without_backtrace() : out_of_memory_text(like.is_cpu(), bytes)));
  }
}

// An uninitialised tensor on the device of `like`, of its dtype.
inline Tensor empty_tensor(const char* what, const Ints& sizes, const Tensor& like,
                           std::optional<MemoryFormat> format = std::nullopt) {
  return allocated(what, sizes, like.element_size(), like, [&] {
    return torch::stable::empty({sizes.data(), sizes.size()}, like.scalar_type(), std::nullopt, like.device(),
                                std::nullopt, format);
  });
}

// The tensor itself where it is contiguous: asking is cheaper than a call of the dispatcher.
inline Tensor as_contiguous(const Tensor& t) {
  if (t.is_contiguous()) return t;
  const auto sizes = t.sizes();
  return allocated("a contiguous copy", Ints(sizes.begin(), sizes.end()), t.element_size(), t,
                   [&] { return torch::stable::contiguous(t); });
}

// f(), whose errors of memory name the operator.
template <typename F>
auto naming_operator(const char* op, const F& f) -> decltype(f()) {
  try {
    return f();
  } catch (const OutOfMemory& error) {
    throw OutOfMemory("ddst::" + std::string(op) + ": " + error.what());
  }
}

}  // namespace ddst
