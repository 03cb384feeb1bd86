// The C interface of the gather kernel (forward and input gradient): raw pointers and a stream.
#pragma once

#include "ddst_cuda.h"
#include "gather_geometry.hpp"

// Forward: output = act(W input + bias + residual). Input gradient: output = act(W^T input + ...), input is
// grad_output.
struct ddst_cuda_gather_arrays {
  const void *input, *values;
  const int32_t* records;       // as stage_record (gather_stage.cuh) says, for the tile and direction
  const void *bias, *residual;  // [channels of the output] or null; like the output, or null
  void* output;                 // not any of the others
  int32_t relu;
  // What follows is of a fused half block only (gather_fused.cuh), which has no relu.
  bool fused;
  const float *mean, *scale, *shift;
  const void* activated;
  int32_t norm, halved, residual_halved, squares;
  float slope, factor;
};

// Returns a cudaError_t. `geometry` is what gather_geometry makes for this dtype, direction and tile. Does not wait.
extern "C" int ddst_cuda_conv2d_gather(int dtype, bool input_gradient, bool large_tile,
                                       const ddst::cuda::GatherGeometry* geometry,
                                       const ddst_cuda_gather_arrays* arrays, void* stream);
