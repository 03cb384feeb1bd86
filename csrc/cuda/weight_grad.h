// The weight gradient's C interface: raw pointers and a stream.
#pragma once

#include "ddst_cuda.h"
#include "weight_grad_shape.hpp"

// Device pointers, aligned to 16 bytes; what they hold: WeightGradParams in weight_grad.cuh.
struct ddst_cuda_weight_grad_arrays {
  const void *grad_output, *input;
  const int32_t *block_row, *block_col, *block_tap, *units;
  float* partials;
  void* values_grad;
  // Of a fused half block only: Prologue in prologue.cuh.
  bool fused;
  const float *mean, *scale, *shift;
  int32_t norm, x_halved, gy_halved;
  float slope;
};

// dtype: DDST_CUDA_…. Returns a cudaError_t. The shape has passed weight_grad_error. Does not wait for the device.
extern "C" int ddst_cuda_weight_grad(int dtype, const ddst::cuda::WeightGradShape* shape,
                                     const ddst_cuda_weight_grad_arrays* arrays, void* stream);

// The second kernel alone: values_grad of partial sums that another one wrote, whose groups are `merged` of these each.
extern "C" int ddst_cuda_weight_grad_reduce(int dtype, const ddst::cuda::WeightGradShape* shape, int merged,
                                            const ddst_cuda_weight_grad_arrays* arrays, void* stream);
