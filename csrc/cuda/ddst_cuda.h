// What the C interfaces of the CUDA kernels share: dtypes and the description of a convolution. No torch.
#pragma once
#include <stdint.h>

enum { DDST_CUDA_BFLOAT16 = 0, DDST_CUDA_FLOAT16 = 1, DDST_CUDA_TFLOAT32 = 2 /* float32, multiplied as TF32 */ };

// A block-sparse convolution, dilation 1. Its tensors are dense NHWC memory at addresses that are multiples of 16.
struct ddst_cuda_conv2d_problem {
  int32_t images, height, width, in_channels;   // of the forward input
  int32_t out_height, out_width, out_channels;  // of the forward output
  int32_t kernel_height, kernel_width;
  int32_t stride_y, stride_x, padding_y, padding_x;
  int32_t block_out, block_in;  // of the packed values
  int32_t dtype;                // DDST_CUDA_... of every tensor
};
