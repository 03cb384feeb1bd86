// The C interface of the gather kernel for sm_90a: raw pointers, encoded tensor maps, a stream.
#pragma once
#include "ddst_cuda.h"
#include "hopper_gather_geometry.hpp"
#include "tensor_maps.h"

// Forward: output = act(W input + bias + residual). Input gradient: output = act(W^T input + ...), input is
// grad_output.
struct ddst_cuda_hopper_gather_arrays {
  ddst::cuda::EncodedTensorMap input, values;  // of hopper_input_map and hopper_weights_map
  const int32_t *records, *order;              // as hopper_gather_geometry.hpp says, for the form and direction
  const void *bias, *residual;                 // [channels of the output] or null; like the output, or null
  void* output;                                // not any of the others
  int32_t relu;
  // What follows is of a fused half block only (hopper_gather_fused.cuh), which has no relu.
  bool fused;
  const float *mean, *scale, *shift;
  const void* activated;
  int32_t norm, residual_halved, squares;
  float slope, factor;
};

// Returns a cudaError_t. `geometry` is what hopper_gather_geometry makes for this dtype, direction and form. Does not
// wait. cudaErrorNoKernelImageForDevice where the library holds no code for sm_90a.
extern "C" int ddst_cuda_hopper_gather(int dtype, bool input_gradient, const ddst::cuda::GatherForm* form,
                                       const ddst::cuda::HopperGatherGeometry* geometry,
                                       const ddst_cuda_hopper_gather_arrays* arrays, int multiprocessors, void* stream);
