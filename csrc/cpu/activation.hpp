// Activations between torch and the kernels: every kernel reads and writes dense NHWC memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>

#include "../topology.hpp"
#include "kernels.hpp"

namespace ddst::cpu {

// Uninitialised memory aligned to a cache line.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!data_) fail_workspace(bytes, 1);
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// How many tasks are worth their start, for work of so many multiply-adds: at least one, at most `most`.
inline int64_t tasks_worth(int64_t multiply_adds, int64_t most) {
  constexpr int64_t kWorthATask = 400000;
  return std::clamp<int64_t>(multiply_adds / kWorthATask, 1, std::max<int64_t>(1, most));
}

inline int64_t task_count(int64_t multiply_adds) {
  return tasks_worth(multiply_adds, torch::stable::get_num_threads());
}

// f(i) for i in [0, count), on torch's threads. What a task throws is thrown here: torch would hand over that a call
// failed, and nothing of it.
template <typename F>
void run_tasks(int64_t count, const F& f) {
  if (count == 1) return f(0);
  std::exception_ptr error;
  std::once_flag thrown;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    try {
      for (int64_t i = begin; i < end; ++i) f(i);
    } catch (...) {
      std::call_once(thrown, [&] { error = std::current_exception(); });
    }
  });
  if (error) std::rethrow_exception(error);
}

// f(T()) for the T of dtype, Float or Double.
template <typename F>
auto in_dtype(const char* op, ScalarType dtype, const F& f) -> decltype(f(float())) {
  return naming_operator(op, [&] { return dtype == ScalarType::Float ? f(float()) : f(double()); });
}

// An odd number of cache lines: planes a power of two apart would compete for the same lines of the caches.
template <typename T>
int64_t plane_size(int64_t positions) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return (ceil_div(positions, kLine) | 1) * kLine;
}

struct ImageShape {
  int64_t images, channels, h, w;
  int64_t pixels() const { return images * h * w; }
};

// dst[n][c][r] = src[n][r][c] over images of rows x cols, in parallel.
template <typename T>
void transpose_images(const Kernels<T>& kernels, int64_t images, int64_t rows, int64_t cols, const T* src, T* dst) {
  constexpr int64_t kRows = 64;
  const int64_t strips = ceil_div(rows, kRows);
  const int64_t total = images * strips;
  const int64_t tasks = std::min<int64_t>(total, task_count(images * rows * cols * 4));
  run_tasks(tasks, [&](int64_t task) {
    for (int64_t i = total * task / tasks; i < total * (task + 1) / tasks; ++i) {
      const int64_t image = i / strips * rows * cols;
      const int64_t first = i % strips * kRows;
      kernels.transpose(src + image + first * cols, std::min(kRows, rows - first), cols, cols, dst + image + first,
                        rows);
    }
  });
}

inline bool has_strides(const Tensor& t, const int64_t (&expected)[4]) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] != 1 && strides[i] != expected[i]) return false;  // the stride of a dimension of one says nothing
  }
  return true;
}

// An input activation as NHWC: its own memory where that is its layout, else a packed copy.
template <typename T>
class NhwcInput {
 public:
  NhwcInput(const Tensor& t, const ImageShape& s, const Kernels<T>& kernels) : owner_(t) {
    if (has_strides(t, {s.h * s.w * s.channels, 1, s.w * s.channels, s.channels})) {
      data_ = t.const_data_ptr<T>();
      return;
    }
    owner_ = as_contiguous(t);
    copy_ = Buffer<T>(s.pixels() * s.channels);
    transpose_images<T>(kernels, s.images, s.channels, s.h * s.w, owner_.const_data_ptr<T>(), copy_.get());
    data_ = copy_.get();
  }
  const T* data() const { return data_; }

 private:
  Tensor owner_;
  Buffer<T> copy_;
  const T* data_;
};

// An output activation: kernels write NHWC, finish() gives the tensor in the wanted memory format.
template <typename T>
class NhwcOutput {
 public:
  NhwcOutput(const Tensor& like, const ImageShape& s, bool channels_last) : shape_(s) {
    result_ = empty_tensor("its output", {s.images, s.channels, s.h, s.w}, like,
                           channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    direct_ = channels_last || s.channels == 1 || s.h * s.w == 1;
    if (!direct_) copy_ = Buffer<T>(s.pixels() * s.channels);
    data_ = direct_ ? result_.template mutable_data_ptr<T>() : copy_.get();
  }
  T* data() const { return data_; }

  Tensor finish(const Kernels<T>& kernels) {
    if (!direct_) {
      transpose_images<T>(kernels, shape_.images, shape_.h * shape_.w, shape_.channels, data_,
                          result_.template mutable_data_ptr<T>());
    }
    return result_;
  }

 private:
  ImageShape shape_;
  Tensor result_;
  Buffer<T> copy_;
  bool direct_;
  T* data_;
};

}  // namespace ddst::cpu
