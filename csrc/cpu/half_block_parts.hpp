// A pass of a half block's convolution, a few images or a strip of rows at a time, so that what it reads is made just
// before, and what it writes finished just behind, in L2.
#pragma once

#include <algorithm>
#include <memory>

#include "conv_passes.hpp"
#include "half_block.hpp"

namespace ddst::cpu {

// What is computed together: some whole images, or a strip of rows of one. Rows of the pass' source and output.
struct Part {
  int64_t image, images;
  int64_t row, rows;
  int64_t source_row, source_rows;
  int64_t padding;  // of the strip's axis: what its first row lacks above the source rows that it has

  bool same_shape(const Part& o) const {
    return images == o.images && rows == o.rows && source_rows == o.source_rows && padding == o.padding;
  }
};

// The parts of a pass, of equal size as far as images and rows divide, whose source and output stay in L2. Strips begin
// at multiples of `step` rows. Where there are parts for every thread, each thread takes parts of its own.
struct Parts {
  Array<Part> parts;
  int64_t tasks;    // over the parts
  int64_t threads;  // within one

  // whole: one of all images. source_rows(part): fills in what a strip reads.
  template <typename SourceRows>
  Parts(const Part& whole, int64_t step, int64_t image_bytes, int64_t multiply_adds, const SourceRows& source_rows) {
    const int64_t images = whole.images, rows = whole.rows;
    constexpr int64_t kPartBytes = 256 * 1024;
    const int64_t most = task_count(multiply_adds);
    const int64_t strips = std::clamp<int64_t>(image_bytes / kPartBytes, 1, std::max<int64_t>(1, rows / step));
    const int64_t wanted = ceil_div(images, std::max<int64_t>(1, kPartBytes / image_bytes));
    const int64_t groups = std::max(wanted, std::min(images, ceil_div(most, strips)));
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t image = images * group / groups, next = images * (group + 1) / groups;
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t row = rows / step * strip / strips * step;
        const int64_t end = strip + 1 == strips ? rows : rows / step * (strip + 1) / strips * step;
        Part part{image, next - image, row, end - row, 0, whole.source_rows, whole.padding};
        if (strips > 1) source_rows(part);
        parts.push_back(part);
      }
    }
    const int64_t count = static_cast<int64_t>(parts.size());
    tasks = count >= most ? most : 1;
    threads = count >= most ? 1 : most;
  }
};

// The parts of a forward pass: strips of its output.
inline Parts forward_parts(const Half& half, int64_t image_bytes) {
  const ConvGeometry& g = half.geometry;
  const Part whole{0, half.images, 0, g.out_h, 0, g.in_h, g.pad_h};
  return {whole, half.pool, image_bytes, half.multiply_adds(), [&](Part& part) {
            const int64_t top = part.row * g.stride_h - g.pad_h;
            const int64_t end = (part.row + part.rows - 1) * g.stride_h - g.pad_h + (g.kernel_h - 1) * g.dilation_h + 1;
            part.source_row = std::clamp<int64_t>(top, 0, g.in_h - 1);
            part.source_rows = std::max<int64_t>(1, std::min(end, g.in_h) - part.source_row);
            part.padding = part.source_row - top;
          }};
}

// The parts of an input gradient: strips of the enlarged map.
inline Parts input_grad_parts(const Half& half, int64_t image_bytes) {
  const ConvGeometry& g = half.geometry;
  const Part whole{0, half.images, 0, g.in_h, 0, g.out_h, g.pad_h};
  return {whole, half.upsample, image_bytes, half.multiply_adds(), [&](Part& part) {
            const int64_t least = part.row + g.pad_h - (g.kernel_h - 1) * g.dilation_h;
            const int64_t last = (part.row + part.rows - 1 + g.pad_h) / g.stride_h;
            part.source_row = std::clamp<int64_t>(least > 0 ? ceil_div(least, g.stride_h) : 0, 0, g.out_h - 1);
            part.source_rows = std::max<int64_t>(1, std::min(last + 1, g.out_h) - part.source_row);
            part.padding = part.row + g.pad_h - part.source_row * g.stride_h;
          }};
}

