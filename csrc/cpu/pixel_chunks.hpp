// Chunks of pixels as the weight-gradient kernel reads them. Included only by kernels_*.cpp.
//
// Activations that are not read where they lie are packed chunk by chunk: channels in groups, each group
// [pixel][lanes], or for vectors over output channels the input as planes, one for each channel; with the pixels in the
// order (row, column, image). With the images innermost a tap's products form few long contiguous runs even where
// images are tiny, and a run covers just the pixels whose tap lies inside the image: no padding is multiplied.
// Input columns are sorted by their remainder modulo the stride, which makes runs contiguous at any stride.
#pragma once

#include "chunk_view.hpp"
#include "layout.hpp"
#include "microkernel.hpp"

namespace ddst::cpu {
namespace {

DDST_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
DDST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// Position of input column `col` when columns are sorted by their remainder modulo the stride.
DDST_INLINE int64_t phase_position(int64_t col, int64_t width, int64_t stride) {
  const int64_t phase = col % stride;
  const int64_t longer = width % stride;  // so many phases have one column more
  const int64_t before = phase * (width / stride) + (phase < longer ? phase : longer);
  return before + col / stride;
}

// How an activation's channels are cut into packed groups.
struct Grouping {
  int block;   // channels of a block
  int width;   // lanes of a group
  int groups;  // groups of a block
};

// Pixels from one packed group to the next: odd, because groups a multiple of 4 KB apart would all compete for the same
// few lines of the L1 cache while one pixel is spread over them.
DDST_INLINE int64_t padded_pixels(int64_t pixels) { return pixels | 1; }

// The activation rows that a chunk needs.
template <typename T>
struct PixelRows {
  const T* source;  // NHWC
  int64_t image_rows, cols, channels;
  int64_t image_begin, images, row_begin, rows;

