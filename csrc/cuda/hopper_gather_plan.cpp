// How the gather kernel for sm_90a would cut a problem, or why it cannot: ddst/ops/cuda/hopper.py chooses by it. No
// operator, as torch keeps the memory of every string that an operator returns; no torch, no CUDA.
#include <cstdio>

#include "hopper_gather_geometry.hpp"

// squares, halved: of fused half blocks. facts: images, rows and columns of a tile; rows and columns of an image's
// patch (with im2col: taps, pixels); tiles of all phases, groups, slices; stages, ints of a record, bytes of shared
// memory. message: why not, or an empty string.
extern "C" __attribute__((visibility("default"))) void ddst_cuda_hopper_gather_plan(
    const ddst_cuda_conv2d_problem* problem, bool input_gradient, int granules, int cluster, int depth, bool im2col,
    bool fused, bool squares, bool halved, int shared_limit, int32_t facts[11], char* message, int size) {
  ddst::cuda::HopperGatherGeometry g;
  const ddst::cuda::GatherForm form{granules, cluster, depth, im2col};
  const std::string why = hopper_gather_geometry(*problem, input_gradient, form, shared_limit, g,
                                                 ddst::cuda::GatherShape{fused, squares}, halved);
  std::snprintf(message, static_cast<size_t>(size), "%s", why.c_str());
  if (!why.empty()) return;
  const int32_t found[] = {
      1 << g.log_tile_images,
      1 << g.log_tile_rows,
      1 << g.log_tile_cols,
      g.patch_rows * g.parts_y,
      g.patch_cols * g.parts_x,
      g.tiles * g.phases_y * g.phases_x,
      g.groups,
      g.slices,
      g.stages,
      g.record_ints,
      g.bytes,
  };
  for (int i = 0; i < 11; ++i) facts[i] = found[i];
}