// Runs a pass of the convolution part by part. before(part, to) writes the rows that it reads, after(index, part, from)
// takes those that it wrote; without staging the pass reads `source` or writes `out` itself.
template <typename T>
struct PartedPass {
  const Parts& parts;
  ImageShape source_shape, out_shape;  // of all of it
  bool stage_in, stage_out;
  const T* source;
  T* out;
  // What before() and after() read: fetched in time. Elements that a row of source or output stands for.
  const T *raw, *finishing;
  int64_t raw_image, finishing_image;

  // make(part): its pass.
  template <typename Make, typename Before, typename After>
  void run(const Tensor& like, const Make& make, const Before& before, const After& after) const {
    Array<const GatherPass<T>*> pass_of;
    Array<std::unique_ptr<GatherPass<T>>> passes;
    Array<const Part*> made_for;
    int64_t most_in = 0, most_out = 0;
    for (const Part& part : parts.parts) {
      size_t i = 0;
      while (i < made_for.size() && !made_for[i]->same_shape(part)) ++i;
      if (i == made_for.size()) {
        made_for.push_back(&part);
        passes.emplace_back(new GatherPass<T>(make(part)));
      }
      pass_of.push_back(passes[i].get());
      most_in = std::max(most_in, part.images * part.source_rows * source_shape.w * source_shape.channels);
      most_out = std::max(most_out, part.images * part.rows * out_shape.w * out_shape.channels);
    }
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t in_size = stage_in ? ceil_div(most_in, kLine) * kLine : 0;
    const int64_t out_size = stage_out ? ceil_div(most_out, kLine) * kLine : 0;
    const Tensor memory = empty_tensor("a workspace", {parts.tasks, in_size + out_size}, like);
    const int64_t count = static_cast<int64_t>(parts.parts.size());
    run_tasks(parts.tasks, [&](int64_t task) {
      T* const staged_in = memory.mutable_data_ptr<T>() + task * (in_size + out_size);
      T* const staged_out = staged_in + in_size;
      const int64_t end = count * (task + 1) / parts.tasks;
      for (int64_t i = count * task / parts.tasks; i < end; ++i) {
        const Part& part = parts.parts[i];
        if (stage_in) before(part, staged_in);
        const T* const from = stage_in ? staged_in : row(source, source_shape, part.image, part.source_row);
        T* const to = stage_out ? staged_out : const_cast<T*>(row(out, out_shape, part.image, part.row));
        pass_of[i]->run(from, to, fetch(part, i + 1 < end ? &parts.parts[i + 1] : nullptr));
        after(i, part, to);
      }
    });
  }

 private:
  static const T* row(const T* base, const ImageShape& shape, int64_t image, int64_t row) {
    return base + (image * shape.h + row) * shape.w * shape.channels;
  }
  typename GatherPass<T>::Fetch fetch(const Part& part, const Part* next) const {
    typename GatherPass<T>::Fetch fetch;
    if (stage_in && next != nullptr) {
      fetch.ahead = raw + (next->image * source_shape.h + next->source_row) * raw_image / source_shape.h;
      fetch.ahead_image = raw_image * next->source_rows / source_shape.h;
    }
    if (stage_out && finishing != nullptr) {
      fetch.beside = finishing + (part.image * out_shape.h + part.row) * finishing_image / out_shape.h;
      fetch.beside_image = finishing_image * part.rows / out_shape.h;
    }
    return fetch;
  }
};

// The convolution of one part, as if its rows were all.
inline ConvGeometry part_geometry(const Half& half, const Part& part, bool forward) {
  ConvGeometry g = half.geometry;
  g.images = part.images;
  g.in_h = forward ? part.source_rows : part.rows;
  g.out_h = forward ? part.rows : part.source_rows;
  g.pad_h = part.padding;
  return g;
}

}  // namespace ddst::cpu
