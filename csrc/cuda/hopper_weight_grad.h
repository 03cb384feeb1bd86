// The C interface of the weight gradient's kernel for sm_90a: raw pointers and a stream.
#pragma once

#include "hopper_weight_grad_shape.hpp"
#include "weight_grad.h"

// dtype: DDST_CUDA_BFLOAT16 or DDST_CUDA_FLOAT16. Returns a cudaError_t. The shape, whose groups and tile are as
// hopper_weight_grad_shape.hpp says, has passed hopper_weight_grad_error, and x_halved and gy_halved are 0; partials
// holds HopperWeightGradSizes::partial_floats. Does not wait for the device.
extern "C" int ddst_cuda_hopper_weight_grad(int dtype, const ddst::cuda::WeightGradShape* shape,
                                            const ddst_cuda_weight_grad_arrays* arrays, void* stream);