  DDST_INLINE const T* first() const { return source + (image_begin * image_rows + row_begin) * cols * channels; }
  DDST_INLINE int64_t pixels() const { return images * rows * cols; }
  // From the first to the last byte; with several images it spans what lies between their rows, too.
  DDST_INLINE int64_t bytes() const {
    return ((images - 1) * image_rows + rows) * cols * channels * static_cast<int64_t>(sizeof(T));
  }
};

template <typename T, int kWidth>
DDST_INLINE void spread_pixel(const T* src, int64_t groups, T* dst, int64_t group_stride) {
  for (int64_t g = 0; g < groups; ++g) std::memcpy(dst + g * group_stride, src + g * kWidth, sizeof(T) * kWidth);
}

// packed[(block - block_begin) * groups + group][pixel][width]; lanes without a channel are zero.
template <typename T>
void pack_pixels(const PixelRows<T>& from, int64_t stride, Grouping grouping, int64_t block_begin, int64_t block_end,
                 T* packed) {
  const int width = grouping.width;
  const int64_t group_stride = padded_pixels(from.pixels()) * width;
  const int64_t first_channel = block_begin * grouping.block;
  int64_t channels = (block_end - block_begin) * grouping.block;
  if (channels > from.channels - first_channel) channels = from.channels - first_channel;
  const bool whole = grouping.block % width == 0 && channels % width == 0;
  const int64_t whole_groups = channels / width;
  for (int64_t n = 0; n < from.images; ++n) {
    for (int64_t r = 0; r < from.rows; ++r) {
      const T* src = from.first() + (n * from.image_rows + r) * from.cols * from.channels;
      for (int64_t c = 0; c < from.cols; ++c, src += from.channels) {
        const int64_t position = stride == 1 ? c : phase_position(c, from.cols, stride);
        T* dst = packed + ((r * from.cols + position) * from.images + n) * width;
        if (whole && width == 32) {
          spread_pixel<T, 32>(src + first_channel, whole_groups, dst, group_stride);
        } else if (whole && width == 16) {
          spread_pixel<T, 16>(src + first_channel, whole_groups, dst, group_stride);
        } else if (whole && width == 8) {
          spread_pixel<T, 8>(src + first_channel, whole_groups, dst, group_stride);
        } else {
          for (int64_t block = block_begin; block < block_end; ++block) {
            for (int group = 0; group < grouping.groups; ++group, dst += group_stride) {
              const int64_t in_block = static_cast<int64_t>(group) * width;
              const int64_t first = block * grouping.block + in_block;
              int64_t lanes = width;
              if (lanes > grouping.block - in_block) lanes = grouping.block - in_block;
              if (lanes > from.channels - first) lanes = from.channels - first;
              int64_t i = 0;
              for (; i < lanes; ++i) dst[i] = src[first + i];
              for (; i < width; ++i) dst[i] = T(0);
            }
          }
        }
      }
    }
  }
}

// Channels of an activation: pixel i has them from first + i * stride on.
template <typename T>
struct Operand {
  const T* first;
  int64_t stride;
  DDST_INLINE int64_t pixel_bytes() const { return stride * static_cast<int64_t>(sizeof(T)); }
};

// One activation's part of a chunk: its groups of channels, packed or where they lie.
template <typename T>
struct ChunkSide {
  const T* base;
  int64_t first_group, group_stride, pixel_stride;
  DDST_INLINE Operand<T> group(int64_t i) const { return {base + (i - first_group) * group_stride, pixel_stride}; }
};

template <typename T>
DDST_INLINE ChunkSide<T> chunk_side(bool direct, const PixelRows<T>& rows, int64_t stride, Grouping grouping,
                                    int64_t block_begin, int64_t block_end, T* scratch) {
  if (direct) return {rows.first(), 0, grouping.width, rows.channels};
  pack_pixels(rows, stride, grouping, block_begin, block_end, scratch);
  return {scratch, block_begin * grouping.groups, padded_pixels(rows.pixels()) * grouping.width, grouping.width};
}

// The input as planes, one for each channel and `plane` elements apart, with the pixels in the order of build_runs.
template <typename T>
void pack_planes(bool direct, const PixelRows<T>& from, int64_t stride, T* planes, int64_t plane) {
  const int64_t line = from.cols * from.channels;
  if (!direct && from.images > 1) {
    for (int64_t r = 0; r < from.rows; ++r) {
      for (int64_t c = 0; c < from.cols; ++c) {
        const int64_t position = r * from.cols + phase_position(c, from.cols, stride);
        transpose(from.first() + r * line + c * from.channels, from.images, from.channels, from.image_rows * line,
                  planes + position * from.images, plane);
      }
    }
    return;
  }
  for (int64_t n = 0; n < from.images; ++n, planes += from.rows * from.cols) {
    const T* const image = from.first() + n * from.image_rows * line;
    if (stride == 1) {
      transpose(image, from.rows * from.cols, from.channels, from.channels, planes, plane);
      continue;
    }
    for (int64_t r = 0; r < from.rows; ++r) {
      for (int64_t phase = 0; phase < stride && phase < from.cols; ++phase) {
        transpose(image + r * line + phase * from.channels, ceil_div(from.cols - phase, stride), from.channels,
                  stride * from.channels, planes + r * from.cols + phase_position(phase, from.cols, stride), plane);
      }
    }
  }
}

// runs[run_begin[tap] .. run_begin[tap + 1]): the pixels of the chunk whose tap lies inside the image.
template <typename T>
void build_runs(const WeightGradJob<T>& job, const ChunkView<T>& view, Run* runs, int64_t* run_begin) {
  const auto& g = job.geometry;
  int64_t count = 0;
  for (int64_t kh = 0; kh < g.kernel_h; ++kh) {
    for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const int64_t tap_first = count;
      run_begin[kh * g.kernel_w + kw] = count;
      const int64_t shift_h = kh * g.dilation_h - g.pad_h;
      const int64_t shift_w = kw * g.dilation_w - g.pad_w;
      int64_t col_begin = ceil_div(-shift_w, g.stride_w);
      int64_t col_end = floor_div(g.in_w - 1 - shift_w, g.stride_w) + 1;
      if (col_begin < 0) col_begin = 0;
      if (col_end > g.out_w) col_end = g.out_w;
      if (col_begin >= col_end) continue;
      const int64_t in_col = phase_position(col_begin * g.stride_w + shift_w, g.in_w, g.stride_w);
      const int64_t passes = job.direct ? view.images : 1, inner = job.direct ? 1 : view.images;
      for (int64_t n = 0; n < passes; ++n) {
        for (int64_t r = 0; r < view.out_rows; ++r) {
          const int64_t in_row = (view.out_row_begin + r) * g.stride_h + shift_h;
          if (in_row < 0 || in_row >= g.in_h) continue;
          const Run run{((n * g.in_h + in_row - view.in_row_begin) * g.in_w + in_col) * inner,
                        ((n * g.out_h + r) * g.out_w + col_begin) * inner, (col_end - col_begin) * inner};
          Run& last = runs[count - 1];
          if (count > tap_first && last.in + last.length == run.in && last.out + last.length == run.out) {
            last.length += run.length;
          } else {
            runs[count++] = run;
          }
        }
      }
    }
  }
  run_begin[g.kernel_h * g.kernel_w] = count;
}

// Rows of the input and of grad_output that a chunk needs.
template <typename T>
struct ChunkRows {
  PixelRows<T> in, out;
};

template <typename T>
DDST_INLINE ChunkRows<T> chunk_rows(const WeightGradJob<T>& job, const ChunkView<T>& view) {
  const auto& g = job.geometry;
  return {{job.input, g.in_h, g.in_w, g.in_channels, view.image_begin, view.images, view.in_row_begin, view.in_rows},
          {job.grad_output, g.out_h, g.out_w, g.out_channels, view.image_begin, view.images, view.out_row_begin,
           view.out_rows}};
}

// Fetches the next chunk's activations, one after the other, while this chunk is computed.
struct ChunkPrefetcher {
  LineStream in, out;

  template <typename T>
  DDST_INLINE void start(const WeightGradJob<T>& job, int64_t chunk, int64_t chunk_end, int64_t calls) {
    if (chunk >= chunk_end) return;
    const ChunkRows<T> rows = chunk_rows(job, chunk_view(job, chunk));
    in.start(rows.in.first(), rows.in.bytes() / static_cast<int64_t>(sizeof(T)), calls);
    out.start(rows.out.first(), rows.out.bytes() / static_cast<int64_t>(sizeof(T)), calls);
    in.lines = out.lines = in.lines + out.lines;
  }
  // Where a tile over so many pixels begins to fetch a line a pixel.
  DDST_INLINE const char* next(int64_t pixels) { return in.address < in.end ? in.take(pixels) : out.take(pixels); }
};

}  // namespace
}  // namespace ddst::cpu
