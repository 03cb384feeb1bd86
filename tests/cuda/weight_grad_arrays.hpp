// What the emulated weight gradients are called with, and its copies in the emulator's global memory.
#pragma once
#include "ddst_cuda.h"
#include "emulator/block.hpp"
#include "emulator/memory.hpp"
#include "weight_grad.cuh"

namespace ddst::emulated {

struct Arrays {
  const void *gy, *x, *block_row, *block_col, *block_tap, *units;
  void* values_grad;
  std::int64_t units_count;
  const void *mean, *scale, *shift;
  int fused, norm, x_halved, gy_halved;
  float slope;
};

template <class T>
emu::Buffer input(const char* name, const void* from, std::int64_t count) {
  emu::Buffer buffer(name, std::size_t(count) * sizeof(T), emu::Buffer::Role::input);
  if (count && from) std::memcpy(buffer.host<T>(), from, std::size_t(count) * sizeof(T));
  return buffer;
}

template <class T>
struct Buffers {
  Buffers(const cuda::WeightGradShape& s, const Arrays& a, std::int64_t partial_floats)
      : arrays(a),
        bytes(std::size_t(s.slots) * s.block_out * s.block_in * sizeof(T)),
        factors(std::int64_t(a.norm == 2 ? s.images : 1) * s.in_channels),
        gy(input<T>("gy", a.gy,
                    std::int64_t(s.images) * (s.out_h >> a.gy_halved) * (s.out_w >> a.gy_halved) * s.out_channels)),
        x(input<T>("x", a.x, std::int64_t(s.images) * (s.in_h >> a.x_halved) * (s.in_w >> a.x_halved) * s.in_channels)),
        row(input<int>("block_row", a.block_row, s.slots)),
        col(input<int>("block_col", a.block_col, s.slots)),
        tap(input<int>("block_tap", a.block_tap, s.slots)),
        units(input<int>("units", a.units, a.units_count)),
        mean(input<float>("mean", a.mean, s.in_channels)),
        scale(input<float>("scale", a.scale, factors)),
        shift(input<float>("shift", a.shift, factors)),
        partials("partials", std::size_t(partial_floats) * 4, emu::Buffer::Role::output_once),
        values_grad("values_grad", bytes, emu::Buffer::Role::output_once) {}

  cuda::WeightGradParams<T> params(const cuda::WeightGradShape& s, const cuda::WeightGradSizes& sizes) {
    using Index = dev::global_ptr<const int>;
    return {dev::global_ptr<const T>(gy),
            dev::global_ptr<const T>(x),
            Index(row),
            Index(col),
            Index(tap),
            Index(units),
            dev::global_ptr<float>(partials),
            dev::global_ptr<T>(values_grad),
            s,
            sizes};
  }
  cuda::Prologue prologue() {
    using Table = dev::global_ptr<const float>;
    return {Table(mean), Table(scale), Table(shift), arrays.norm, arrays.slope};
  }
  void fetch() {
    if (!values_grad.fully_written()) throw emu::Failure("values_grad was not fully written");
    std::memcpy(arrays.values_grad, values_grad.template host<char>(), bytes);
  }

  const Arrays& arrays;
  const std::size_t bytes;
  const std::int64_t factors;
  emu::Buffer gy, x, row, col, tap, units, mean, scale, shift, partials, values_grad;
};

}  // namespace ddst::emulated
