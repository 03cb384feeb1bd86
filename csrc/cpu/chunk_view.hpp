// The images and rows of one chunk of a weight gradient.
#pragma once

#include "kernels.hpp"

namespace ddst::cpu {
namespace {

template <typename T>
struct ChunkView {
  int64_t image_begin, images;
  int64_t out_row_begin, out_rows;
  int64_t in_row_begin, in_rows;  // clipped to the image
};

template <typename T>
inline __attribute__((always_inline)) ChunkView<T> chunk_view(const WeightGradJob<T>& job, int64_t chunk) {
  const auto& g = job.geometry;
  ChunkView<T> view;
  view.image_begin = chunk / job.row_chunks * job.chunk_images;
  view.images = g.images - view.image_begin < job.chunk_images ? g.images - view.image_begin : job.chunk_images;
  view.out_row_begin = chunk % job.row_chunks * job.chunk_rows;
  view.out_rows = g.out_h - view.out_row_begin < job.chunk_rows ? g.out_h - view.out_row_begin : job.chunk_rows;
  int64_t begin = view.out_row_begin * g.stride_h - g.pad_h;
  int64_t end = (view.out_row_begin + view.out_rows - 1) * g.stride_h - g.pad_h + (g.kernel_h - 1) * g.dilation_h + 1;
  if (begin < 0) begin = 0;
  if (end > g.in_h) end = g.in_h;
  view.in_row_begin = begin;
  view.in_rows = end > begin ? end - begin : 0;
  return view;
}

}  // namespace
}  // namespace ddst::cpu
