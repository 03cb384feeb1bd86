// A kernel set whose calls are noted, so that a run can say which forms it has tried.
#pragma once

#include <set>
#include <string>

#include "cpu/kernels.hpp"

namespace problem {

using namespace ddst::cpu;

template <typename T>
struct Watched {
  static inline Kernels<T> inner;
  static inline std::set<std::string> seen;

  static Kernels<T> of(const Kernels<T>& kernels) {
    inner = kernels;
    seen.clear();
    Kernels<T> watched = kernels;
    watched.gather = &gather;
    watched.planes = &planes;
    watched.plane_gather = &plane_gather;
    watched.panels = &panels;
    watched.block_vector = &block_vector;
    watched.pack_weights = &pack_weights;
    watched.transpose = &transpose;
    watched.weight_grad = &weight_grad;
    return watched;
  }

  // Every form that a set names in its tables.
  static std::set<std::string> forms(const Kernels<T>& kernels) {
    std::set<std::string> all{"planes",
                              "panels",
                              "block_vector by rows",
                              "block_vector by columns",
                              "pack_weights transposed",
                              "pack_weights straight",
                              "transpose"};
    for (const SliceShape* s = kernels.gather_slices; s->width != 0; ++s) {
      for (const char* source : {"pixels", "planes"}) all.insert(gather_form(s->width, source, false));
      if (s->width * sizeof(T) % 64 == 0) all.insert(gather_form(s->width, "pixels", true));
    }
    for (const DotShape* s = kernels.gather_dots; s->channels != 0; ++s) all.insert(dot_form(s->channels, s->lanes));
    for (const SliceShape* s = kernels.plane_slices; s->width != 0; ++s) {
      for (bool stream : {false, true}) all.insert(plane_gather_form(s->width, stream));
    }
    for (const int* width = kernels.weight_grad_slices; *width != 0; ++width) {
      all.insert(weight_grad_form("input", *width, false));
      all.insert(weight_grad_form("output", *width, false));
      if (*width * sizeof(T) % 64 == 0) all.insert(weight_grad_form("output", *width, true));
    }
    // Blocks of whole cache lines are cut into the widest.
    all.insert(weight_grad_form("input", kernels.weight_grad_slices[0], true));
    return all;
  }

 private:
  static std::string gather_form(int width, const std::string& source, bool stream) {
    return "gather " + std::to_string(width) + " from " + source + (stream ? " past the caches" : "");
  }
  static std::string dot_form(int channels, int lanes) {
    return "dot " + std::to_string(channels) + " over " + std::to_string(lanes);
  }
  static std::string plane_gather_form(int width, bool stream) {
    return "plane_gather " + std::to_string(width) + (stream ? " past the caches" : "");
  }
  static std::string weight_grad_form(const std::string& over, int width, bool direct) {
    return "weight_grad " + std::to_string(width) + " over " + over + (direct ? " in place" : "");
  }

  static void gather(const GatherJob<T>& job, int64_t t0, int64_t t1, int64_t b0, int64_t b1) {
    if (job.dot_lanes != 0)
      seen.insert(dot_form(job.block_out, job.dot_lanes));
    else
      seen.insert(gather_form(job.slice, job.planes ? "planes" : "pixels", job.stream && !job.planes));
    inner.gather(job, t0, t1, b0, b1);
  }
  static void planes(const PlaneJob<T>& job, int64_t c0, int64_t c1, T* source, T* out, PlaneVector* vectors,
                     int64_t* begin) {
    seen.insert("planes");
    inner.planes(job, c0, c1, source, out, vectors, begin);
  }
  static void plane_gather(const PlaneGatherJob<T>& job, int64_t c0, int64_t c1, T* planes, T* spare,
                           const char** pixels, T** outs) {
    seen.insert(plane_gather_form(job.slice, job.stream));
    inner.plane_gather(job, c0, c1, planes, spare, pixels, outs);
  }
  static void panels(const PanelJob<T>& job, int64_t v0, int64_t v1, int64_t b0, int64_t b1, T* panels) {
    seen.insert("panels");
    inner.panels(job, v0, v1, b0, b1, panels);
  }
  static void block_vector(const BlockVectorJob<T>& job, int64_t b0, int64_t b1) {
    seen.insert(job.row_major ? "block_vector by rows" : "block_vector by columns");
    inner.block_vector(job, b0, b1);
  }
  static void pack_weights(const T* block, int block_out, int block_in, int width, bool transposed, T* packed) {
    seen.insert(transposed ? "pack_weights transposed" : "pack_weights straight");
    inner.pack_weights(block, block_out, block_in, width, transposed, packed);
  }
  static void transpose(const T* src, int64_t rows, int64_t cols, int64_t src_stride, T* dst, int64_t dst_stride) {
    seen.insert("transpose");
    inner.transpose(src, rows, cols, src_stride, dst, dst_stride);
  }
  static void weight_grad(const WeightGradJob<T>& job, int64_t c0, int64_t c1, int64_t b0, int64_t b1, T* partial,
                          T* input, T* grad, Run* runs, int64_t* begin) {
    seen.insert(weight_grad_form(job.vector_over_in ? "input" : "output", job.slice, job.direct));
    inner.weight_grad(job, c0, c1, b0, b1, partial, input, grad, runs, begin);
  }
};

}  // namespace problem
